"""What an operator relies on: readiness, metrics, headers, the log, stopping."""

from __future__ import annotations

import json
import logging
import re
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Gguf
from prometheus_client.parser import text_string_to_metric_families
from server_process import ServerProcess
from test_http import FakeEngine, Running
from test_load import WAIT_S, until

import rerank_server as server


class Operated(Running):
    """gemma is there too, and both loads can be held."""

    def __init__(self, **changes: Any) -> None:
        self.may_load = threading.Event()
        self.may_load.set()
        super().__init__(with_gemma=True, **changes)

    def _load_m3(self, *_: Any) -> Any:
        return self._loaded(self.engine)

    def _loaded(self, engine: FakeEngine) -> FakeEngine:
        assert self.may_load.wait(WAIT_S)
        return engine

    def _load_gemma(self, path: Path, settings: server.Settings, is_alone: bool = False) -> Any:  # type: ignore[override]
        return self._loaded(FakeEngine())

    def metrics(self) -> dict[str, float]:
        """`name{label values, by the labels' names}` -> value."""
        status, text = self.page("/metrics")
        assert status == 200
        return {
            f"{sample.name}{{{','.join(value for _, value in sorted(sample.labels.items()))}}}": sample.value
            for family in text_string_to_metric_families(text) for sample in family.samples
        }  # fmt: skip

    def page(self, path: str) -> tuple[int, str]:
        answer = self.raw(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode()).decode()
        return int(answer.split()[1]), answer.partition("\r\n\r\n")[2]

    def close(self) -> None:
        self.may_load.set()
        super().close()


@pytest.fixture
def operated() -> Iterator[Operated]:
    fixture = Operated()
    yield fixture
    fixture.close()


NATIVE: dict[str, Any] = {"query": "a secret query", "passages": ["a secret passage", "b", "b", "long " * 300]}


def test_metrics_count_what_was_served(operated: Operated) -> None:
    for _ in range(2):
        assert operated.rerank(NATIVE)[0] == 200
    assert operated.rerank({"query": "q"})[0] == 400
    assert operated.request("GET", "/no/such/path")[0] == 404
    found = operated.metrics()
    assert found["rerank_requests_total{/rerank,200}"] == 2
    assert found["rerank_requests_total{/rerank,400}"] == 1
    assert found["rerank_requests_total{other,404}"] == 1, "a path of a client's own would be a series without end"
    assert found["rerank_request_seconds_count{/rerank}"] == 3
    assert found["rerank_pairs_total{m3}"] == 3, "equal pairs are scored once"
    assert found["rerank_tokens_total{m3}"] == (1 + 3) + (1 + 1) + (1 + 300)
    assert found["rerank_cache_hits_total{m3}"] == 3
    assert found["rerank_truncated_passages_total{m3}"] == 2
    assert found["rerank_queue_tokens{m3}"] == found["rerank_queue_requests{m3}"] == 0
    for name in ("queue_seconds", "tokenise_seconds", "inference_seconds"):
        assert found[f"rerank_{name}_count{{m3}}"] == 2, name
    assert found["rerank_batch_fill_ratio_count{m3}"] == 2
    assert found["rerank_model_loaded{m3}"] == 1
    assert found["rerank_model_loaded{gemma}"] == 0
    assert found["rerank_resident_bytes{}"] > 1e6
    assert found["rerank_model_info{fake-m3.gguf,cross-encoder,F32,m3}"] == 1


def test_metrics_show_what_waits_and_what_failed(operated: Operated) -> None:
    operated.engine.block.clear()
    operated.engine.fail = RuntimeError("no")
    asking = threading.Thread(target=operated.rerank, args=({"query": "q", "passages": ["w " * 63, "w " * 62]},))
    asking.start()
    until(lambda: operated.m3.queue.n_tokens() == 63)
    found = operated.metrics()
    assert (found["rerank_queue_tokens{m3}"], found["rerank_queue_requests{m3}"]) == (63, 1)
    operated.engine.block.set()
    asking.join()
    assert operated.metrics()["rerank_failed_batches_total{m3}"] == 1


def test_the_table_in_operating_md_names_every_metric(operated: Operated) -> None:
    operating = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `(rerank_\w+)` \|", operating, re.MULTILINE))
    assert set(re.findall(r"^# TYPE (\w+)(?<!_created) ", operated.page("/metrics")[1], re.MULTILINE)) == rows


def test_each_answer_has_an_id_and_its_times(operated: Operated) -> None:
    body = json.dumps(NATIVE).encode()
    for method, path, raw in (("POST", "/rerank", body), ("POST", "/rerank", b"{"), ("GET", "/health", None),
                              ("GET", "/nothing", None)):  # fmt: skip
        _, _, headers = operated.request(method, path, raw, **{"X-Request-Id": "from-the-client"})
        assert headers["X-Request-Id"] == "from-the-client"
        times = dict(part.split(";dur=") for part in headers["Server-Timing"].split(", "))
        assert list(times) == ["queue", "tokenise", "inference", "total"]
        assert all(float(value) >= 0 for value in times.values())
    made = {operated.request("GET", "/health")[2]["X-Request-Id"] for _ in range(3)}
    assert len(made) == 3
    assert b"X-Request-Id: " in operated.raw(b"no HTTP\r\n\r\n")


@pytest.mark.parametrize("given", ["", "two words", "x" * 129, "caf\xe9", "tab\there"])
def test_an_id_that_could_harm_a_log_is_replaced(operated: Operated, given: str) -> None:
    _, _, headers = operated.request("GET", "/health", None, **{"X-Request-Id": given})
    assert re.fullmatch("[0-9a-f]{32}", headers["X-Request-Id"])


def formatted(records: list[logging.LogRecord], kind: str) -> list[str]:
    formatter = server.LogFormatter(kind)
    return [formatter.format(record) for record in records if hasattr(record, "fields")]


@pytest.mark.parametrize("log_texts", [False, True])
def test_one_line_for_each_request_with_its_texts_only_when_asked_for(
    log_texts: bool, caplog: pytest.LogCaptureFixture
) -> None:
    operated = Operated(log_texts=log_texts)
    caplog.set_level(logging.DEBUG)
    body = json.dumps(NATIVE).encode()
    operated.request("POST", "/rerank", body, **{"X-Request-Id": "abc"})
    operated.request("POST", "/rerank", body.replace(b"300", b"300") + b"x")
    operated.close()
    whole = "\n".join([*formatted(caplog.records, "json"), *(record.getMessage() for record in caplog.records)])
    assert ("secret" in whole) == log_texts
    first, second = map(json.loads, formatted(caplog.records, "json"))
    assert {**first, "id": "abc", "status": 200, "pairs": 4, "path": "/rerank", "method": "POST"} == first
    assert {"time", "level", "message", "tokens", "queue_ms", "tokenise_ms", "inference_ms", "total_ms"} <= first.keys()
    assert (second["status"], second["pairs"]) == (400, 0)
    line = formatted(caplog.records, "text")[0]
    assert line.count("\n") == 0
    assert re.search(r"POST /rerank 200 id=abc pairs=4 tokens=\d+ queue_ms=.* total_ms=", line)


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), BrokenPipeError(), TimeoutError()])
def test_an_operating_system_error_inside_the_application_is_500_with_a_log_line_and_a_metric(
    operated: Operated, failure: OSError, caplog: pytest.LogCaptureFixture
) -> None:
    """Would break: a full disk looks like a client that hung up; no answer, no line, no count."""
    def fail(raw: bytes, call: server.Call) -> server.Response:
        raise failure

    operated.server.application.routes["/health"]["GET"] = fail
    status, answer, headers = operated.request("GET", "/health")
    assert (status, answer["error_type"]) == (500, "engine_error")
    assert headers["Connection"] == "keep-alive", "the request was read to its end"
    assert "No space left" not in json.dumps(answer)
    assert any("GET /health failed" in record.getMessage() for record in caplog.records)
    assert operated.metrics()["rerank_requests_total{/health,500}"] == 1


def test_not_ready_while_the_model_loads_and_alive_all_the_time(operated: Operated) -> None:
    """Would break: a load balancer sends requests to a server that cannot answer them yet."""
    operated.may_load.clear()
    operated.m3.start()
    assert operated.request("GET", "/ready")[0] == 503
    assert operated.request("GET", "/health")[0] == 200
    status, answer, _ = operated.rerank({"query": "q", "passages": ["a"], "timeout": 0.3})
    assert (status, answer["error_type"]) == (504, "deadline_exceeded"), "a load may take longer than a client waits"
    operated.may_load.set()
    assert operated.rerank({"query": "q", "passages": ["a"]})[0] == 200
    assert operated.request("GET", "/ready")[:2] == (200, {"status": "ready"})


def test_not_ready_while_stopping_and_open_without_a_key() -> None:
    operated = Operated(api_key="sesame")
    operated.m3.start().result()
    assert operated.request("GET", "/ready")[0] == 200
    assert operated.request("GET", "/metrics")[0] == 401
    operated.server.application.is_stopping = True
    assert operated.request("GET", "/ready")[0] == 503
    assert operated.request("GET", "/health")[0] == 200
    operated.close()


def test_an_engine_that_hangs_does_not_hold_up_the_stop_for_ever(operated: Operated) -> None:
    operated.engine.block.clear()
    assert operated.rerank({"query": "q", "passages": ["a"], "timeout": 0.2})[0] == 504
    assert operated.m3.close(timeout_s=0.1) is False
    assert operated.rerank({"query": "q", "passages": ["a"]})[0] == 503


@pytest.mark.parametrize("held", ["decode", "load"])
def test_what_is_not_done_when_the_stopping_time_is_over_is_refused_and_not_cut_off(held: str) -> None:
    """Would break: a client whose connection just ends cannot tell whether to ask again elsewhere."""
    operated = Operated()
    (operated.engine.block if held == "decode" else operated.may_load).clear()
    answers: list[tuple[int, Any]] = []
    body = {"query": "q", "passages": ["a"]}
    asking = threading.Thread(target=lambda: answers.append(operated.rerank(body)[:2]))
    asking.start()
    until(operated.m3.queue.n_requests)
    assert operated.server.drain(0.1) is False
    asking.join()
    assert (answers[0][0], answers[0][1]["error_type"]) == (503, "model_unavailable")
    assert "stopped before" in answers[0][1]["message"]
    operated.engine.block.set()
    operated.may_load.set()
    assert operated.m3.close(WAIT_S)


def test_a_process_that_may_not_wait_any_longer_stops_with_status_0(gguf_of: Gguf) -> None:
    process = ServerProcess("--m3", gguf_of("xlmr"), "--threads", "1", "--drain-s", "0")
    answers: list[tuple[int, Any]] = []
    body: dict[str, Any] = {"query": "which?", "passages": [f"passage {n}" for n in range(100_000)]}
    asking = threading.Thread(target=lambda: answers.append(process.rerank(**body)[:2]))
    asking.start()
    until(lambda: urllib.request.urlopen(f"{process.url}/metrics").read().count(b'requests{role="m3"} 1.0'))
    assert process.stop() == 0
    asking.join()
    assert (answers[0][0], answers[0][1]["error_type"]) == (503, "model_unavailable")


def test_a_process_logs_json(gguf_of: Gguf) -> None:
    files = ("--m3", gguf_of("bi"), "--gemma", gguf_of("gemma"), "--threads", "1")
    process = ServerProcess(*files, "--log-format", "json")
    body: dict[str, Any] = {"query": "which?", "passages": ["this", "that one"], "use_llm": True}
    first = process.rerank(**body)[1]
    assert process.rerank(**{**body, "passages": ["that one", "this", "x"]})[1][:2] == pytest.approx(first[::-1])
    assert process.stop() == 0
    lines = [json.loads(line) for line in process.log.splitlines()]
    assert any("gemma: loaded in" in line["message"] for line in lines)
    assert sum(line.get("path") == "/rerank" for line in lines) == 2
