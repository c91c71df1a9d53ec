"""python -m bench.memory FILE.gguf: what a server holds in memory, from its start to thousands of pairs.

Asked of one server after the other: resident when ready; after lists of mixed lengths; the most while pairs of
--longest tokens are scored; the growth over --pairs distinct pairs; and what a second server on the same file adds.
Memory does not depend on how busy the machine is. Writes bench/results/memory-NAME.md and .json.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench import report
from bench.engines import Running, Setup, engines_of
from bench.machine import describe_machine
from bench.scaling import make_request, token_counter
from bench.texts import SEED, make_passage, read_texts

SAMPLE_S = 0.05
LIST = 100  # passages in a request of the long run
COLUMNS = {
    "what": ("server", "{}"),
    "resident_mb": ("resident MB", "{:,.0f}"),
    "over_file_mb": ("over the file's size", "{:+,.0f}"),
}


class Peak:
    """The most that a process holds while something runs; VmHWM would also remember its start."""

    def __init__(self, running: Running) -> None:
        self._running, self._stop, self.mb = running, threading.Event(), 0.0

    def __enter__(self) -> Peak:
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        is_over = False
        while not is_over:
            is_over = self._stop.wait(SAMPLE_S)
            self.mb = max(self.mb, self._running.memory_mb("VmRSS"))


class Measurement:
    def __init__(self, file: Path) -> None:
        self.file, self.rows = file, list[dict[str, Any]]()
        self._count, self._role = token_counter(file, 8192)

    @contextlib.contextmanager
    def server(self, *flags: str) -> Iterator[Running]:
        setup = Setup(self._role, {"": self.file}, None, Path(sys.executable), ("--cache-mb", "8", *flags))
        running = Running(engines_of(self._role, [""], [])[0], setup)
        try:
            running.rerank("warm up", ("a passage",))  # gemma is loaded by its first request
            yield running
        finally:
            running.close()

    def note(self, what: str, mb: float) -> None:
        row = {"what": what, "resident_mb": mb, "over_file_mb": mb - self.file.stat().st_size / 1e6}
        self.rows.append(row)
        print(f"{what}: {mb:,.0f} MB", file=sys.stderr, flush=True)

    def default_use(self, data: Path | None, n_lists: int) -> None:
        texts = read_texts(data)
        with self.server("--max-length", "1024") as running:
            self.note("after its first pair", running.memory_mb("VmRSS"))
            with Peak(running) as peak:
                for _ in range(n_lists):
                    request = texts.request(10)
                    running.rerank(request.query, request.passages)
            self.note(f"while scoring {n_lists} lists of 10", peak.mb)
            self._second_server()

    def _second_server(self) -> None:
        with self.server("--max-length", "1024") as second:
            self.note("a second one on the same file adds", second.private_mb())

    def longest(self, n_tokens: int) -> None:
        generator = random.Random(SEED)
        text = make_passage(generator, n_tokens)  # a word is a token or more
        with self.server("--max-length", str(n_tokens)) as running:
            with Peak(running) as peak:
                running.rerank("what is it?", (text,))
            self.note(f"while scoring a pair of {n_tokens:,} tokens", peak.mb)

    def long_run(self, n_pairs: int, words: int) -> None:
        generator = random.Random(SEED)
        with self.server("--max-length", "1024") as running:
            for number in tqdm(range(n_pairs // LIST + 1), desc="pairs", leave=False):
                request = make_request(generator, words, LIST)
                running.rerank(f"{number} {request.query}", request.passages)
                if number == 0:
                    first = running.memory_mb("VmRSS")
                    self.note(f"after {LIST} pairs", first)
            self.note(f"after {n_pairs:,} more, all distinct", running.memory_mb("VmRSS"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description="What a server holds in memory.")
    parser.add_argument("file", type=Path, help="GGUF file")
    parser.add_argument("--data", type=Path, metavar="DIR", help="texts: a BEIR directory with a bm25*.tsv run")
    parser.add_argument("--lists", type=int, default=5, help="lists of 10 of mixed lengths (default 5)")
    parser.add_argument("--longest", type=int, default=8192, help="tokens of the longest pair (default 8192; 0: none)")
    parser.add_argument("--pairs", type=int, default=10_000, help="distinct pairs of the long run (default 10000)")
    parser.add_argument("--words", type=int, default=5, help="in each passage of the long run (default 5)")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="default: bench/results")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench.memory: stopped"))  # so that its server is stopped as well
    machine = describe_machine(Path(sys.executable), "bench.memory")
    measurement = Measurement(arguments.file)
    measurement.default_use(arguments.data, arguments.lists)
    if arguments.longest:
        measurement.longest(arguments.longest)
    if arguments.pairs:
        measurement.long_run(arguments.pairs, arguments.words)
    print("\n".join(write(arguments.file, machine, measurement.rows, arguments.out)))
    return 0


def write(file: Path, machine: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> list[str]:
    size_mb = file.stat().st_size / 1e6
    lines = [
        f"# memory of {file.name}", "", f"`{machine['command']}`, {machine['date']}, commit {machine['commit']}; the "
        f"file has {size_mb:,.0f} MB, and its mapped pages count as resident", "", *report.table(rows, COLUMNS),
    ]  # fmt: skip
    content = {"file": file.name, "file_mb": size_mb, "machine": machine, "rows": rows}
    return report.write_lines(folder, f"memory-{file.stem}", lines, content)


if __name__ == "__main__":
    sys.exit(main())
