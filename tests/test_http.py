"""The HTTP side over real sockets: what a client may send, and what it gets. The engine is a small fake."""

from __future__ import annotations

import http.client
import json
import math
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import rerank_server as server


class FakePairs:
    """A pair's ids are the query's length and the passage's words."""

    longest = 1024

    def make(
        self, query: str, passages: Sequence[str], max_length: int | None = None, max_passage: int | None = None,
        keep_end: bool = False,
    ) -> list[server.Pair]:  # fmt: skip
        return [
            server.Pair((len(query), *range(len(text.split()))), 1, max(0, len(text) - 1000)) for text in passages
        ]  # fmt: skip

    def windows(
        self, query: str, passage: str, max_length: int | None = None, max_passage: int | None = None
    ) -> list[server.Pair]:
        return self.make(query, [passage])

    def room(self, query: str, max_length: int | None = None, max_passage: int | None = None) -> int:
        return 1000

    def n_characters(self, passage: str, n_tokens: int, keep_end: bool = False) -> int:
        return n_tokens


class FakeEngine:
    """Scores a pair by its number of words. `block` holds the engine back; `fail` makes it raise."""

    max_batch_tokens, max_sequences, arithmetic = 64, 8, "a fake's"

    def __init__(self) -> None:
        self.description = describe_fake("fake")
        self.pairs: Any = FakePairs()
        self.block = threading.Event()
        self.block.set()
        self.fail: Exception | None = None
        self.logit: float | None = None
        self.closed = 0
        self.n_scored = 0

    def score(self, pairs: Sequence[server.Pair]) -> list[float]:
        assert self.block.wait(30)
        self.n_scored += len(pairs)
        if self.fail:
            raise self.fail
        return [float(len(pair.ids) - 3) if self.logit is None else self.logit for pair in pairs]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [str(index) for index in ids]

    def close(self) -> None:
        self.closed += 1


def describe_fake(name: str, kind: str = server.CROSS_ENCODER) -> server.ModelDescription:
    return server.ModelDescription(Path(f"{name}.gguf"), kind, "bert", "F32", 1, 1024)


class Running:
    """A server in this process on a free port, with fake engines."""

    def __init__(self, with_gemma: bool = False, **changes: Any) -> None:
        settings = server.Settings(host="127.0.0.1", port=0, drain_s=10, **changes)
        self.engine = FakeEngine()
        self.m3 = server.Role("m3", describe_fake("fake-m3"), settings, self._load_m3)
        gemma = server.Role("gemma", describe_fake("fake-gemma"), settings, self._load_gemma)
        self.local = [self.m3, gemma] if with_gemma else [self.m3]
        self.roles = server.Roles(*self.local)
        self.server = server.RerankServer(server.Application(self.roles, settings), settings)
        self.port: int = self.server.server_address[1]
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def _load_m3(self, *_: Any) -> Any:
        return self.engine

    @staticmethod
    def _load_gemma(path: Path, settings: server.Settings, is_alone: bool = False) -> Any:
        raise server.ModelError("fake-gemma.gguf: truncated")

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            raw = answer.read()
            return answer.status, json.loads(raw) if raw else None, answer.headers
        finally:
            connection.close()

    def rerank(self, body: Any) -> tuple[int, Any, Any]:
        return self.request("POST", "/rerank", json.dumps(body).encode())

    def raw(self, data: bytes, half_close: bool = False) -> bytes:
        """Sends bytes as they are and reads until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            received = b""
            while chunk := connection.recv(65536):
                received += chunk
            return received

    def close(self) -> None:
        self.engine.block.set()
        self.server.drain(10)
        for role in self.local:
            role.close()


@pytest.fixture
def running() -> Iterator[Running]:
    fixture = Running(max_body_mb=1)
    yield fixture
    fixture.close()


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def test_scores_come_back_in_the_order_of_the_passages(running: Running) -> None:
    status, scores, headers = running.rerank({"query": "q", "passages": ["a b c", "", "a"]})
    assert status == 200
    assert scores == pytest.approx([sigmoid(1), sigmoid(-2), sigmoid(-1)])
    assert headers["X-Rerank-Model"] == "fake-m3"
    assert headers["Content-Type"] == "application/json"


def test_more_passages_than_one_batch_holds_are_all_scored(running: Running) -> None:
    passages = ["word " * (index % 7) for index in range(500)]
    status, scores, _ = running.rerank({"query": "q", "passages": passages})
    assert status == 200
    assert scores == pytest.approx([sigmoid(index % 7 - 2) for index in range(500)])


def test_no_passages_give_no_scores(running: Running) -> None:
    assert running.rerank({"query": "q", "passages": []})[:2] == (200, [])


def test_a_cut_passage_is_named_in_a_header(running: Running) -> None:
    _, _, headers = running.rerank({"query": "q", "passages": ["short", "long " * 400, "short", "long " * 300]})
    assert headers["X-Rerank-Truncated"] == "1,3"


@pytest.mark.parametrize(("passages", "expected"), [
    (["long " * 400] * 5 + ["short"] * 4 + ["long " * 400], "0-4,9"),
    (["long " * 400] * 14_000, "0-13999"),
    (["long " * 400, "short"] * 700, "count=700"),
])  # fmt: skip
def test_the_header_that_names_cut_passages_is_bounded(
    passages: list[str], expected: str
) -> None:
    """Would break: 14,000 numbers are more than http.client reads of a header, and 1,000 more than a proxy does."""
    fixture = Running()
    _, scores, headers = fixture.rerank({"query": "q", "passages": passages})
    assert headers["X-Rerank-Truncated"] == expected
    assert len(scores) == len(passages)
    fixture.close()


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"passages": ["a"]}, "query", "missing"),
        ({"query": None, "passages": ["a"]}, "query", "not null"),
        ({"query": ["a"], "passages": ["a"]}, "query", "not a list"),
        ({"query": "a"}, "passages", "missing"),
        ({"query": "a", "passages": "b"}, "passages", "not a string"),
        ({"query": "a", "passages": {"0": "b"}}, "passages", "not an object"),
        ({"query": "a", "passages": ["b", "c", 3]}, "passages[2]", "not a number"),
        ({"query": "a", "passages": [["b"]]}, "passages[0]", "not a list"),
        ({"query": "a", "passages": [], "use_llm": 1}, "use_llm", "true or false"),
    ],
)
def test_a_wrong_field_is_named(running: Running, body: Any, param: str, words: str) -> None:
    status, answer, _ = running.rerank(body)
    assert status == 400
    assert answer["error"]["param"] == param
    assert f"'{param}'" in answer["message"]
    assert words in answer["message"]
    assert answer["detail"] == answer["message"] == answer["error"]["message"]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON object, not a list"),
        (b"null", "must be a JSON object, not null"),
        (b'{"query": "\xff", "passages": []}', "not valid UTF-8: byte 11"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"query": ' + b"9" * 10_000 + b"}", "10,000 characters"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(running: Running, raw: bytes, words: str) -> None:
    status, answer, _ = running.request("POST", "/rerank", raw)
    assert status == 400
    assert words in answer["message"]


def test_booleans_may_be_strings(running: Running) -> None:
    assert running.rerank({"query": "q", "passages": ["a"], "use_llm": "false", "unknown": 1})[0] == 200


def test_a_missing_gemma_model_names_the_command_that_makes_it(running: Running) -> None:
    status, answer, _ = running.rerank({"query": "q", "passages": ["a"], "use_llm": True})
    assert status == 503
    assert "make convert MODEL=gemma" in answer["message"]


def test_a_gemma_file_that_does_not_load_is_no_score() -> None:
    fixture = Running(with_gemma=True)
    status, answer, _ = fixture.rerank({"query": "q", "passages": ["a"], "use_llm": True})
    assert status == 503
    assert "truncated" in answer["message"]
    assert fixture.rerank({"query": "q", "passages": ["a"]})[0] == 200
    fixture.close()


def test_unknown_paths_and_methods(running: Running) -> None:
    status, answer, _ = running.request("GET", "/nothing")
    assert status == 404
    assert "http://" in answer["message"], "it names the right base URL"
    for method in ("GET", "PUT", "DELETE", "PATCH", "BREW"):
        status, answer, headers = running.request(method, "/rerank")
        assert (status, headers["Allow"]) == (405, "POST, OPTIONS"), method
    status, _, headers = running.request("POST", "/health", b"{}")
    assert (status, headers["Allow"]) == (405, "GET, HEAD, OPTIONS")
    assert running.request("HEAD", "/health")[:2] == (200, None)


def test_a_body_without_a_length_is_411(running: Running) -> None:
    assert b" 411 " in running.raw(b"POST /rerank HTTP/1.1\r\nHost: a\r\n\r\n")


@pytest.mark.parametrize("length", [b"-1", b"1e3", b"0x10", b"1,1", b"9" * 30, b""])
def test_a_length_that_is_no_number_is_refused(running: Running, length: bytes) -> None:
    assert b" 400 " in running.raw(b"POST /rerank HTTP/1.1\r\nHost: a\r\nContent-Length: " + length + b"\r\n\r\n")


def test_a_body_over_the_limit_is_refused_before_it_is_read(running: Running) -> None:
    head = b"POST /rerank HTTP/1.1\r\nHost: a\r\nContent-Length: 500000000\r\n\r\n"
    started = time.monotonic()
    answer = running.raw(head)  # the body never comes
    assert b" 413 " in answer
    assert b"1,000,000" in answer
    assert time.monotonic() - started < 10
    body = b"x" * 3_000_000  # and a client that sends it all the same still reads the answer
    assert running.request("POST", "/rerank", body)[0] == 413


def test_expect_100_is_refused_before_the_body_is_sent(running: Running) -> None:
    head = b"POST /rerank HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2000000\r\n\r\n"
    answer = running.raw(head)
    assert b" 413 " in answer
    assert b"100 Continue" not in answer


def test_a_body_that_stops_half_way_is_refused(running: Running) -> None:
    head = b"POST /rerank HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n"
    assert b" 400 " in running.raw(head + b"{}", half_close=True)


@pytest.mark.parametrize("garbage", [b"\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02\x01\r\n", b"A" * 70_000 + b"\r\n"])
def test_what_is_no_http_gets_an_answer_or_a_clean_close(running: Running, garbage: bytes) -> None:
    answer = running.raw(garbage, half_close=True)
    assert b"Traceback" not in answer
    assert running.request("GET", "/health")[0] == 200


def test_a_connection_is_used_again(running: Running) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
    for method, path, expected in [("GET", "/health", 200), ("POST", "/rerank", 400), ("GET", "/health", 200)]:
        connection.request(method, path, b"{}" if method == "POST" else None)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == expected
        assert answer.headers.get("Connection") != "close"
    connection.close()


def test_pipelined_requests_are_answered_in_order(running: Running) -> None:
    body = b'{"query": "q", "passages": ["a"]}'
    one = b"POST /rerank HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    last = one.replace(b"Host: a", b"Host: a\r\nConnection: close")
    answer = running.raw(one + b"GET /nothing HTTP/1.1\r\nHost: a\r\n\r\n" + last)
    statuses = [line.split()[1] for line in answer.split(b"\n") if line.startswith(b"HTTP/1.1 ")]
    assert statuses == [b"200", b"404", b"200"]


@pytest.mark.parametrize("logit", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_no_number_is_an_error_and_never_a_score(running: Running, logit: float) -> None:
    running.engine.logit = logit
    status, answer, _ = running.rerank({"query": "q", "passages": ["a"]})
    assert (status, answer["error_type"]) == (500, "engine_error")


def test_an_engine_that_raises_fails_its_batch_and_the_server_lives(running: Running) -> None:
    running.engine.fail = RuntimeError("secret detail")
    status, answer, _ = running.rerank({"query": "q", "passages": ["a"]})
    assert status == 500
    assert "secret detail" not in json.dumps(answer)
    running.engine.fail = None
    assert running.rerank({"query": "q", "passages": ["a"]})[0] == 200


def test_extreme_logits_stay_scores(running: Running) -> None:
    for passage, logit, expected in (("a", 1000.0, 1.0), ("a b", -1000.0, 0.0)):
        running.engine.logit = logit
        assert running.rerank({"query": "q", "passages": [passage]})[1] == [expected]


def test_a_pair_is_scored_once_however_often_it_is_asked_for(running: Running) -> None:
    body = {"query": "q", "passages": ["a b", "a", "a b", "a b"]}
    assert running.rerank(body)[1] == running.rerank(body)[1] == pytest.approx([0.5, sigmoid(-1), 0.5, 0.5])
    assert running.engine.n_scored == 2
    cache = running.request("GET", "/health")[1]["models"]["m3"]["cache"]
    assert cache == {"entries": 2, "hits": 2, "misses": 2}
    assert running.rerank({"query": "other", "passages": ["a b"]})[0] == 200
    assert running.engine.n_scored == 3, "another query is another pair"


def test_the_cache_forgets_the_least_recently_used_and_stays_in_its_bounds() -> None:
    cache = server.ScoreCache(3 * server.ScoreCache.ENTRY_BYTES)
    for key in (b"a", b"b", b"c"):
        cache.put({key: 1.0})
    cache.take([b"a"])
    cache.put({b"d": 1.0})
    assert set(cache.take([b"a", b"b", b"c", b"d"])) == {b"a", b"c", b"d"}
    assert cache.state()["entries"] == 3


def test_a_failure_is_not_remembered(running: Running) -> None:
    running.engine.fail = RuntimeError("once")
    assert running.rerank({"query": "q", "passages": ["a"]})[0] == 500
    running.engine.fail = None
    assert running.rerank({"query": "q", "passages": ["a"]})[0] == 200


def test_health_says_which_file_serves(running: Running) -> None:
    status, answer, _ = running.request("GET", "/health")
    assert status == 200
    assert answer["models"]["m3"]["file"] == "fake-m3.gguf"
    assert answer["models"]["gemma"] is None


def test_draining_answers_what_is_in_flight_and_closes_idle_connections() -> None:
    fixture = Running()
    idle = http.client.HTTPConnection("127.0.0.1", fixture.port, timeout=20)
    idle.request("GET", "/health")
    idle.getresponse().read()
    fixture.engine.block.clear()
    answers: list[tuple[int, Any, Any]] = []
    body = {"query": "q", "passages": ["a b"] * 100}
    threads = [threading.Thread(target=lambda: answers.append(fixture.rerank(body))) for _ in range(5)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    drained = threading.Thread(target=fixture.close)
    started = time.monotonic()
    threading.Timer(0.5, fixture.engine.block.set).start()
    fixture.engine.block.clear()
    drained.start()
    for thread in [*threads, drained]:
        thread.join(20)
    assert [status for status, _, _ in answers] == [200] * 5
    assert time.monotonic() - started < 9, "an idle connection held up the stop"
    assert fixture.engine.closed == 1


def test_two_threads_share_the_engine_without_mixing_scores(running: Running) -> None:
    results: dict[int, list[float]] = {}

    def ask(words: int) -> None:
        results[words] = running.rerank({"query": "q", "passages": ["w " * words] * 40})[1]

    threads = [threading.Thread(target=ask, args=(words,)) for words in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(scores == pytest.approx([sigmoid(words - 2)] * 40) for words, scores in results.items())
