"""Requests made from the OpenAPI document, and damaged HTTP: no answer is a failure, and none is missing.

Short here; RERANK_FUZZ=20 tries 20 times as much. The counts are at the end of the test report.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import fuzz_http
import hypothesis
import pytest
import requests
import schemathesis
from conftest import FUZZED
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks
from test_contracts import Served

FACTOR = int(os.environ.get("RERANK_FUZZ", "1"))
N_EXAMPLES = 20 * FACTOR  # for each route, of bodies that fit the document and of bodies that do not
SOCKET_SECONDS, COMPARE_SECONDS = 4 * FACTOR, 3 * FACTOR
# Tries of SEED at most, so that a faster machine meets none that was not tried before; `fuzz_http.py` looks for more.
SOCKET_TRIES, COMPARE_TRIES = 4_000 * FACTOR, 10_000 * FACTOR
SEED = 20261123

# Not negative_data_rejection: unknown fields of a document are left alone whatever they hold. Not
# positive_data_acceptance: that `ids` is as long as the list cannot be said in a schema.
CHECKS = [checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance,
          checks.response_headers_conformance]  # fmt: skip


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    fixture = Served(max_body_mb=1)
    yield fixture
    fixture.close()


@pytest.fixture(scope="module")
def operations(served: Served) -> list[Any]:
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{served.port}/openapi.json")
    return [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_requests_made_from_the_document_get_the_answers_that_it_describes(
    operations: list[Any], mode: GenerationMode
) -> None:
    session, counts = requests.Session(), FUZZED[f"requests from the OpenAPI document, {mode.value}"]

    def send(case: Any) -> None:
        answer = case.call(session=session)
        counts["requests"] += 1
        counts[f"answered {answer.status_code}"] += 1
        # 504: some ask for an answer within no time at all. The fakes serve both roles, so no 503.
        assert answer.status_code < 500 or answer.status_code == 504, (case.as_curl_command(), answer.text)
        case.validate_response(answer, checks=CHECKS)

    limits = hypothesis.settings(
        max_examples=N_EXAMPLES, deadline=None, database=None, derandomize=FACTOR == 1,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    asked = [one for one in operations if one.method == "post"]
    assert len(asked) >= 5
    for operation in asked:
        given: Any = hypothesis.given(operation.as_strategy(mode))
        limits(given(send))()
    assert counts["answered 400" if mode is GenerationMode.NEGATIVE else "answered 200"] > counts["requests"] / 3


def test_damaged_http_is_refused_and_good_requests_before_it_are_answered() -> None:
    counts = fuzz_http.run(SEED, SOCKET_SECONDS, SOCKET_TRIES)
    FUZZED["HTTP over sockets"].update(counts)
    assert counts["connections"] > 100
    assert counts["answers 400"] > 100


def test_no_request_is_seen_that_another_reader_of_http_does_not_see() -> None:
    counts = fuzz_http.compare(SEED, COMPARE_SECONDS, COMPARE_TRIES)
    FUZZED["HTTP, against h11"].update(counts)
    assert counts["requests read by both"] > 100
