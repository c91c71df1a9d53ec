"""The OpenAPI document: valid, complete, and true: what it says is what the server does."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from server_process import ServerProcess
from test_contracts import ALL, LONG, Contract, Served, for_all, send

import rerank_server

Document = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    fixture = Served(max_body_mb=1)
    yield fixture
    fixture.close()


@pytest.fixture(scope="module")
def document(served: Served) -> Document:
    status, answer, _ = served.request("GET", "/openapi.json")
    assert status == 200
    found: Document = answer
    return found


def check(document: Document, schema: dict[str, Any], value: Any) -> None:
    """Raises jsonschema.ValidationError. schema may refer to the document's components."""
    Draft202012Validator({**schema, "components": document["components"]}).validate(value)


def operations(document: Document) -> list[tuple[str, str, dict[str, Any]]]:
    return [(path, method, one) for path, methods in document["paths"].items() for method, one in methods.items()]


def json_of(part: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = part["content"]["application/json"]
    return found


def examples(document: Document) -> list[tuple[str, str, Any]]:
    """(path, contract, body) of every example of every POST route."""
    bodies = [(path, json_of(one["requestBody"])) for path, _, one in operations(document) if "requestBody" in one]
    named = [(path, name, example["value"]) for path, body in bodies for name, example in body["examples"].items()]
    return [(path, name.split()[0], value) for path, name, value in named]


def test_the_document_is_valid_openapi_3_1(document: Document) -> None:
    assert document["openapi"].startswith("3.1")
    validate(document)


def test_every_post_describes_its_body_and_has_an_example(document: Document) -> None:
    for path, method, one in operations(document):
        if method == "post":
            assert json_of(one["requestBody"])["schema"], path
            assert any(path == route for route, _, _ in examples(document)), path


def test_the_committed_files_are_what_the_code_makes() -> None:
    """Would break: a field is added to the server, and the document goes on without it."""
    command = [sys.executable, "docs/openapi.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_route_is_in_it_and_nothing_else(served: Served, document: Document) -> None:
    described = {(path, method.upper()) for path, method, _ in operations(document)}
    routes = {(path, method) for path, methods in served.server.application.routes.items() for method in methods}
    assert {(rerank_server.endpoint_of(method, path), method) for path, method in described} == routes
    assert routes <= described
    status, refusal, _ = served.request("GET", "/nothing")
    assert (status, f"http://127.0.0.1:{served.port}/v1" in refusal["message"]) == (404, True)


def test_a_lone_copy_of_the_server_has_neither(tmp_path: Path) -> None:
    application = rerank_server.Application(*lone_parts(), web=tmp_path)
    for answer in (application.openapi, application.docs):
        with pytest.raises(rerank_server.HttpError, match=r"beside rerank_server\.py") as refused:
            answer(b"", rerank_server.Call())
        assert refused.value.status == 404


def lone_parts() -> tuple[rerank_server.Roles, rerank_server.Settings]:
    settings = rerank_server.Settings(models=str(ROOT / "models"))
    return rerank_server.Roles(*rerank_server.find_roles(settings)), settings


def test_every_example_is_answered_as_the_document_says(document: Document, tiny_server: ServerProcess) -> None:
    sent = examples(document)
    assert {path for path, _, _ in sent} >= {"/rerank", "/v1/rerank", "/v2/rerank", "/score"}
    assert {name for _, name, _ in sent} == rerank_server.CONTRACTS.keys()
    for path, name, body in sent:
        status, answer, _ = tiny_server.rerank(path, **body)
        assert status == 200, (path, name, answer)
        check(document, {"$ref": f"#/components/schemas/{name}_response"}, answer)
        check(document, {"$ref": f"#/components/schemas/{name}_request"}, body)
    assert any(body.get("use_llm") or "gemma" in str(body.get("model")) for _, _, body in sent), "one asks for gemma"


def test_the_examples_of_the_schemas_are_sendable_too(document: Document, tiny_server: ServerProcess) -> None:
    schemas = {name: schema for name, schema in document["components"]["schemas"].items() if name.endswith("_request")}
    routes = {name: path for path, name, _ in examples(document)}
    for name, schema in schemas.items():
        assert schema["examples"], name
        for body in schema["examples"]:
            assert tiny_server.rerank(routes[name.removesuffix("_request")], **body)[0] == 200, (name, body)


def named_in(contract: Contract) -> str:
    return "jina" if contract.name.startswith("cohere") else contract.name


@for_all
def test_each_field_of_a_request_is_one_that_is_read(served: Served, document: Document, contract: Contract) -> None:
    """A property that the parser does not know would be ignored; a known one refuses an object in its place."""
    schema = document["components"]["schemas"][f"{named_in(contract)}_request"]
    for name in schema["properties"]:
        body = {**contract.body(["1"]), name: {"no": "such value"}}
        status, answer, _ = served.request("POST", contract.route, json.dumps(body).encode())
        assert (status, f"'{name}'" in answer["message"]) == (400, True), name
    for name in schema["properties"].keys() - set(schema["required"]):
        assert schema["properties"][name]["description"], name


@for_all
def test_what_the_server_takes_is_what_the_schema_takes(served: Served, document: Document, contract: Contract) -> None:
    schema = document["components"]["schemas"][f"{named_in(contract)}_request"]
    optional = schema["properties"].keys() - set(schema["required"])
    nulls = dict.fromkeys(optional - ({"top_n"} if contract.name == "voyage" else set()))
    one = contract.body(["1"])
    bodies = [one, contract.body([]), {**one, "unknown": 1}, {**one, **nulls}]
    if contract.name != "native":
        bodies += [contract.body([{"text": "1", "id": 3, "title": "x"}, "2"])]
    parts = [{"type": "text", "text": "1"}, {"content": "2"}]
    bodies += [contract.body([{"text": None, "page_content": "1"}, parts]),
               {**one, "max_length": "100", "raw_scores": "True", "max_tokens_per_query": -1, "timeout": "20"},
               {**one, "truncation_side": "LEFT", "overlap_tokens": 2.0, "truncate_prompt_tokens": 0}]  # fmt: skip
    if contract.name != "score":
        bodies += [{**one, contract.query: parts}]
    if contract.name == "score":
        bodies += [{"text_1": "a", "text_2": "b"}, {"text_1": ["a"], "text_2": ["b"]},
                   {"queries": "a", "documents": ["b"]}, {"queries": ["a"], "documents": [{"text": "b"}]}]  # fmt: skip
    for body in bodies:
        assert served.request("POST", contract.route, json.dumps(body).encode())[0] == 200, body
        check(document, schema, body)
    wrong: tuple[dict[str, Any], ...] = (
        {contract.query: 3}, {contract.texts: [{"title": "x"}]}, {"max_length": 9000}, {"max_length": "x"},
        {"truncation_side": "up"}, {"raw_scores": "yes"}, {"timeout": 0},
    )  # fmt: skip
    for fields in wrong:
        body = {**one, **fields}
        assert served.request("POST", contract.route, json.dumps(body).encode())[0] == 400, body
        with pytest.raises(Exception, match=r"is not of type|is not valid under any"):
            check(document, schema, body)


def undescribed(schema: dict[str, Any], value: Any, where: str = "") -> list[str]:
    """Keys of an answer that its schema does not mention."""
    if isinstance(value, list):
        return [key for item in value for key in undescribed(schema.get("items", {}), item, f"{where}[]")]
    if not isinstance(value, dict):
        return []
    known = schema.get("properties", {})
    missing = [f"{where}.{name}" for name in value if name not in known]
    for name in value.keys() & known.keys():
        missing += undescribed(known[name], value[name], f"{where}.{name}")
    return missing


@for_all
def test_the_longest_answer_has_nothing_that_its_schema_does_not_name(
    served: Served, document: Document, contract: Contract
) -> None:
    schema = document["components"]["schemas"][f"{named_in(contract)}_response"]
    fields: dict[str, Any] = {"return_documents": True, "ids": ["a", 2], "model": "m3"}
    status, answer, _ = send(served, contract, ["1\ud800", LONG], **fields)
    assert status == 200
    check(document, schema, answer)
    assert undescribed(schema, answer) == []


@for_all
def test_refusals_are_as_described(served: Served, document: Document, contract: Contract) -> None:
    answers = [send(served, contract, [3]), served.request("POST", contract.route, b"x" * 2_000_000)]
    for status, answer, _ in answers:
        described = document["paths"][contract.route]["post"]["responses"][str(status)]
        check(document, json_of(described)["schema"], answer)


def test_get_routes_answer_as_described(document: Document, tiny_server: ServerProcess) -> None:
    for path, method, one in operations(document):
        if method == "get":
            with urllib.request.urlopen(f"{tiny_server.url}{path}", timeout=30) as answer:
                kind, body = answer.headers.get_content_type(), answer.read()
            described = one["responses"]["200"]["content"]
            assert kind in described, path
            if kind == "application/json":
                check(document, described[kind]["schema"], json.loads(body))
                assert described[kind]["schema"], f"{path} is not described"


def test_the_page_needs_no_network_and_names_every_field(document: Document, tiny_server: ServerProcess) -> None:
    with urllib.request.urlopen(f"{tiny_server.url}/docs", timeout=30) as answer:
        page = answer.read().decode()
    (policy,) = re.findall('<meta http-equiv="Content-Security-Policy" content="(.*?)">', page)
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy
    assert "style=" not in page, "the policy would drop it"
    assert not re.findall(r"""(?:src|href|url|@import)\s*[=(]?\s*["']?\s*(?:https?:)?//""", page)
    assert "<script" not in page
    for name, schema in document["components"]["schemas"].items():
        if name.endswith("_request"):
            assert name.removesuffix("_request") in page
            assert all(field in page for field in schema["properties"]), name
    assert all(contract.route in page for contract in ALL)
    assert page.count("<h2") >= 2
