"""Under load and faults: whose turn it is, what is refused, given up or dropped, and that others do not notice."""

from __future__ import annotations

import gc
import http.client
import itertools
import json
import math
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
from conftest import ARCHITECTURES, FUZZED, ROOT, Gguf
from test_http import FakeEngine, FakePairs, Running, sigmoid

import rerank_server as server

WAIT_S = 20


def until(condition: Callable[[], object]) -> None:
    """Waits for what another thread does."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def pair(n_tokens: int, tag: int, prefix: Sequence[int] = ()) -> server.Pair:
    ids = (*prefix, tag, *range(n_tokens - 1))
    return server.Pair(ids, 1, 0, n_shared=len(prefix))


class Loaded:
    """A queue with groups in it, without threads: next() is what the engine would get."""

    def __init__(self, max_tokens: int = 100_000) -> None:
        self.queue = server.Queue(max_tokens)
        self.stack, self.groups = ExitStack(), list[server.Job]()

    def group(self, *pairs: server.Pair) -> server.Job:
        self.groups.append(self.stack.enter_context(self.queue.admit(0)))
        self.queue.append(self.groups[-1], pairs, left=0)
        return self.groups[-1]

    def next(self, max_tokens: int = 64, max_sequences: int = 8) -> list[server.Entry]:
        """Empty: nothing waits."""
        if not any(group.waiting for group in self.groups):
            return []
        return self.queue.next_batch(max_tokens, max_sequences)


def test_a_short_request_waits_for_one_decode_of_a_long_one() -> None:
    """Would break: a user with five passages waits until somebody else's thousand are done."""
    loaded = Loaded()
    long = loaded.group(*(pair(60, n) for n in range(1000)))
    loaded.next()
    short = loaded.group(*(pair(60, -n) for n in range(1, 4)))
    turns = [{entry.job for entry in loaded.next()} for _ in range(6)]
    assert sum(short in groups for groups in turns) == 3
    assert sum(long in groups for groups in turns) == 3


def test_a_short_requests_decode_is_shared_with_as_much_again_of_short_ones_and_no_more() -> None:
    """Would break: five tokens of a user's wait for a decode of 512 of somebody else's."""
    loaded = Loaded()
    short = loaded.group(pair(12, 1))
    loaded.group(*(pair(6, n) for n in range(2, 100)))
    other = loaded.group(*(pair(6, n) for n in range(100, 110)))
    batch = loaded.next()
    assert [entry.job for entry in batch] == [short, other, other]


@pytest.mark.parametrize("n_tokens", [5, 12, 26, 50, 86, 128, 216, 500])
@pytest.mark.parametrize("n_passages", [1, 5, 30])
def test_beside_a_long_request_a_short_one_is_done_after_three_times_its_own_tokens(
    n_tokens: int, n_passages: int
) -> None:
    """Counts what the engine computes, beside the decode that was running, which the short request cannot avoid."""
    loaded = Loaded(10_000_000)
    loaded.group(*(pair(n_tokens, n) for n in range(1, 1001)))
    loaded.next(256, 64)
    short = loaded.group(*(pair(n_tokens, -n) for n in range(1, n_passages + 1)))
    n_computed = 0
    while short.waiting:
        n_computed += sum(entry.pair.n_new for entry in loaded.next(256, 64))
    assert n_computed < 3 * n_tokens * n_passages


def test_a_long_request_gets_its_turns_however_many_short_ones_arrive() -> None:
    """One more with every decode, which is more than can be done: turns come at ever longer intervals for all."""
    loaded = Loaded()
    long = loaded.group(*(pair(60, n) for n in range(1000)))
    loaded.next()
    served = 0
    for n in range(1, 21):
        loaded.group(pair(60, -n))
        served += loaded.next()[0].job is long
    assert served == 5


def test_equal_requests_share_decodes_longest_pairs_first() -> None:
    loaded = Loaded()
    for start in (0, 100):
        loaded.group(*(pair(length, start + length) for length in (4, 30, 8)))
    assert [entry.pair.n_new for entry in loaded.next()] == [30, 8, 4, 8, 4]
    assert [entry.pair.n_new for entry in loaded.next()] == [30]


def test_a_decode_has_one_prefix() -> None:
    """Would break: gemma computes a query's prefix more often than there are turns."""
    loaded = Loaded()
    loaded.group(pair(9, 1, [7, 7]), pair(9, 2, [8]), pair(5, 3, [7, 7]), pair(5, 4, [8]))
    loaded.group(pair(5, 5, [7, 7]), pair(5, 6, [9]))
    prefixes = []
    while batch := loaded.next():
        prefixes.append({entry.pair.prefix for entry in batch})
    assert all(len(prefix) == 1 for prefix in prefixes)
    assert len(prefixes) == 3


def test_what_waits_is_bounded_and_one_request_takes_half_of_it_at_most() -> None:
    loaded = Loaded(max_tokens=1000)
    with loaded.queue.admit(1_000_000), loaded.queue.admit(500):
        with pytest.raises(server.OverloadedError) as refused, loaded.queue.admit(1):
            pass
        assert refused.value.headers["Retry-After"] == "1"
    with loaded.queue.admit(1):
        pass


def test_retry_after_follows_from_what_the_engine_scored_lately() -> None:
    loaded = Loaded(max_tokens=1000)
    loaded.group(*(pair(50, n) for n in range(10)))
    batch = loaded.next(50)
    loaded.queue.finish(batch, [1.0], seconds=5)  # ten tokens a second, and 450 wait
    with loaded.queue.admit(500), pytest.raises(server.OverloadedError) as refused, loaded.queue.admit(170):
        pass
    assert refused.value.headers["Retry-After"] == "12"  # for the 120 that are too many


def test_a_logit_that_is_no_number_fails_its_own_request_and_no_other() -> None:
    loaded = Loaded()
    bad, good = loaded.group(pair(9, 1), pair(9, 2)), loaded.group(pair(9, 3), pair(9, 4))
    batch = loaded.next()
    assert {entry.job for entry in batch} == {bad, good}
    logits = [math.nan if entry.pair.ids[0] == 1 else 2.0 for entry in batch]
    loaded.queue.finish(batch, logits, 0.1)
    while batch := loaded.next():
        loaded.queue.finish(batch, [2.0] * len(batch), 0.1)
    assert isinstance(bad.scored.exception(0), server.EngineError)
    assert list(good.scored.result(0).values()) == [2.0, 2.0]


class CountingPairs(FakePairs):
    """Counts what is tokenised; `held` holds it back after the first slice."""

    def __init__(self) -> None:
        self.n_made, self.held = 0, threading.Event()
        self.held.set()

    def make(self, query: str, passages: Sequence[str], *arguments: Any, **keywords: Any) -> list[server.Pair]:
        if self.n_made:
            assert self.held.wait(WAIT_S)
        self.n_made += len(passages)
        return super().make(query, passages)


class BatchEngine(FakeEngine):
    """Says what it was given, and makes NaN of passages with nan_words words."""

    nan_words = -1

    def __init__(self) -> None:
        super().__init__()
        self.pairs = self.counting = CountingPairs()
        self.batches: list[list[int]] = []

    def score(self, pairs: Sequence[server.Pair]) -> list[float]:
        self.batches.append([len(one.ids) - 1 for one in pairs])
        return [math.nan if len(pair.ids) == self.nan_words + 1 else logit
                for pair, logit in zip(pairs, super().score(pairs), strict=True)]  # fmt: skip


class Busy(Running):
    """A server whose engine can be held, with requests sent from threads."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(**{"cache_mb": 0, **changes})
        self.engine: BatchEngine = BatchEngine()
        self.answers: dict[str, tuple[int, Any, Any]] = {}
        self.threads: list[threading.Thread] = []

    def send(self, name: str, words: Sequence[int], headers: dict[str, str] | None = None, /, **fields: Any) -> None:
        """From a thread of its own: passages of so many words each."""
        body = json.dumps({"query": name, "passages": ["w " * n for n in words], **fields}).encode()

        def ask() -> None:
            self.answers[name] = self.request("POST", "/rerank", body, **(headers or {}))

        self.threads.append(threading.Thread(target=ask))
        self.threads[-1].start()

    def hold(self) -> None:
        """One request's decode does not end before release()."""
        self.engine.block.clear()
        n_batches = len(self.engine.batches)
        self.send("held", [1])
        until(lambda: len(self.engine.batches) > n_batches)

    def status(self, name: str) -> int:
        until(lambda: name in self.answers)
        return self.answers[name][0]

    def close(self) -> None:
        self.engine.counting.held.set()
        super().close()
        for thread in self.threads:
            thread.join(WAIT_S)


@pytest.fixture
def busy() -> Iterator[Busy]:
    fixture = Busy()
    yield fixture
    fixture.close()


def waiting_tokens(busy: Busy) -> int:
    return busy.m3.queue.n_tokens()


def test_an_overloaded_server_refuses_before_it_tokenises() -> None:
    busy = Busy(max_queue_tokens=1000)
    busy.hold()
    busy.send("a", [200, 199, 198])
    busy.send("b", [200, 199, 198])
    until(lambda: waiting_tokens(busy) >= 1000)
    n_made = busy.engine.counting.n_made
    for body, shape in ({"query": "q", "texts": ["w " * 300]}, str), ({"query": "q", "documents": ["w " * 300]}, dict):
        status, answer, headers = busy.rerank(body)
        assert (status, answer["error_type"]) == (429, "overloaded")
        assert isinstance(answer["error"], shape)
        assert int(headers["Retry-After"]) >= 1
    assert busy.engine.counting.n_made == n_made
    assert busy.request("GET", "/health")[0] == 200
    busy.engine.block.set()
    assert (busy.status("a"), busy.status("b")) == (200, 200)
    assert busy.rerank({"query": "q", "passages": ["w " * 300]})[0] == 200
    busy.close()


def test_a_list_longer_than_the_queue_is_scored_and_leaves_room_for_others() -> None:
    busy = Busy(max_queue_tokens=1000)
    busy.hold()
    busy.send("huge", [n % 60 for n in range(2000)])
    until(lambda: waiting_tokens(busy) >= 1000)
    busy.send("small", [2, 3])
    busy.engine.block.set()
    assert busy.status("small") == 200
    assert busy.status("huge") == 200
    assert busy.answers["huge"][1] == pytest.approx([sigmoid(n % 60 - 2) for n in range(2000)])
    busy.close()


def test_at_its_deadline_a_request_is_504_and_the_rest_of_it_is_not_scored(busy: Busy) -> None:
    busy.hold()
    busy.send("late", [40] * 3 + [39, 38, 37], timeout=0.3)
    busy.send("patient", [40, 39])
    assert busy.status("late") == 504
    assert busy.answers["late"][1]["error_type"] == "deadline_exceeded"
    busy.engine.block.set()
    assert busy.status("patient") == 200
    assert busy.answers["patient"][1] == pytest.approx([sigmoid(38), sigmoid(37)])
    assert sorted(itertools.chain(*busy.engine.batches)) == [1, 39, 40]


def test_no_request_takes_longer_than_the_servers_maximum() -> None:
    """An engine that hangs: 504, as long as it does, and the server goes on."""
    busy = Busy(max_timeout_s=1)
    busy.hold()
    busy.send("late", [5], timeout=3600)
    assert (busy.status("held"), busy.status("late")) == (504, 504)
    assert busy.request("GET", "/health")[0] == 200
    busy.engine.block.set()
    assert busy.rerank({"query": "q", "passages": ["a"]})[0] == 200
    busy.close()


@pytest.mark.parametrize("given", [0, -1, "3 s", True, 10**400, [1]])
def test_a_timeout_that_is_no_time_is_refused(busy: Busy, given: Any) -> None:
    status, answer, _ = busy.rerank({"query": "q", "passages": ["a"], "timeout": given})
    assert (status, answer["error"]["param"]) == (400, "timeout")


def connect(busy: Busy, query: str, words: Sequence[int], version: str = "1.1") -> socket.socket:
    """A request on a connection of its own, sent and not yet answered."""
    body = json.dumps({"query": query, "passages": ["w " * n for n in words]}).encode()
    connection = socket.create_connection(("127.0.0.1", busy.port), timeout=WAIT_S)
    head = f"POST /rerank HTTP/{version}\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def test_what_a_client_that_hung_up_asked_for_is_dropped(busy: Busy) -> None:
    busy.hold()
    connection = connect(busy, "gone", [50] * 4 + [51, 52])
    busy.send("other", [9, 8])
    until(lambda: waiting_tokens(busy) > 150)
    connection.close()
    until(lambda: waiting_tokens(busy) < 30)
    busy.engine.block.set()
    assert busy.status("other") == 200
    assert all(n < 50 for n in itertools.chain(*busy.engine.batches))


def test_a_client_that_ends_its_sending_counts_as_gone(busy: Busy) -> None:
    """As nginx and uvicorn count it: a closed socket and a half-closed one send the same FIN."""
    busy.hold()
    connection = connect(busy, "half", [50] * 4 + [51, 52])
    until(lambda: waiting_tokens(busy) > 100)
    connection.shutdown(socket.SHUT_WR)
    until(lambda: waiting_tokens(busy) < 30)
    assert connection.recv(100) == b"", "no interim answer, and no other one"
    connection.close()


def test_an_idle_connection_holds_nothing_of_its_last_request_and_answer(busy: Busy) -> None:
    """Would break: six idle clients that once sent 20 MB hold 360 MB, while the budget for bodies counts none."""
    n_bytes = 4_000_000
    asked = [("rerank", json.dumps({"query": "q" * n_bytes, "passages": ["a"]}).encode()),
             ("rerank", json.dumps({"query": "q", "passages": 7, "x": "x" * n_bytes}).encode())] * 3  # fmt: skip
    busy.rerank({"query": "q", "passages": ["a"]})
    tracemalloc.start()
    connections = []
    for path, body in asked:
        connections.append(http.client.HTTPConnection("127.0.0.1", busy.port, timeout=WAIT_S))
        connections[-1].request("POST", f"/{path}", body)
        answer = connections[-1].getresponse()
        assert answer.status in (200, 400)
        answer.read()
    del asked, body
    until(lambda: len(busy.server._idle) == len(connections))
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    for connection in connections:
        connection.close()
    assert held < n_bytes / 2, f"{len(connections)} idle connections hold {held:,} bytes"


def test_requests_of_a_failed_batch_get_no_headers_of_each_other() -> None:
    """Would break: a page of an allowed origin makes answers to others readable, and their request ids with them."""
    busy = Busy(cors_origins="https://a.example")
    busy.engine.fail = server.EngineError("no")  # one object, which every request of the batch is answered with
    body = json.dumps({"query": "q", "passages": ["a"]}).encode()
    origin = {"Origin": "https://a.example", "X-Request-Id": "of-the-page"}
    _, _, first = busy.request("POST", "/rerank", body, **origin)
    assert first["Access-Control-Allow-Origin"] == "https://a.example"
    status, _, second = busy.request("POST", "/rerank", body)
    assert status == 500
    assert "Access-Control-Allow-Origin" not in second
    assert busy.engine.fail.headers == {}
    busy.close()


def test_a_number_that_is_none_fails_one_request_of_a_batch(busy: Busy) -> None:
    busy.engine.nan_words = 13
    busy.hold()
    busy.send("bad", [13])
    until(lambda: waiting_tokens(busy) == 14)
    busy.send("good", [12])
    until(lambda: waiting_tokens(busy) == 27)
    busy.engine.block.set()
    assert (busy.status("bad"), busy.status("good")) == (500, 200)
    assert sorted([12, 13]) in [sorted(batch) for batch in busy.engine.batches]


@pytest.mark.parametrize("failure", [RuntimeError("secret"), MemoryError(), server.EngineError("no")])
def test_an_engine_that_fails_fails_its_batch_and_the_next_one_is_served(busy: Busy, failure: Exception) -> None:
    busy.hold()
    busy.send("a", [60, 59])
    until(lambda: waiting_tokens(busy) > 100)
    busy.engine.fail = failure
    busy.engine.block.set()
    assert (busy.status("held"), busy.status("a")) == (500, 500)
    assert "secret" not in json.dumps(busy.answers["a"][1])
    busy.engine.fail = None
    assert busy.rerank({"query": "q", "passages": ["w " * 60]})[0] == 200


def test_the_first_decode_of_a_long_list_starts_while_the_rest_is_still_text(busy: Busy) -> None:
    busy.engine.counting.held.clear()
    busy.send("long", range(3 * server.SLICE_PASSAGES))
    until(lambda: busy.engine.batches)
    assert busy.engine.counting.n_made == server.SLICE_PASSAGES
    busy.engine.counting.held.set()
    assert busy.status("long") == 200
    assert busy.answers["long"][1] == pytest.approx([sigmoid(n - 2) for n in range(3 * server.SLICE_PASSAGES)])


def test_a_long_list_is_tokenised_only_a_little_ahead_of_the_engine(busy: Busy) -> None:
    """Would break: 100,000 passages are half a gigabyte of token ids that wait, and the queue's lock is held ever
    longer for each slice of them (35 ms at 51,200) while everybody else waits."""
    busy.hold()
    busy.send("long", range(100, 2000))
    until(lambda: busy.engine.counting.n_made > 1)
    time.sleep(0.3)
    assert busy.engine.counting.n_made <= 1 + 2 * server.SLICE_PASSAGES
    busy.engine.block.set()
    assert busy.status("long") == 200
    assert busy.answers["long"][1] == pytest.approx([sigmoid(n - 2) for n in range(100, 2000)])


class DyingEngine(BatchEngine):
    """Its scheduler's thread ends outside of the engine's own score."""

    dies = False

    @property
    def max_batch_tokens(self) -> int:  # type: ignore[override]
        if self.dies:
            raise RuntimeError("what nobody expects")
        return 64


def test_a_scheduler_that_dies_fails_what_waits_and_the_next_request_starts_another() -> None:
    """Would break: GET /ready says 200 and every request waits for an hour."""
    busy = Busy()
    busy.engine = dying = DyingEngine()
    busy.hold()
    busy.send("waiting", [9])
    until(lambda: waiting_tokens(busy) > 0)
    dying.dies = True
    dying.block.set()
    assert busy.status("waiting") == 500
    until(lambda: busy.request("GET", "/ready")[0] == 503)
    dying.dies = False
    assert busy.rerank({"query": "q", "passages": ["a b"]})[0] == 200
    assert busy.request("GET", "/ready")[0] == 200
    busy.close()


def test_threads_end_with_the_server() -> None:
    before = set(threading.enumerate())
    busy = Busy()
    busy.send("a", [3] * 40)
    assert busy.status("a") == 200
    busy.close()
    until(lambda: not [thread for thread in set(threading.enumerate()) - before if "scheduler" in thread.name])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_batch_ends_the_process(name: str, gguf_of: Gguf) -> None:
    """Would break: one request ends the server for everybody. Small settings are tried, too."""
    command = [sys.executable, str(ROOT / "tests" / "fuzz_engine.py"), str(gguf_of(name)), "15", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout)
    FUZZED[f"batches for the engine ({name})"].update(counts)
    assert counts["batches scored"] > counts["batches refused"] > 0
