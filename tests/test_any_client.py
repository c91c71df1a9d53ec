"""Requests as real clients send them, and answers read as their parsers do: a key that a strict one does not know is a
failure. Each table is one rule of the server; the clients are named in docs/clients.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from test_contracts import Served
from test_http import sigmoid

QUERY, TEXTS = "q", ["1", "3", "2"]
BEST_FIRST, SCORES = [1, 2, 0], [sigmoid(1), sigmoid(3), sigmoid(2)]
DOCUMENTS = {"query": QUERY, "documents": TEXTS}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    fixture = Served(api_key="sesame", cors_origins="https://app.example.com")
    yield fixture
    fixture.close()


def post(served: Served, path: str, body: Any, **headers: str) -> tuple[int, Any, Any]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return served.request("POST", path, raw, Authorization="Bearer sesame", **headers)


def ok(served: Served, path: str, body: Any) -> Any:
    status, answer, _ = post(served, path, body)
    assert status == 200, answer
    return answer


def refused(served: Served, body: Any, path: str = "/v1/rerank") -> str:
    status, answer, _ = post(served, path, body)
    assert status == 400, answer
    return str(answer["message"])


def order(results: list[dict[str, Any]]) -> list[int]:
    return [result["index"] for result in results]


# -- Where a request goes ----------------------------------------------------------------------------------------------

RERANK_PATHS = ("//rerank", "/v1/rerank/", "/v1/v1/rerank", "/v1/v2/rerank", "/rerank/rerank", "/api/v1/rerank",
                "/v3/rerank", "/api/rerank", "/v1/reranks", "/v1/reranking", "/v1/ranking", "/", "", "/v1//rerank//",
                "/api/v1/services/rerank/text-rerank/text-rerank")  # fmt: skip


@pytest.mark.parametrize("path", RERANK_PATHS)
def test_the_last_segment_of_a_path_decides(served: Served, path: str) -> None:
    assert order(ok(served, path or "/", DOCUMENTS)["results"]) == BEST_FIRST


@pytest.mark.parametrize("path", ["/score", "/v1/score", "/v1/score/", "/api/v1//score"])
def test_score_likewise(served: Served, path: str) -> None:
    answer = ok(served, path, {"queries": QUERY, "documents": TEXTS})
    assert [item["score"] for item in answer["data"]] == SCORES


@pytest.mark.parametrize("path", ["/health", "/healthz", "/livez", "/health/", "/v1/health", "/ready", "/readyz",
                                  "/v1/health/ready", "/v1/health/live", "/.well-known/ready"])  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_probes_need_no_key(served: Served, path: str, method: str) -> None:
    ok(served, "/rerank", DOCUMENTS)  # the model is loaded
    assert served.request(method, path)[0] == 200


NAMES = ("fake-m3", "m3", "my/own-name", "BAAI/bge-reranker-v2-m3", "BAAI%2Fbge-reranker-v2-m3")


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_asked_for_by_name(served: Served, name: str) -> None:
    status, answer, _ = served.request("GET", f"/v1/models/{name}", Authorization="Bearer sesame")
    assert (status, answer["id"], answer["model_type"]) == (200, name.replace("%2F", "/"), "rerank")


def test_a_strict_server_knows_no_model_of_another_name() -> None:
    fixture = Served(strict_model=True)
    assert fixture.request("GET", "/v1/models/none")[0] == 404
    assert fixture.request("GET", "/v1/models/fake-m3")[0] == 200
    fixture.close()


def test_an_unknown_path_is_told_the_base_url_in_a_line(served: Served) -> None:
    status, answer, _ = post(served, "/v1/embeddings", DOCUMENTS)
    assert status == 404
    assert f"http://127.0.0.1:{served.port}/v1" in answer["message"]
    assert len(answer["message"]) < 160


# -- What a body means -------------------------------------------------------------------------------------------------

BODIES: dict[str, dict[str, Any]] = {
    "Dify, rag_api: docs and k": {"query": QUERY, "docs": TEXTS, "k": 3},
    "items": {"query": QUERY, "items": TEXTS},
    "data_1 and data_2": {"data_1": QUERY, "data_2": TEXTS},
    "text_1 and text_2": {"text_1": QUERY, "text_2": TEXTS},
    "a query that is an object": {"query": {"text": QUERY}, "documents": TEXTS},
    "text": {"query": QUERY, "documents": [{"text": text} for text in TEXTS]},
    "content": {"query": QUERY, "documents": [{"content": text} for text in TEXTS]},
    "LangChain": {"query": QUERY, "documents": [{"page_content": text, "metadata": {}} for text in TEXTS]},
    "body": {"query": QUERY, "documents": [{"body": text} for text in TEXTS]},
    "content parts": {"query": [{"type": "text", "text": QUERY}],
                      "documents": [[{"type": "text", "text": text}] for text in TEXTS]},
    "llama.cpp, Xinference, Dify vision": {
        "query": {"text": QUERY}, "documents": [{"content": [{"type": "text", "text": text}]} for text in TEXTS]},
    "RAGFlow, Xinference: strings for booleans": {
        **DOCUMENTS, "model": "m", "return_documents": "true", "return_len": "true"},
    "numbers that are strings": {**DOCUMENTS, "top_n": "3", "max_tokens_per_doc": "100"},
    "vLLM: no limits": {**DOCUMENTS, "truncate_prompt_tokens": -1, "max_tokens_per_query": 0, "max_tokens_per_doc": 0,
                        "truncation_side": "right"},
    "limits that are null": {**DOCUMENTS, "truncate_prompt_tokens": None, "max_tokens_per_query": None},
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_texts_and_a_query_whatever_they_are_called(served: Served, name: str) -> None:
    answer = ok(served, "/v1/rerank", BODIES[name])
    assert order(answer["results"]) == BEST_FIRST
    assert [result["relevance_score"] for result in answer["results"]] == [SCORES[index] for index in BEST_FIRST]


def test_parts_of_a_document_are_joined_and_a_picture_is_refused_with_its_place(served: Served) -> None:
    parts = [{"type": "text", "text": "1"}, {"type": "text", "text": "3"}]
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    answer = ok(served, "/v1/rerank", {"query": QUERY, "documents": [parts, "2"], "return_documents": True})
    assert order(answer["results"]) == [0, 1]
    assert answer["results"][0]["document"]["text"] == "1\n3"
    for documents, place in ([parts, [parts[0], picture]], "documents[1][1]"), ([{"content": [picture]}], "[0]"):
        assert place in refused(served, {"query": QUERY, "documents": documents})


@pytest.mark.parametrize(("body", "named"), [({"query": "q"}, ("documents", "texts", "passages", "docs")),
                                             ({"documents": []}, ("query", "text_1", "data_1"))])  # fmt: skip
def test_a_missing_key_is_answered_with_those_that_would_do(
    served: Served, body: dict[str, Any], named: tuple[str, ...]
) -> None:
    message = refused(served, body)
    assert all(name in message for name in named), message


def test_a_byte_order_mark_is_skipped(served: Served) -> None:
    """PowerShell and Windows' editors write one."""
    assert order(ok(served, "/rerank", b"\xef\xbb\xbf" + json.dumps(DOCUMENTS).encode())["results"]) == BEST_FIRST


def test_half_a_character_costs_nobody_the_list(served: Served) -> None:
    """OpenClaw and qmd cut passages in the middle of an emoji."""
    body = {"query": "q \ud83d", "documents": ["1", "3 \ud83d", "2"], "return_documents": True}
    status, answer, headers = post(served, "/v1/rerank", body)
    assert (status, headers["X-Rerank-Replaced"]) == (200, "1")
    assert order(answer["results"]) == BEST_FIRST
    assert [result.get("replaced") for result in answer["results"]] == [True, None, None]
    assert answer["results"][0]["document"]["text"] == "3 \ufffd"
    status, answer, headers = post(served, "/rerank", {"query": "q", "passages": ["\udc00 1", "3"]})
    assert (status, answer, headers["X-Rerank-Replaced"]) == (200, [SCORES[0], SCORES[1]], "0")


def test_limits_do_what_they_say(served: Served) -> None:
    def best(text: str, **fields: Any) -> float:
        body = {"query": QUERY, "documents": [text], "raw_scores": True, **fields}
        return float(ok(served, "/v1/rerank", body)["results"][0]["relevance_score"])

    long = "1 " * 300 + "5"
    assert (best(long), best(long, truncation_side="left")) == (1, 5)
    assert best(long, max_chunks_per_doc=100) == 5
    assert best(long, max_chunks_per_doc=1) == 1
    assert best(long, max_chunks_per_doc=100, overlap_tokens=5) == 5
    assert best("1 1 1 7", max_tokens_per_doc=3) == 1
    assert best("1 " * 28 + "7", truncate_prompt_tokens=32) == 1
    long_query = {"query": "w " * 40, "documents": ["1 " * 40 + "7"], "raw_scores": True}
    for limit, expected in ((None, 1), (5, 7)):  # a shorter query leaves the passage more room
        answer = ok(served, "/v1/rerank", {**long_query, "max_tokens_per_query": limit})
        assert answer["results"][0]["relevance_score"] == expected


@pytest.mark.parametrize("fields", [{"top_n": 0}, {"top_k": 0}, {"truncate_prompt_tokens": 5},
                                    {"truncation_side": "up"}, {"max_tokens_per_query": "few"},
                                    {"max_chunks_per_doc": "x"},
                                    {"overlap_tokens": -1}, {"max_tokens_per_doc": -2}], ids=str)  # fmt: skip
def test_what_cannot_be_done_is_refused_and_named(served: Served, fields: dict[str, Any]) -> None:
    assert f"'{next(iter(fields))}'" in refused(served, {**DOCUMENTS, **fields})


# -- What an answer holds: small models of the clients' own parsers ----------------------------------------------------


def elastic(answer: Any) -> list[int]:
    """HuggingFaceRerankResponseEntity: any other key is an error."""
    assert all(item.keys() <= {"index", "score", "text"} for item in answer)
    return order(answer)


def ragflow_xinference(answer: Any) -> list[int]:
    assert answer["meta"]["tokens"]["input_tokens"] > 0
    assert answer["meta"]["tokens"]["output_tokens"] == 0
    return order(answer["results"])


def lightrag(answer: Any) -> list[int]:
    return [item["index"] for item in answer["results"] if item["relevance_score"] > 0]


def voyage(answer: Any) -> list[int]:
    assert all(isinstance(item.get("document", ""), str) for item in answer["data"])
    assert answer["usage"]["total_tokens"] > 0
    return order(answer["data"])


def nvidia(answer: Any) -> list[int]:
    assert answer.keys() == {"rankings"}
    assert all(item.keys() == {"index", "logit"} for item in answer["rankings"])
    assert [item["logit"] for item in answer["rankings"]] == [3, 2, 1]
    return order(answer["rankings"])


def by_score(scores: list[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda index: -scores[index])


def weaviate(answer: Any) -> list[int]:
    assert [item["document"] for item in answer["scores"]] == TEXTS
    return by_score([item["score"] for item in answer["scores"]])


def khoj(answer: Any) -> list[int]:
    return by_score(answer["scores"])


def dashscope(answer: Any) -> list[int]:
    assert isinstance(answer["request_id"], str)
    return order(answer["output"]["results"])


OBJECTS = [{"text": text} for text in TEXTS]
CLIENTS: dict[str, tuple[str, dict[str, Any], Callable[[Any], list[int]]]] = {
    "Elastic inference": ("/", {"query": QUERY, "texts": TEXTS, "return_text": True, "top_n": 3}, elastic),
    "huggingface.js": ("/", {"inputs": {"query": QUERY, "texts": TEXTS}}, elastic),
    "RAGFlow, Xinference": ("/v1/rerank", {**DOCUMENTS, "return_documents": "true", "return_len": "true"},
                            ragflow_xinference),
    "RAGFlow, SiliconFlow": ("/v1/rerank", {**DOCUMENTS, "return_documents": False, "max_chunks_per_doc": 1024,
                                            "overlap_tokens": 80}, ragflow_xinference),
    "LightRAG": ("/rerank", {**DOCUMENTS, "model": "m", "top_k": 3, "return_documents": True}, lightrag),
    "SGLang": ("/v1/rerank", {**DOCUMENTS, "top_k": 3, "rid": "7"}, lightrag),
    "Voyage": ("/v1/rerank", {**DOCUMENTS, "model": "rerank-2", "top_k": 3, "truncation": True,
                              "return_documents": True}, voyage),
    "langchain-nvidia": ("/v1/ranking", {"model": "m", "query": {"text": QUERY}, "passages": OBJECTS,
                                         "truncate": "END"}, nvidia),
    "RAGFlow, NVIDIA": ("/reranking", {"model": "m", "query": {"text": QUERY}, "passages": OBJECTS, "truncate": "END",
                                       "top_n": 3}, nvidia),
    "Weaviate": ("/rerank", {**DOCUMENTS, "property": "text"}, weaviate),
    "khoj": ("/", {"inputs": {"query": QUERY, "passages": OBJECTS}}, khoj),
    "DashScope": ("/api/v1/services/rerank/text-rerank/text-rerank",
                  {"model": "m", "input": DOCUMENTS, "parameters": {"top_n": 3, "return_documents": True}}, dashscope),
}  # fmt: skip


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_reads_the_ranking(served: Served, name: str) -> None:
    path, body, read = CLIENTS[name]
    assert read(ok(served, path, body)) == BEST_FIRST


def test_a_strict_client_gets_more_only_when_it_asks_in_this_servers_words(served: Served) -> None:
    body = {"query": QUERY, "texts": ["1", "3 " * 100, "2"]}
    assert all(item.keys() == {"index", "score"} for item in ok(served, "/rerank", body))
    more = ok(served, "/rerank", {**body, "on_overflow": "truncate"})
    assert more[0]["model"] == "fake-m3"
    assert more[0]["truncated"] is True


@pytest.mark.parametrize("body", [{"query": QUERY, "texts": [3]}, {"query": QUERY, "documents": [3], "property": "t"}])
def test_teis_and_weaviates_clients_read_an_error_as_a_string(served: Served, body: dict[str, Any]) -> None:
    status, answer, _ = post(served, "/rerank", body)
    assert (status, type(answer["error"])) == (400, str)


def test_documents_come_back_with_their_other_fields(served: Served) -> None:
    documents = [{"text": "1", "title": "one", "meta": {"page": 4}}, {"content": "3", "url": "u"}, "2"]
    answer = ok(served, "/v1/rerank", {"query": QUERY, "documents": documents, "return_documents": True})
    shown = {result["index"]: result["document"] for result in answer["results"]}
    assert shown == {0: documents[0], 1: {"content": "3", "url": "u", "text": "3"}, 2: {"text": "2"}}


@pytest.mark.parametrize("id", ["a", 7, 1.5, True, None, ["a"], {"a": 1}], ids=repr)
def test_an_id_of_any_kind_does_no_harm(served: Served, id: Any) -> None:
    documents = [{"text": "1", "id": id}, {"text": "3", "id": "b"}]
    answer = ok(served, "/v1/rerank", {"query": QUERY, "documents": documents})
    assert [result.get("id") for result in answer["results"]] == ["b", id]


@pytest.mark.parametrize(("origin", "allowed"), [("https://app.example.com", "true"), ("https://other.example", None)])
def test_a_page_may_reach_into_a_private_network_only_from_an_allowed_origin(
    served: Served, origin: str, allowed: str | None
) -> None:
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST",
               "Access-Control-Request-Private-Network": "true"}  # fmt: skip
    status, _, answer = served.request("OPTIONS", "/v1/rerank", None, **headers)
    assert (status, answer["Access-Control-Allow-Private-Network"]) == (204, allowed)
