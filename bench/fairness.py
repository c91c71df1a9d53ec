"""python -m bench.fairness FILE.gguf: how long a short request takes alone, and while a long one is being scored.

The short one has --passages passages, the long one --long of the same length. The client of the long one hangs up when
the short one was answered. Writes bench/results/fairness-NAME.md and .json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import select
import socket
import statistics
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import report
from bench.engines import Running, Setup, engines_of
from bench.machine import describe_machine
from bench.scaling import make_request, token_counter
from bench.texts import SEED, Request

COLUMNS = {
    "tokens": ("tokens of a pair", "{:,}"),
    "alone_ms": ("alone ms", "{:,.0f}"),
    "beside_ms": ("beside it ms", "{:,.0f}"),
    "beside_ms_max": ("the slowest", "{:,.0f}"),
    "ratio": ("times", "{:.1f}"),
}


class OverError(Exception):
    """The long request was answered before enough was measured."""


@contextlib.contextmanager
def long_request(running: Running, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A request whose answer nobody waits for: its client hangs up when the `with` ends."""
    host, port = running.url.removeprefix("http://").split(":")
    payload = json.dumps(body).encode()
    head = f"POST /rerank HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(payload)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + payload)
        yield connection


class Measurement:
    def __init__(self, file: Path, n_short: int, n_long: int, n_runs: int) -> None:
        self._short, self._long, self._n_runs = n_short, n_long, n_runs
        self._count, role = token_counter(file, 1024)
        self._setup = Setup(role, {"": file}, None, Path(sys.executable), ("--max-length", "1024"))
        self._engine = engines_of(role, [""], [])[0]
        self._generator = random.Random(SEED)

    def rows(self, words: Sequence[int]) -> list[dict[str, Any]]:
        running = Running(self._engine, self._setup)
        try:
            return [self._row(running, n_words) for n_words in words]
        finally:
            running.close()

    def _row(self, running: Running, words: int) -> dict[str, Any]:
        """By turns alone and beside a long request, so that a machine that slows down slows both."""
        self._ask(running, words)
        request = make_request(self._generator, words, self._long)
        alone, beside = list[float](), list[float]()
        for _ in range(self._n_runs):
            alone.append(self._ask(running, words))
            beside.append(self._ask_beside(running, words, request))
        alone_ms, beside_ms = 1000 * statistics.median(alone), 1000 * statistics.median(beside)
        return {
            "words": words, "tokens": round(self._count(request) / self._long), "alone_ms": alone_ms,
            "beside_ms": beside_ms, "beside_ms_max": 1000 * max(beside), "ratio": beside_ms / alone_ms,
        }  # fmt: skip

    def _ask_beside(self, running: Running, words: int, request: Request) -> float:
        body = self._engine.body(request.query, list(request.passages))
        with long_request(running, body) as connection:
            while not _n_requests(running) and not _has_answer(connection, 0.02):
                pass
            _has_answer(connection, self._generator.uniform(0.2, 1))  # no fixed place in its decodes
            seconds = self._ask(running, words)
            if _has_answer(connection, 0):
                raise OverError(f"{self._long} passages of {words} words were scored too soon")
        while _n_requests(running):
            time.sleep(0.02)
        running.rerank("the decode that was running", ("is over after this one",))
        return seconds

    def _ask(self, running: Running, words: int) -> float:
        request = make_request(self._generator, words, self._short)
        return running.rerank(request.query, request.passages)


def _has_answer(connection: socket.socket, timeout_s: float) -> bool:
    return bool(select.select([connection], [], [], timeout_s)[0])


def _n_requests(running: Running) -> float:
    """Those that wait or are being scored."""
    with urllib.request.urlopen(f"{running.url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return sum(map(float, re.findall(r"^rerank_queue_requests\{role=\"\w+\"\} (\S+)$", text, re.MULTILINE)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fairness", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, help="GGUF file")
    parser.add_argument("--passages", type=int, default=5, help="of the short request (default 5)")
    parser.add_argument("--long", type=int, default=1000, help="passages of the long request (default 1000)")
    parser.add_argument("--words", type=int, nargs="+", default=[10, 70, 200], help="of a passage (default 10 70 200)")
    parser.add_argument("--runs", type=int, default=9, help="of the short request, both ways (default 9)")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="default: bench/results")
    arguments = parser.parse_args(argv)
    machine = describe_machine(Path(sys.executable), "bench.fairness")
    try:
        rows = Measurement(arguments.file, arguments.passages, arguments.long, arguments.runs).rows(arguments.words)
    except OverError as error:
        raise SystemExit(f"bench.fairness: {error}: give it a larger --long") from None
    print("\n".join(write(arguments, machine, rows)))
    return 0


def write(arguments: argparse.Namespace, machine: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"# {arguments.passages} passages beside {arguments.long:,} with {arguments.file.name}", "",
        f"`{machine['command']}`, {machine['date']}, commit {machine['commit']}, {machine['cpu']}; medians of "
        f"{arguments.runs}", "", *report.table(rows, COLUMNS),
    ]  # fmt: skip
    content = {"file": arguments.file.name, "machine": machine, "rows": rows}
    return report.write_lines(arguments.out, f"fairness-{arguments.file.stem}", lines, content)


if __name__ == "__main__":
    sys.exit(main())
