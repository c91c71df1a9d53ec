"""python -m bench.http: what the HTTP side alone costs, with an engine that computes nothing.

The server runs in a process of its own; keep-alive clients in this one send a small request again and again over plain
sockets, so that little of the time is theirs. Then the same beside --slow connections, each of which sends a header, a
byte each second. Prints requests/s and the latencies, and writes bench/results/http.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import rerank_server as server
from bench import report
from bench.machine import describe_machine

BODY = json.dumps({"query": "capital of France?", "passages": ["Paris is the capital of France.", "I like cheese."]})


class FakePairs:
    longest = 1024

    def make(self, query: str, passages: Sequence[str], *_: Any, **__: Any) -> list[server.Pair]:
        return [server.Pair((len(query), len(passage)), 1, 0) for passage in passages]


class FakeEngine:
    """Answers at once. The rest of the path is the server's own: parsing, queue, scheduler thread, futures, JSON."""

    max_batch_tokens, max_sequences, arithmetic = 512, 64, "none"
    description = server.ModelDescription(Path("fake.gguf"), server.CROSS_ENCODER, "bert", "F32", 1, 1024)

    def __init__(self) -> None:
        self.pairs: Any = FakePairs()

    def score(self, pairs: Sequence[server.Pair]) -> list[float]:
        return [0.0] * len(pairs)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return []

    def close(self) -> None:
        pass


def serve(port_out: Connection) -> None:
    """The server's process: sends its port, and serves until it is terminated."""
    settings = server.Settings(port=0, cache_mb=0)
    engine: Any = FakeEngine()
    role = server.Role("m3", engine.description, settings, lambda *_: engine)
    running = server.RerankServer(server.Application(server.Roles(role), settings), settings)
    port_out.send(running.server_address[1])
    running.serve_forever()


class Client:
    """One keep-alive connection. ask() returns the seconds that an answer took."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = f"POST /rerank HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(BODY)}\r\n\r\n"
        self._request = (head + BODY).encode()

    def ask(self) -> float:
        """Raises SystemExit for an answer that is not a success."""
        started = time.perf_counter()
        self._socket.sendall(self._request)
        answer = self._socket.recv(65536)  # headers and body leave the server in one write
        seconds = time.perf_counter() - started
        if not answer.startswith(b"HTTP/1.1 200") or not answer.endswith(b"]\n"):
            raise SystemExit(f"bench.http: unexpected answer {answer[:200]!r}")
        return seconds

    def close(self) -> None:
        self._socket.close()


def measure(port: int, n_clients: int, seconds: float) -> dict[str, Any]:
    """Requests/s over all clients, and their latencies, during `seconds`."""
    latencies: list[list[float]] = [[] for _ in range(n_clients)]
    deadline = time.perf_counter() + seconds

    def run(own: list[float]) -> None:
        client = Client(port)
        while time.perf_counter() < deadline:
            own.append(client.ask())
        client.close()

    threads = [threading.Thread(target=run, args=(own,)) for own in latencies]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - started
    every = sorted(latency for own in latencies for latency in own)
    return {
        "clients": n_clients,
        "requests_per_second": len(every) / elapsed,
        "p50_ms": 1000 * statistics.median(every),
        "p95_ms": 1000 * every[int(0.95 * (len(every) - 1))],
    }


@contextlib.contextmanager
def slow_connections(port: int, n: int) -> Iterator[None]:
    """n connections whose requests do not come to an end. One that the server gives up is opened again."""
    done = threading.Event()
    connections = [_begun(port) for _ in range(n)]

    def drip() -> None:
        while not done.wait(1):
            for index, connection in enumerate(connections):
                try:
                    connection.sendall(b"a")
                except OSError:
                    connection.close()
                    connections[index] = _begun(port)

    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        yield
    finally:
        done.set()
        dripping.join()
        for connection in connections:
            connection.close()


def _begun(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(b"POST /rerank HTTP/1.1\r\nX: ")
    return connection


def run(clients: Sequence[int], seconds: float, n_runs: int, n_slow: int) -> list[dict[str, Any]]:
    """For each number of clients, the run with the median rate; without slow connections, and beside them."""
    context = multiprocessing.get_context("spawn")
    port_in, port_out = context.Pipe(duplex=False)
    process = context.Process(target=serve, args=(port_out,), daemon=True)
    process.start()
    try:
        port = port_in.recv()
        measure(port, 1, seconds / 4)
        rows = []
        for slow in dict.fromkeys((0, n_slow)):
            with slow_connections(port, slow):
                for count in clients:
                    runs = [measure(port, count, seconds) for _ in range(n_runs)]
                    median = sorted(runs, key=lambda run: run["requests_per_second"])[n_runs // 2]
                    rows.append({"slow_connections": slow, **median})
        return rows
    finally:
        process.terminate()
        process.join()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.http", description="Measure the HTTP side alone.")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 16], help="keep-alive connections at once")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement (default 3)")
    parser.add_argument("--runs", type=int, default=3, help="measurements of each; the median is shown (default 3)")
    parser.add_argument("--slow", type=int, default=300, help="slow connections of the second round (default 300)")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="default: bench/results")
    arguments = parser.parse_args(argv)
    rows = run(arguments.clients, arguments.seconds, arguments.runs, arguments.slow)
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {"machine": describe_machine(Path(sys.executable), "bench.http"), "rows": rows}
    (arguments.out / "http.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("| slow connections | clients | requests/s | p50 ms | p95 ms |\n|---|---|---|---|---|")
    for row in rows:
        line = "| {slow_connections} | {clients} | {requests_per_second:,.0f} | {p50_ms:.2f} | {p95_ms:.2f} |"
        print(line.format(**row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
