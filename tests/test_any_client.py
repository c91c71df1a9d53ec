"""The requests of clients that speak no contract of the README's table, sent as they send them, and read as they read.

Each case is one client's request, from its source or from a bug report of another server's users, and a small model of
its parser: it takes the keys that the client takes and fails where the client would. The engine reads numbers
(tests/test_contracts.py), so every one of these requests ranks TEXTS in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
from test_contracts import HIGH, LONG, LOW, NOTHING_READ, Served

TEXTS = ["-2", "3", "1"]
BEST_FIRST = [1, 2, 0]
KEY = "sesame"
Parser = Callable[[Any], list[int]]  # an answer to the indices, best first


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    fixture = Served()
    yield fixture
    fixture.close()


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    fixture = Served(api_key=KEY, cors_origins="https://notes.example")
    with_key = {"Authorization": f"Bearer {KEY}"}
    assert fixture.request("POST", "/rerank", json.dumps(QD).encode(), **with_key)[0] == 200, "it loads the model"
    yield fixture
    fixture.close()


def post(served: Served, path: str, body: Any) -> tuple[int, Any, Any]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return served.request("POST", path, raw, **{"Content-Type": "application/json"})


def ask(served: Served, path: str, body: Any) -> Any:
    status, answer, _ = post(served, path, body)
    assert status == 200, answer
    return answer


def refusal(served: Served, path: str, body: Any) -> str:
    """The message of a request that must be refused."""
    status, answer, _ = post(served, path, body)
    assert status == 400, answer
    return str(answer["message"])


# -- How clients read --------------------------------------------------------------------------------------------------


def only(item: dict[str, Any], *names: str) -> dict[str, Any]:
    """An object for a parser that refuses any other key."""
    assert item.keys() <= set(names), f"unknown key: {sorted(item.keys() - set(names))}"
    return item


def is_sorted(results: Sequence[dict[str, Any]], score: str) -> list[int]:
    values = [float(item[score]) for item in results]
    assert values == sorted(values, reverse=True)
    return [item["index"] for item in results]


def in_input_order(scores: Sequence[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda index: -scores[index])


def jina(answer: Any) -> list[int]:
    return is_sorted(answer["results"], "relevance_score")


def elastic(answer: Any) -> list[int]:
    """Elasticsearch's HuggingFaceRerankResponseEntity: a list, and no key that it does not know."""
    return is_sorted([only(item, "index", "score", "text") for item in answer], "score")


def elastic_with_texts(answer: Any) -> list[int]:
    assert [item["text"] for item in answer] == [TEXTS[item["index"]] for item in answer]
    return elastic(answer)


def tei(answer: Any) -> list[int]:
    return is_sorted(answer, "score")


def xinference(answer: Any) -> list[int]:
    """RAGFlow counts tokens of an Xinference: a missing one is its KeyError."""
    tokens = answer["meta"]["tokens"]
    assert tokens["input_tokens"] + tokens["output_tokens"] > 0
    assert all(isinstance(item["document"]["text"], str) for item in answer["results"])
    return jina(answer)


def light_rag(answer: Any) -> list[int]:
    """LightRAG before 1.4.7, and SGLang's clients; without `results` they keep the old ranking."""
    return jina({"results": answer.get("results", [])})


def voyage(answer: Any) -> list[int]:
    assert answer["usage"]["total_tokens"] > 0
    return is_sorted(answer["data"], "relevance_score")


def vllm_score(answer: Any) -> list[int]:
    assert [item["index"] for item in answer["data"]] == list(range(len(TEXTS)))
    return in_input_order([item["score"] for item in answer["data"]])


def nvidia(answer: Any) -> list[int]:
    return is_sorted([only(item, "index", "logit") for item in only(answer, "rankings")["rankings"]], "logit")


def weaviate(answer: Any) -> list[int]:
    """reranker-transformers looks for `error` first, and trusts the order of `scores`."""
    assert not answer.get("error")
    assert [item["document"] for item in answer["scores"]] == TEXTS
    return in_input_order([item["score"] for item in answer["scores"]])


def khoj(answer: Any) -> list[int]:
    return in_input_order(answer["scores"])


def dash_scope(answer: Any) -> list[int]:
    assert answer["usage"]["total_tokens"] > 0
    assert answer["request_id"]
    return jina(answer["output"])


# -- What they send ----------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    name: str
    path: str
    body: Any
    read: Parser = jina


QD: dict[str, Any] = {"query": "q", "documents": TEXTS}
FLAT = {"model": "m3", **QD, "top_n": 3}
OBJECTS = [{"text": text} for text in TEXTS]
PARTS = [{"content": [{"type": "text", "text": text}]} for text in TEXTS]
PATHS = (
    "//rerank", "/v1/rerank/", "/v1//rerank", "/v1/v1/rerank", "/v1/v2/rerank", "/rerank/rerank", "/api/v1/rerank",
    "/api/rerank", "/v3/rerank", "/v1/reranks", "/compatible-api/v1/reranks", "/reranking", "/v1/reranking/", "/",
)  # fmt: skip
SCORE_PATHS = ("/v1/score/", "//score", "/v1/v1/score")
VLLM_LIMITS = {"truncate_prompt_tokens": -1, "max_tokens_per_query": 0, "max_tokens_per_doc": 0}
CASES = [
    *(Case(f"Jina's body to {path}", path, FLAT) for path in PATHS),
    *(Case(f"vLLM's body to {path}", path, {"text_1": "q", "text_2": TEXTS}, vllm_score) for path in SCORE_PATHS),
    Case("DashScope, flat", "/api/v1/services/rerank/reranks", FLAT),
    Case(
        "DashScope text-rerank", "/api/v1/services/rerank/text-rerank/text-rerank",
        {"model": "gte-rerank", "input": QD, "parameters": {"top_n": 3, "return_documents": True}}, dash_scope,
    ),
    Case("vLLM data_1, data_2", "/score", {"model": "m", "data_1": "q", "data_2": TEXTS}, vllm_score),
    Case("vLLM text_1, text_2", "/v1/score", {"model": "m", "text_1": "q", "text_2": TEXTS}, vllm_score),
    Case("vLLM queries, items", "/score", {"queries": "q", "items": TEXTS}, vllm_score),
    Case("vLLM queries, documents", "/score", {"queries": ["q"] * 3, "documents": TEXTS}, vllm_score),
    Case("rag_api docs and k", "/v1/rerank", {"query": "q", "docs": TEXTS, "k": 3}),
    Case("objects with content", "/v1/rerank", {"query": "q", "documents": [{"content": text} for text in TEXTS]}),
    Case("objects with page_content", "/v1/rerank", {"query": "q", "docs": [{"page_content": t} for t in TEXTS]}),
    Case("objects with body", "/rerank", {"query": "q", "documents": [{"body": text, "id": 7} for text in TEXTS]}),
    Case("a query that is an object", "/v1/rerank", {"query": {"text": "q"}, "documents": OBJECTS}),
    Case("content parts", "/v1/rerank", {"query": {"content": [{"type": "text", "text": "q"}]}, "documents": PARTS}),
    Case("a bare list of parts", "/v1/rerank", {"query": "q", "documents": [item["content"] for item in PARTS]}),
    Case("a byte order mark", "/v1/rerank", b"\xef\xbb\xbf" + json.dumps(FLAT).encode()),
    Case("half an emoji", "/v1/rerank", {"query": "q", "documents": ["-2 \ud83d", "3", "1"]}),
    Case("numbers as strings", "/v1/rerank", {**QD, "top_n": "3", "max_tokens_per_doc": "400"}),
    Case("vLLM's limits that are none", "/v1/rerank", {**QD, **VLLM_LIMITS}),
    Case("limits that are null", "/v1/rerank", {**QD, **dict.fromkeys(VLLM_LIMITS), "top_n": None}),
    Case(
        "SiliconFlow", "/v1/rerank",
        {**FLAT, "return_documents": False, "max_chunks_per_doc": 1024, "overlap_tokens": 8},
    ),
    Case("ids of any kind", "/v1/rerank", {
        "query": "q", "documents": [{"id": x, "text": t} for x, t in zip([{"a": 1}, 2.5, None], TEXTS, strict=True)],
    }),
    Case(
        "Elastic hugging_face", "/v1/rerank", {"texts": TEXTS, "query": "q", "return_text": True, "top_n": 3},
        elastic_with_texts,
    ),
    Case("Elastic hugging_face to the bare URL", "/", {"texts": TEXTS, "query": "q"}, elastic),
    Case(
        "RAGFlow Xinference", "/v1/rerank",
        {"model": "m", **QD, "return_documents": "true", "return_len": "true"}, xinference,
    ),
    Case("LightRAG, older", "/v1/rerank", {"model": "m", **QD, "top_k": 3, "return_documents": False}, light_rag),
    Case("SGLang", "/v1/rerank", {"model": "m", **QD, "top_k": 3, "rid": "r", "return_documents": True}, light_rag),
    Case("Voyage", "/v1/rerank", {"model": "m", **QD, "top_k": 3, "truncation": True}, voyage),
    Case(
        "NVIDIA NIM", "/v1/ranking",
        {"model": "m", "query": {"text": "q"}, "passages": OBJECTS, "truncate": "END"}, nvidia,
    ),
    Case("RAGFlow NVIDIA", "/v1/reranking", {
        "model": "m", "query": {"text": "q"}, "passages": OBJECTS, "truncate": "END", "top_n": 3,
    }, nvidia),
    Case("Weaviate", "/rerank", {"query": "q", "documents": TEXTS, "property": "title"}, weaviate),
    Case("huggingface.js", "/", {"inputs": {"query": "q", "texts": TEXTS}}, tei),
    Case("khoj", "/", {"inputs": {"query": "q", "passages": TEXTS}}, khoj),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_clients_request_is_understood_and_its_parser_reads_the_answer(served: Served, case: Case) -> None:
    assert case.read(ask(served, case.path, case.body)) == BEST_FIRST


# -- Paths -------------------------------------------------------------------------------------------------------------

PROBES = (
    "/health", "/healthz", "/livez", "/live", "/ready", "/readyz", "/v1/health/ready", "/v1/health/live",
    "/.well-known/ready", "/.well-known/live", "//health", "/health/",
)  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", PROBES)
def test_a_probe_needs_no_key(locked: Served, method: str, path: str) -> None:
    assert post(locked, "/rerank", QD)[0] == 401
    status, answer, _ = locked.request(method, path)
    assert status == 200, answer
    if method == "GET":
        assert isinstance(answer["status"], str)


@pytest.mark.parametrize("path", ["/v1/models/m3", "/v1/models/fake-m3", "/v1/models/BAAI/bge-reranker-v2-m3",
                                  "/v1/models/BAAI%2Fbge-reranker-v2-m3", "/v1/v1/models/m3/",
                                  "/v1/models/a-name-of-ones-own"])  # fmt: skip
def test_a_model_is_found_by_its_name(served: Served, path: str) -> None:
    """Dify's Xinference reads model_type, and refuses what is no reranker."""
    status, answer, _ = served.request("GET", path)
    assert (status, answer["model_type"]) == (200, "rerank")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/cluster/auth", "/v1/embeddings"])
def test_an_unknown_path_is_told_the_base_url_in_one_line(served: Served, path: str) -> None:
    for method in ("GET", "POST"):
        status, answer, _ = served.request(method, path, b"{}" if method == "POST" else None)
        assert status == 404
        assert f"http://127.0.0.1:{served.port}/v1" in answer["message"]
        assert len(answer["message"].splitlines()) == 1
        assert len(answer["message"]) < 160


def test_a_preflight_for_a_private_network_is_answered_for_allowed_origins_only(locked: Served) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Private-Network": "true"}
    for origin, expected in (("https://notes.example", "true"), ("https://other.example", None)):
        _, _, headers = locked.request("OPTIONS", "/v1/rerank", None, Origin=origin, **asked)
        assert headers["Access-Control-Allow-Private-Network"] == expected
        assert headers["Access-Control-Allow-Origin"] == (origin if expected else None)


# -- Bodies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("body", "named", "would_do"), [
    ({"query": "q"}, "passages", ("documents", "docs", "texts", "items", "data_2", "text_2")),
    ({"documents": TEXTS}, "query", ("queries", "data_1", "text_1")),
    ({"input": {"query": "q", "parameters": {}}}, "documents", ("docs", "texts", "passages")),
])  # fmt: skip
def test_a_missing_key_is_named_with_those_that_would_do(
    served: Served, body: Any, named: str, would_do: Sequence[str]
) -> None:
    message = refusal(served, "/rerank", body)
    assert f"'{named}' is missing" in message
    assert all(name in message for name in would_do)


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
WITH_IMAGE = [{"content": [{"type": "text", "text": "3"}, IMAGE]}]


def test_an_image_is_refused_with_its_index(served: Served) -> None:
    assert "documents[1].content[1]" in refusal(served, "/v1/rerank", {"query": "q", "documents": ["1", *WITH_IMAGE]})
    assert "documents[0][0]" in refusal(served, "/v1/rerank", {"query": "q", "documents": [[IMAGE]]})


def test_the_texts_of_content_parts_are_joined(served: Served) -> None:
    parts = [{"content": [{"type": "text", "text": "1"}, {"type": "text", "text": "3"}]}]
    body = {"query": "q", "documents": parts, "return_documents": True}
    (result,) = ask(served, "/v1/rerank", body)["results"]
    assert (result["relevance_score"], result["document"]["text"]) == (HIGH, "1\n3")


HALF: dict[str, Any] = {"query": "q", "documents": ["-2", "\ud83d 3", "1"], "return_documents": True}


def test_half_a_character_is_read_as_the_replacement_character(served: Served) -> None:
    status, answer, _ = post(served, "/v1/rerank", HALF)
    assert status == 200
    assert [item["index"] for item in answer["results"]] == [1, 2, 0]
    assert answer["results"][0]["document"] == {"text": "\ufffd 3"}
    status, scores, _ = post(served, "/rerank", {"query": "q", "passages": HALF["documents"][:2]})
    assert (status, scores) == (200, [LOW, HIGH])


def best(served: Served, texts: Sequence[str], query: str = "q", /, **fields: Any) -> list[float]:
    """Logits in input order: the largest number that was read of each passage."""
    body = {"query": query, "documents": list(texts), "raw_scores": True, **fields}
    results = ask(served, "/v1/rerank", body)["results"]
    return [item["relevance_score"] for item in sorted(results, key=lambda item: item["index"])]


def test_limits_do_what_they_say(served: Served) -> None:
    """In LONG the best number stands last, behind what one pair can hold."""
    middle = "1 " * 35 + "5"
    long_query = "word " * 45
    assert best(served, [LONG]) == [1]
    assert best(served, [LONG], truncation_side="left") == [5]
    assert best(served, [middle]) == [5]
    assert best(served, [middle], truncate_prompt_tokens=32) == [1]
    assert best(served, [middle], long_query) == [1]
    assert best(served, [middle], long_query, max_tokens_per_query=2) == [5]
    assert best(served, [middle], max_tokens_per_doc="30") == [1]
    assert best(served, [LONG], max_chunks_per_doc=1) == [1]
    assert best(served, [LONG], max_chunks_per_doc=2) == [5]
    assert best(served, ["", "2"], **VLLM_LIMITS) == [NOTHING_READ, 2]


@pytest.mark.parametrize("none", [0, -1, None, "0", "-1"])
def test_no_limit_is_no_limit(served: Served, none: Any) -> None:
    names = ("truncate_prompt_tokens", "max_tokens_per_query", "max_tokens_per_doc")
    assert best(served, [LONG, "7"], **dict.fromkeys(names, none)) == [1, 7]


def test_overlapping_chunks_read_more_tokens(served: Served) -> None:
    def n_tokens(**fields: Any) -> int:
        answer = ask(served, "/v1/rerank", {"query": "q", "documents": [LONG * 4], **fields})
        return int(answer["meta"]["tokens"]["input_tokens"])

    whole = n_tokens(max_chunks_per_doc=50, overlap_tokens=0)
    assert whole > n_tokens(max_chunks_per_doc=2, overlap_tokens=0) > n_tokens()
    assert n_tokens(max_chunks_per_doc=50, overlap_tokens=20) > whole


@pytest.mark.parametrize("field", ["truncate_prompt_tokens", "truncation_side", "max_tokens_per_query",
                                   "max_chunks_per_doc", "overlap_tokens", "top_n"])  # fmt: skip
def test_a_limit_that_makes_no_sense_is_refused_by_name(served: Served, field: str) -> None:
    assert f"'{field}'" in refusal(served, "/v1/rerank", {**QD, field: "middle"})


def test_a_top_n_of_0_is_refused(served: Served) -> None:
    assert "'top_n' must be at least 1" in refusal(served, "/v1/rerank", {**QD, "top_n": 0})


@pytest.mark.parametrize(("truncate", "status"), [("END", 200), (None, 200), ("NONE", 400)])
def test_nims_truncate_is_heard(served: Served, truncate: str | None, status: int) -> None:
    body = {"query": {"text": "q"}, "passages": [{"text": LONG}], "truncate": truncate}
    got, answer, _ = post(served, "/v1/ranking", body)
    assert got == status, answer
    if status == 400:
        assert "passages[0]" in answer["message"]


# -- Answers -----------------------------------------------------------------------------------------------------------


def test_elastic_is_told_nothing_that_it_refuses_whatever_happened(served: Served) -> None:
    body = {"query": "q", "texts": [LONG, "3 \ud83d"], "return_text": True, "top_n": 2}
    status, answer, headers = post(served, "/", body)
    assert (status, elastic(answer)) == (200, [1, 0])
    assert headers["X-Rerank-Truncated"] == "0"
    assert elastic(ask(served, "/", {**body, "on_overflow": "truncate", "ids": ["a", "b"]})) == [1, 0]


def test_voyages_answer_has_what_light_rag_reads(served: Served) -> None:
    answer = ask(served, "/v1/rerank", {**QD, "top_k": 2, "return_documents": True})
    assert light_rag(answer) == voyage(answer) == BEST_FIRST[:2]
    assert [item["document"] for item in answer["data"]] == ["3", "1"]
    assert [item["document"]["text"] for item in answer["results"]] == ["3", "1"]


def test_objects_get_their_other_fields_back(served: Served) -> None:
    documents = [{"id": {"a": [1]}, "text": "1", "title": "x"}, {"id": 2.5, "text": "3", "page": 4}, {"text": "2"}]
    body = {"query": "q", "documents": documents, "return_documents": True}
    results = ask(served, "/v1/rerank", body)["results"]
    assert [item["document"] for item in results] == [documents[1], documents[2], documents[0]]
    assert [item.get("id") for item in results] == [2.5, None, {"a": [1]}]


@pytest.mark.parametrize("wrong", [{"documents": [5]}, {"query": None}])
def test_weaviate_reads_a_refusal(served: Served, wrong: dict[str, Any]) -> None:
    status, answer, _ = post(served, "/rerank", {"query": "q", "documents": ["1"], "property": "title", **wrong})
    assert (status, type(answer["error"])) == (400, str)


def test_a_strict_server_knows_no_model_of_another_name() -> None:
    fixture = Served(strict_model=True)
    assert fixture.request("GET", "/v1/models/none")[0] == 404
    assert fixture.request("GET", "/v1/models/fake-m3")[0] == 200
    fixture.close()


@pytest.mark.parametrize("id", ["a", 7, 1.5, True, None, ["a"], {"a": 1}], ids=repr)
def test_an_id_of_any_kind_does_no_harm(served: Served, id: Any) -> None:
    body = {"query": "q", "documents": [{"text": "1", "id": id}, {"text": "3", "id": "b"}]}
    status, answer, _ = served.request("POST", "/v1/rerank", json.dumps(body).encode())
    assert (status, [result.get("id") for result in answer["results"]]) == (200, ["b", id])
