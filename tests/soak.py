#!/usr/bin/env python3
"""Many clients at once, most of them badly behaved, against one server process: `python tests/soak.py --minutes 3`.

They send every contract in many sizes, hang up, set deadlines, send too much, send nonsense. Half way SIGTERM
stops the server under load and another is started. The models are tiny float32 checkpoints made on the spot. What must
hold: each request gets exactly one answer or a clean close; each score is the idle server's; resident memory is flat;
no thread and no waiting request is left over; the server stops with status 0, both times. Exit status 0 when all of it
did; the counts are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import platform
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkpoints
from server_process import ServerProcess

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = 64
ANSWER_TIMEOUT_S = 300.0  # requests take turns, so a long one beside 63 others is slow
MAX_QUEUE_TOKENS = 40_000  # small, so that some requests are refused
PAUSE_S = 1.0  # at most, of a client that was refused with 429
MAX_BODY_MB = 1
# Pairs packed with others and pairs alone differ by rounding: tests/test_parity.py holds that to 2e-3 of a logit.
SCORE_TOLERANCE = 2e-3
RSS_GROWTH = 1.1  # the last quarter's largest against the second's: caches and heaps fill up in the first
N_QUERIES, N_PASSAGES = 8, 60
WORDS = "the river stone bridge carries old music over winter fields while seven clerks count paper boats".split()


def texts(seed: int) -> tuple[list[str], list[str]]:
    """Queries, and passages of 1 to 120 words."""
    draw = random.Random(seed)
    queries = [" ".join(draw.choices(WORDS, k=draw.randint(2, 12))) + f" {n}?" for n in range(N_QUERIES)]
    passages = [" ".join(draw.choices(WORDS, k=draw.choice([1, 5, 20, 60, 120]))) + f" {n}." for n in range(N_PASSAGES)]
    return queries, passages


@dataclass
class Kind:
    """What a client may do. share: of all requests. statuses: what may come back; None: a close without an answer."""

    name: str
    share: int
    act: Callable[[Soak, random.Random], int | None]
    statuses: tuple[int | None, ...]


@dataclass
class Soak:
    """One run. Counts and failures are written by the clients' threads."""

    files: dict[str, Path]
    seconds: float
    seed: int = 6
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    n_scores: int = 0
    largest_difference: float = 0.0

    def __post_init__(self) -> None:
        self.queries, self.passages = texts(self.seed)
        self.expected: dict[tuple[bool, int, int], float] = {}
        self._lock = threading.Lock()  # guards the counts
        self._is_over, self._is_down = threading.Event(), threading.Event()
        self._folder = tempfile.TemporaryDirectory()
        self._port = 0
        self._servers: list[ServerProcess] = []
        self._rss_bytes: list[float] = []

    # -- the server ----------------------------------------------------------------------------------------------------

    def _start(self) -> ServerProcess:
        arguments = ["--m3", self.files["m3"], "--gemma", self.files["gemma"], "--threads", 1, "--cache-mb", 0,
                     "--max-queue-tokens", MAX_QUEUE_TOKENS, "--max-body-mb", MAX_BODY_MB, "--max-bodies-mb", 64]
        with Path(self._folder.name, f"{len(self._servers)}.log").open("wb") as log:
            server = ServerProcess(*map(str, arguments), stderr=log)
        self._servers.append(server)
        self._port = int(server.url.rpartition(":")[2])
        return server

    def _logs(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(Path(self._folder.name).glob("*.log")))

    def _stop(self, server: ServerProcess, why: str) -> None:
        started = time.monotonic()
        try:
            status: int | str = server.stop()
        except subprocess.TimeoutExpired:
            server.kill()
            status = "none, it had to be killed"
        self.notes.append(f"{why}: exit status {status} after {time.monotonic() - started:.1f} s")
        if status != 0:
            self.failures.append(f"{why}: exit status {status}")

    def run(self) -> Soak:
        with self._folder:
            try:
                self._run()
            finally:
                self._is_over.set()
                for server in self._servers:
                    server.kill()
        return self

    def _run(self) -> None:
        """Start, idle scores, load, SIGTERM under load, a new server, load, idle again, stop."""
        server = self._start()
        self._learn(server)
        clients = [threading.Thread(target=self._client, args=(n,), name=f"client {n}", daemon=True)
                   for n in range(CLIENTS)]  # fmt: skip
        for client in clients:
            client.start()
        self._load_for(self.seconds / 2)
        self._is_down.set()
        self._stop(server, "SIGTERM under load")
        server = self._start()
        self._learn_idle_counts(server)
        self._is_down.clear()
        self._rss_bytes.clear()
        self._load_for(self.seconds / 2)
        self._is_over.set()
        for client in clients:
            client.join(2 * ANSWER_TIMEOUT_S)
            if client.is_alive():
                self.failures.append(f"{client.name} never got its answer")
        self._check_leftovers(server)
        self._check_scores_again(server)
        self._stop(server, "SIGTERM when idle")
        self._check_logs()

    def _load_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._rss_bytes.append(self._metric("rerank_resident_bytes"))
            time.sleep(0.25)

    def _metric(self, name: str) -> float:
        with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=ANSWER_TIMEOUT_S)) as connection:
            connection.request("GET", "/metrics")
            found = re.search(rf"^{name} (\S+)$", connection.getresponse().read().decode(), re.MULTILINE)
            assert found, name
            return float(found[1])

    # -- what must hold ------------------------------------------------------------------------------------------------

    def _learn(self, server: ServerProcess) -> None:
        """The idle server's score of every pair."""
        for use_llm in (False, True):
            for q, query in enumerate(self.queries):
                status, scores, _ = server.rerank(query=query, passages=self.passages, use_llm=use_llm)
                assert status == 200, scores
                self.expected |= {(use_llm, q, p): score for p, score in enumerate(scores)}

    def _learn_idle_counts(self, server: ServerProcess) -> None:
        server.rerank(query="q", passages=["a"], use_llm=True)
        self._when_idle = self._counts_when_idle(server)

    def _counts_when_idle(self, server: ServerProcess) -> dict[str, int]:
        """Once no connection is open: threads and open files of the process (Linux)."""
        time.sleep(1)
        folders = {"threads": Path(f"/proc/{server.pid}/task"), "open files": Path(f"/proc/{server.pid}/fd")}
        return {name: len(list(folder.iterdir())) for name, folder in folders.items() if folder.is_dir()}

    def _check_leftovers(self, server: ServerProcess) -> None:
        for name, n in self._counts_when_idle(server).items():
            self.notes.append(f"{name} when idle: {self._when_idle[name]} before, {n} after")
            if n > self._when_idle[name]:
                self.failures.append(self.notes[-1])
        queued = self._metric(r"rerank_queue_requests\{role=\"m3\"\}"), self._metric(
            r"rerank_queue_tokens\{role=\"m3\"\}")  # fmt: skip
        if any(queued):
            self.failures.append(f"requests and tokens that still wait: {queued}")
        self._check_memory()

    def _check_memory(self) -> None:
        size = len(self._rss_bytes) // 8
        peaks = [max(self._rss_bytes[n * size : (n + 1) * size]) for n in range(8)]
        shown = ", ".join(f"{peak / 1e6:.0f}" for peak in peaks)
        self.notes.append(f"resident MB, the largest in each eighth of the second server's time: {shown}")
        if max(peaks[6:]) > max(peaks[2:4]) * RSS_GROWTH:
            self.failures.append(self.notes[-1])

    def _check_scores_again(self, server: ServerProcess) -> None:
        status, scores, _ = server.rerank(query=self.queries[0], passages=self.passages)
        assert status == 200
        for p, score in enumerate(scores):
            self.compare(False, 0, p, score)

    def _check_logs(self) -> None:
        logs = self._logs()
        if "Traceback" in logs:
            self.failures.append(logs[logs.index("Traceback") :][:2000])

    def compare(self, use_llm: bool, q: int, p: int, score: float) -> None:
        difference = abs(score - self.expected[use_llm, q, p])
        with self._lock:
            self.n_scores += 1
            self.largest_difference = max(self.largest_difference, difference)
            if difference > SCORE_TOLERANCE:
                self.failures.append(f"{self.queries[q]!r}, {self.passages[p]!r}: {score}, off by {difference}")

    # -- the clients ---------------------------------------------------------------------------------------------------

    def _client(self, number: int) -> None:
        draw = random.Random(self.seed * 1000 + number)
        while not self._is_over.is_set():
            if self._is_down.is_set():
                time.sleep(0.05)
                continue
            kind = draw.choices(KINDS, [kind.share for kind in KINDS])[0]
            try:
                status = kind.act(self, draw)
                self._note(kind, status)
                if status == 429:
                    time.sleep(draw.uniform(0, PAUSE_S))
            except ConnectionRefusedError as error:  # nobody listens, so nothing was asked
                if not self._is_down.is_set():
                    self._note(kind, error)
            except Exception as error:
                self._note(kind, error)

    def _note(self, kind: Kind, result: int | Exception | None) -> None:
        """What a request came to: a status, None for a clean close, or what went wrong."""
        is_down = self._is_down.is_set()
        allowed = (*kind.statuses, 429, *((503, None) if is_down else ()))
        with self._lock:
            self.outcomes[kind.name, "closed" if result is None else str(result)] += 1
            if result not in allowed:
                self.failures.append(f"{kind.name}{' (while stopping)' if is_down else ''}: {result!r}")

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._port), timeout=ANSWER_TIMEOUT_S)


# -- What a client does: each returns the status of the one answer that it got, None for a clean close -----------------


def message(path: str, body: Any, *headers: str, is_last: bool = True) -> bytes:
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: soak", f"Content-Length: {len(payload)}", *headers]
    return "\r\n".join([*lines, *(["Connection: close"] if is_last else []), "", ""]).encode() + payload


def send(connection: socket.socket, data: bytes) -> None:
    """A server that stops may close before it has read all. What it answered, or that it closed, is read afterwards."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(data)


def answer(connection: socket.socket, is_last: bool = True) -> tuple[int | None, Any]:
    """One answer; when it was the last one, nothing may follow it."""
    if not connection.recv(1, socket.MSG_PEEK):
        return None, None
    received = http.client.HTTPResponse(connection)
    received.begin()
    body = received.read()
    assert len(body) == int(received.headers["Content-Length"]), "half an answer"
    assert received.headers["X-Request-Id"], received.headers
    if received.status == 429:
        assert int(received.headers["Retry-After"]) >= 1
    if is_last:
        assert connection.recv(100) == b"", "more than one answer"
    return received.status, json.loads(body)


def drawn(soak: Soak, draw: random.Random, most: int) -> tuple[int, list[int]]:
    return draw.randrange(N_QUERIES), [draw.randrange(N_PASSAGES) for _ in range(draw.randint(1, most))]


def exchange(soak: Soak, data: bytes) -> tuple[int | None, Any]:
    with closing(soak.connect()) as connection:
        send(connection, data)
        return answer(connection)


def contracts(soak: Soak, q: int, ps: list[int], use_llm: bool) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Route, body, and how to read (index, score) from the answer."""
    query, passages, llm = soak.queries[q], [soak.passages[p] for p in ps], {"use_llm": use_llm}
    yield "/rerank", {"query": query, "passages": passages, **llm}, enumerate
    yield "/rerank", {"query": query, "texts": passages, **llm}, lambda body: ((r["index"], r["score"]) for r in body)
    for route, extra, results in (("/v2/rerank", {}, "results"), ("/v1/rerank", {"top_k": len(ps)}, "data")):
        yield route, {"query": query, "documents": passages, **extra, **llm}, lambda body, results=results: (
            (r["index"], r["relevance_score"]) for r in body[results])  # fmt: skip
    yield "/score", {"text_1": query, "text_2": passages, **llm}, lambda body: (
        (r["index"], r["score"]) for r in body["data"])  # fmt: skip


def scored(soak: Soak, draw: random.Random, most: int, use_llm: bool = False, **fields: Any) -> int | None:
    q, ps = drawn(soak, draw, most)
    route, body, read = draw.choice(list(contracts(soak, q, ps, use_llm)))
    status, found = exchange(soak, message(route, {**body, **fields}))
    if status == 200:
        results = dict(read(found))
        assert sorted(results) == list(range(len(ps))), "not one score for each passage"
        for index, score in results.items():
            soak.compare(use_llm, q, ps[index], score)
    return status


def with_gemma(soak: Soak, draw: random.Random) -> int | None:
    return scored(soak, draw, 6, use_llm=True)


def in_two_stages(soak: Soak, draw: random.Random) -> int | None:
    q, ps = drawn(soak, draw, 20)
    body = {"query": soak.queries[q], "documents": [soak.passages[p] for p in ps], "use_llm": True, "llm_top_n": 3}
    status, found = exchange(soak, message("/v1/rerank", body))
    if status == 200:
        for rank, result in enumerate(found["results"]):
            soak.compare(rank < 3, q, ps[result["index"]], result["relevance_score"])
    return status


def late(soak: Soak, draw: random.Random) -> int | None:
    return scored(soak, draw, 60, timeout=draw.choice([0.001, 0.05, 0.5, 2, 8]))


def hangs_up(soak: Soak, draw: random.Random) -> int | None:
    q, ps = drawn(soak, draw, 200)
    data = message("/rerank", {"query": soak.queries[q], "passages": [soak.passages[p] for p in ps]})
    with closing(soak.connect()) as connection:
        send(connection, data[: draw.choice([10, len(data) // 2, len(data), len(data)])])
        time.sleep(draw.choice([0, 0.02, 0.3]))
    return None


def in_slow_chunks(soak: Soak, draw: random.Random) -> int | None:
    q, ps = drawn(soak, draw, 20)
    payload = json.dumps({"query": soak.queries[q], "passages": [soak.passages[p] for p in ps]}).encode()
    step = len(payload) // draw.randint(1, 8) + 1
    with closing(soak.connect()) as connection:
        head = b"POST /rerank HTTP/1.1\r\nHost: soak\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        send(connection, head)
        for start in range(0, len(payload), step):
            piece = payload[start : start + step]
            send(connection, b"%x\r\n%b\r\n" % (len(piece), piece))
            time.sleep(draw.uniform(0, 0.2))
        send(connection, b"0\r\n\r\n")
        status, found = answer(connection)
    if status == 200:
        for p, score in zip(ps, found, strict=True):
            soak.compare(False, q, p, score)
    return status


def stays(soak: Soak, draw: random.Random) -> int | None:
    """Three requests on one connection, the last two at once."""
    body = {"query": soak.queries[0], "passages": [soak.passages[0]]}
    with closing(soak.connect()) as connection:
        send(connection, message("/rerank", body, is_last=False))
        status, _ = answer(connection, is_last=False)
        if status is None or soak._is_down.is_set():
            return status
        send(connection, message("/rerank", body, is_last=False) + message("/rerank", body))
        received = b""
        while data := connection.recv(65536):
            received += data
    n_answers = received.count(b"HTTP/1.1 ") - received.count(b"HTTP/1.1 100 ")
    assert n_answers == 2 or soak._is_down.is_set(), f"{n_answers} answers to two requests"
    return status


def is_too_large(soak: Soak, draw: random.Random) -> int | None:
    return exchange(soak, f"POST /rerank HTTP/1.1\r\nHost: a\r\nContent-Length: {10**8}\r\n\r\n".encode())[0]


def is_malformed(soak: Soak, draw: random.Random) -> int | None:
    wrong = [b"{", b"[]", b'{"query": 1}', b"\xff\xfe", b'{"query": "a", "passages": "b"}', b'{"a": NaN}']
    heads = [b"GET /\n\n", b"POST /rerank HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
             b"POST /rerank HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"\x16\x03\x01\r\n\r\n"]
    return exchange(soak, draw.choice([*(message("/rerank", body) for body in wrong), *heads]))[0]


KINDS = (
    Kind("m3, up to 8 passages", 40, lambda soak, draw: scored(soak, draw, 8), (200,)),
    Kind("m3, up to 300 passages", 4, lambda soak, draw: scored(soak, draw, 300), (200,)),
    Kind("gemma, up to 6 passages", 10, with_gemma, (200,)),
    Kind("two stages", 5, in_two_stages, (200,)),
    Kind("with a deadline of 1 ms to 8 s", 10, late, (200, 504)),
    Kind("hangs up", 10, hangs_up, (None,)),
    Kind("body in slow chunks", 5, in_slow_chunks, (200,)),
    Kind("three on one connection", 5, stays, (200,)),
    Kind("body too large", 5, is_too_large, (413,)),
    Kind("malformed", 6, is_malformed, (400, 505)),
)


# -- Report ------------------------------------------------------------------------------------------------------------


def report(soak: Soak, command: str) -> str:
    answers: dict[str, Counter[str]] = {kind.name: Counter() for kind in KINDS}
    for (name, result), n in soak.outcomes.items():
        answers[name][result] += n
    rows = [f"| {name} | {own.total():,} | {', '.join(f'{result}: {n:,}' for result, n in sorted(own.items()))} |"
            for name, own in answers.items()]  # fmt: skip
    total = sum(soak.outcomes.values())
    return "\n".join([
        f"`{command}`, {CLIENTS} clients, tiny float32 models, Python {platform.python_version()}", "",
        "| requests | number | answers |", "|---|---|---|", *rows, f"| all | {total:,} | |", "",
        f"- {soak.n_scores:,} scores compared with the idle server's: largest difference {soak.largest_difference:.1e}",
        *(f"- {note}" for note in soak.notes),
        f"- failures: {len(soak.failures)}", *(f"  - {failure}" for failure in soak.failures[:20]), "",
    ])  # fmt: skip


def tiny_models(folder: Path) -> dict[str, Path]:
    """Tiny float32 GGUF files for both roles, made by the converter."""
    made = {}
    for role, make in (("m3", checkpoints.make_xlmr), ("gemma", checkpoints.make_gemma)):
        command = [sys.executable, "-m", "convert", str(make(folder / role)), "--out", str(folder), "--quant", "F32"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        made[role] = next(folder.glob(f"{role}*.gguf"))
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=10, help="of load (default: 10)")
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--out", type=Path, help="write the report there too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = tiny_models(Path(folder))
        soak = Soak(files, arguments.minutes * 60, arguments.seed).run()
    text = report(soak, f"make soak ARGS='--minutes {arguments.minutes:g}'")
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    return 1 if soak.failures else 0


if __name__ == "__main__":
    sys.exit(main())
