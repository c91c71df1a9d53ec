#!/usr/bin/env python3
"""Checks a running server as its user would: `python tests/test_the_server.py [URL]` (default http://127.0.0.1:8000).

Prints what it checked; exit status 0 when all of it held. Under pytest the same checks run against a server that the
suite starts. Needs nothing but the standard library.
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

QUERY = "How long do cats sleep in a day?"
# From the best answer to the worst; any reranker worth its name puts the first ones first.
PASSAGES = [
    "Cats sleep between 12 and 16 hours a day, and kittens sleep even longer.",
    "A cat needs fresh water every day.",
    "The stock market closed lower on Friday after the central bank raised interest rates.",
]


def post(url: str, body: Any, raw: bytes | None = None) -> tuple[int, Any, dict[str, str]]:
    """Status, parsed body and headers of POST /rerank."""
    data = json.dumps(body).encode() if raw is None else raw
    request = urllib.request.Request(url + "/rerank", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), dict(error.headers)


def health(url: str) -> Any:
    with urllib.request.urlopen(url + "/health", timeout=30) as answer:
        return json.load(answer)


def check_ranking(url: str, use_llm: bool) -> str:
    status, scores, headers = post(url, {"query": QUERY, "passages": PASSAGES, "use_llm": use_llm})
    assert status == 200, scores
    assert len(scores) == len(PASSAGES), scores
    assert all(isinstance(score, float) and 0 <= score <= 1 for score in scores), scores
    assert scores[0] == max(scores), f"the answer is not ranked first: {scores}"
    assert scores[2] == min(scores), f"the unrelated passage is not ranked last: {scores}"
    shown = ", ".join(f"{score:.3f}" for score in scores)
    return f"ranks an answer before a related and an unrelated passage: {shown} ({headers['X-Rerank-Model']})"


def check_order(url: str) -> str:
    forwards = post(url, {"query": QUERY, "passages": PASSAGES})[1]
    backwards = post(url, {"query": QUERY, "passages": PASSAGES[::-1]})[1]
    difference = max(abs(a - b) for a, b in zip(forwards, backwards[::-1], strict=True))
    assert difference < 0.01, (forwards, backwards)
    return f"scores follow the passages when their order changes (largest difference {difference:.1e})"


def check_many(url: str) -> str:
    passages = [f"{PASSAGES[index % 3]} Note number {index}." for index in range(30)]
    scores = post(url, {"query": QUERY, "passages": passages})[1]
    singles = [post(url, {"query": QUERY, "passages": [passage]})[1][0] for passage in passages[:3]]
    difference = max(abs(a - b) for a, b in zip(scores, singles, strict=False))
    assert len(scores) == 30, scores
    assert difference < 0.01, (scores[:3], singles)
    return f"30 passages score as they do alone (largest difference {difference:.1e})"


def check_edges(url: str) -> str:
    assert post(url, {"query": QUERY, "passages": []})[:2] == (200, [])
    status, scores, _ = post(url, {"query": "", "passages": ["", " ", "日本語", "🙂", "word " * 20000]})
    assert status == 200, scores
    assert len(scores) == 5, scores
    return "an empty list, empty strings, other scripts and a passage of 20,000 words are answered"


def check_errors(url: str) -> str:
    wrong = [
        ({"passages": []}, "query"),
        ({"query": 1, "passages": []}, "query"),
        ({"query": "a"}, "passages"),
        ({"query": "a", "passages": "b"}, "passages"),
        ({"query": "a", "passages": ["b", 3]}, "passages[1]"),
        ({"query": "a", "passages": [], "use_llm": "perhaps"}, "use_llm"),
    ]
    for body, field in wrong:
        status, answer, _ = post(url, body)
        assert status == 400, answer
        assert field in answer["message"], (field, answer)
    for raw in (b"", b"{", b"[]", b"\xff", b"null"):
        assert post(url, None, raw)[0] == 400, raw
    return f"{len(wrong) + 5} malformed requests get status 400, and the message names the field"


def check_gemma(url: str) -> str:
    if health(url)["models"]["gemma"] is not None:
        return "use_llm: " + check_ranking(url, True)
    status, answer, _ = post(url, {"query": QUERY, "passages": PASSAGES, "use_llm": True})
    assert status == 503, answer
    assert "make convert" in answer["message"], answer
    return "use_llm without a gemma model: 503, and the message names the command that makes one"


CHECKS: list[Callable[[str], str]] = [
    lambda url: check_ranking(url, False),
    check_order,
    check_many,
    check_edges,
    check_errors,
    check_gemma,
]


def main(url: str) -> int:
    try:
        models = health(url)["models"]
    except (OSError, ValueError) as error:
        print(f"no server answers at {url}/health: {error}")
        return 1
    print(f"{url}: m3 role {models['m3']['file']}, gemma role {(models['gemma'] or {}).get('file', 'none')}")
    failures = 0
    for check in CHECKS:
        try:
            print("  ok    ", check(url))
        except (AssertionError, OSError, ValueError, KeyError) as error:
            failures += 1
            print("  FAILED", error)
    print(f"{len(CHECKS) - failures} passed, {failures} failed")
    return 1 if failures else 0


def test_a_running_server_serves_its_users(mini_server: str) -> None:
    """Would break: anything that the README promises about the native contract."""
    assert main(mini_server) == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1].rstrip("/") if len(sys.argv) > 1 else "http://127.0.0.1:8000"))
