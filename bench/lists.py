"""python -m bench.lists [FILE.gguf]: what long lists of short passages cost in time and memory, and what a small
request beside them waits.

For each length a server of its own: the list is sent, and as long as it is being scored a one-passage request goes out
again and again; before it the same request alone. Writes bench/results/lists.md and .json.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import report
from bench.engines import Running, Setup, engines_of
from bench.machine import describe_machine

WORDS = ("river", "stone", "old", "bridge", "paper", "music", "winter", "garden", "market", "letter")
N_ALONE = 60
COLUMNS = {
    "passages": ("passages", "{:,}"),
    "seconds": ("seconds", "{:.1f}"),
    "passages_per_s": ("passages/s", "{:,.0f}"),
    "idle_mb": ("idle MB", "{:,.0f}"),
    "more_mb": ("at most + MB", "{:,.0f}"),
    "alone_ms": ("one passage alone, ms", "{:.1f}"),
    "beside_ms": ("beside it, ms", "{:.1f}"),
    "ratio": ("times", "{:.1f}"),
}


def passages_of(count: int) -> list[str]:
    """Four words each, no two alike."""
    n = len(WORDS)
    return [f"{WORDS[i % n]} {WORDS[i // n % n]} {WORDS[i // n**2 % n]} {i}" for i in range(count)]


class Measurement:
    def __init__(self, file: Path) -> None:
        self._setup = Setup("mini", {"": file}, None, Path(sys.executable), ())
        self._engine = engines_of("mini", [""], [])[0]

    def row(self, n_passages: int) -> dict[str, Any]:
        running = Running(self._engine, self._setup)
        try:
            return self._row(running, n_passages)
        finally:
            running.close()

    def _row(self, running: Running, n_passages: int) -> dict[str, Any]:
        running.rerank("warm up", passages_of(500))
        alone = [self._small(running, n) for n in range(N_ALONE)]
        idle_mb, seconds = resident_mb(running), list[float]()
        passages = passages_of(n_passages)

        def ask() -> None:
            started = time.perf_counter()
            running.rerank("which of these?", passages)
            seconds.append(time.perf_counter() - started)

        asking = threading.Thread(target=ask)
        asking.start()
        beside, most_mb = list[float](), idle_mb
        while asking.is_alive():
            beside.append(self._small(running, len(beside) + N_ALONE))
            most_mb = max(most_mb, resident_mb(running))
            time.sleep(0.05)
        asking.join()
        alone_ms, beside_ms = 1000 * statistics.median(alone), 1000 * statistics.median(beside[:-1] or beside)
        return {
            "passages": n_passages, "seconds": seconds[0], "passages_per_s": n_passages / seconds[0],
            "idle_mb": idle_mb, "more_mb": most_mb - idle_mb, "alone_ms": alone_ms, "beside_ms": beside_ms,
            "ratio": beside_ms / alone_ms,
        }  # fmt: skip

    def _small(self, running: Running, number: int) -> float:
        return running.rerank(f"question {number}", (f"an answer {number} of four words",))


def resident_mb(running: Running) -> float:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{running.pid}/statm").read_text().split()[1]) * 4096 / 1e6
    return 0.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.lists", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, nargs="?", default=Path("models/mini-Q8_0.gguf"), help="GGUF file")
    parser.add_argument("--passages", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="default: bench/results")
    arguments = parser.parse_args(argv)
    machine = describe_machine(Path(sys.executable), "bench.lists")
    rows = [Measurement(arguments.file).row(count) for count in arguments.passages]
    lines = [
        f"# Long lists of four words each with {arguments.file.name}", "",
        f"`{machine['command']}`, {machine['date']}, commit {machine['commit']}, {machine['cpu']}", "",
        *report.table(rows, COLUMNS),
    ]  # fmt: skip
    print("\n".join(report.write_lines(arguments.out, "lists", lines, {"machine": machine, "rows": rows})))
    return 0


if __name__ == "__main__":
    sys.exit(main())
