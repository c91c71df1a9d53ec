"""python -m bench.scaling FILE.gguf: what a request costs against its number of passages, their length, and clients.

Each axis is varied alone. Where a curve bends, something grows that should not: cost per pair should not depend on how
many pairs there are, cost per token only a little on the length (attention), throughput not at all on the clients.
Writes bench/results/scaling-NAME.md, .json and .png.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

import rerank_server
from bench import report
from bench.engines import Running, Setup, engines_of
from bench.machine import describe_machine
from bench.texts import SEED, Request, make_passage

WORDS, PASSAGES, CLIENTS = 70, 8, 1  # what stays where another axis is varied
COLUMNS = {
    "axis": ("varied", "{}"),
    "value": ("value", "{}"),
    "tokens": ("tokens", "{:,}"),
    "ms": ("ms", "{:,.1f}"),
    "ms_min": ("min", "{:,.1f}"),
    "ms_max": ("max", "{:,.1f}"),
    "ms_per_pair": ("ms per pair", "{:.2f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
}
CountTokens = Callable[[Request], int]


def points(arguments: argparse.Namespace) -> list[tuple[str, int, tuple[int, int, int]]]:
    """(axis, its value, (words in a passage, passages in a request, clients))."""
    return [
        *(("passages", value, (WORDS, value, CLIENTS)) for value in arguments.passages),
        *(("words", value, (value, PASSAGES, CLIENTS)) for value in arguments.words),
        *(("clients", value, (WORDS, PASSAGES, value)) for value in arguments.clients),
    ]


def measure(running: Running, count: CountTokens, shape: tuple[int, int, int], n_runs: int) -> dict[str, Any]:
    """Median wall time until all clients of a point have their answer; new texts in every run."""
    words, n_passages, n_clients = shape
    generator = random.Random(SEED)
    seconds, tokens = [], 0
    for _ in range(n_runs):
        requests = [make_request(generator, words, n_passages) for _ in range(n_clients)]
        tokens = sum(map(count, requests))
        started = time.perf_counter()
        with ThreadPoolExecutor(n_clients) as clients:
            list(clients.map(lambda request: running.rerank(request.query, request.passages), requests))
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    return {
        "tokens": tokens, "ms": 1000 * median, "ms_min": 1000 * min(seconds), "ms_max": 1000 * max(seconds),
        "ms_per_pair": 1000 * median / (n_passages * n_clients), "tokens_per_second": tokens / median,
    }  # fmt: skip


def make_request(generator: random.Random, words: int, n_passages: int) -> Request:
    return Request(
        make_passage(generator, 10), tuple(make_passage(generator, words) for _ in range(n_passages))
    )


def plot(rows: Sequence[dict[str, Any]], title: str, path: Path) -> bool:
    """Tokens/s against each axis. False without matplotlib."""
    pyplot = report.import_pyplot()
    if pyplot is None:
        return False
    axes_names = list(dict.fromkeys(row["axis"] for row in rows))
    figure, axes = pyplot.subplots(1, len(axes_names), figsize=(4 * len(axes_names), 3.2), squeeze=False)
    for axis, name in zip(axes[0], axes_names, strict=True):
        chosen = [row for row in rows if row["axis"] == name]
        axis.plot([row["value"] for row in chosen], [row["tokens_per_second"] for row in chosen], marker="o")
        axis.set_xscale("log", base=2)
        axis.set_xticks([row["value"] for row in chosen], [str(row["value"]) for row in chosen])
        axis.set_ylim(0, 1.1 * max(row["tokens_per_second"] for row in rows))
        axis.set_xlabel(name)
        axis.set_ylabel("tokens/s")
    figure.suptitle(title, fontsize=10)
    report.save(figure, pyplot, path)
    return True


def token_counter(file: Path, max_length: int) -> tuple[CountTokens, str]:
    """A request's tokens by the file's own tokenizer, and the role that it serves."""
    settings = rerank_server.Settings(max_length=max_length, ubatch=32)
    engine = rerank_server.load_engine(file, settings)
    role = "gemma" if engine.description.kind == "yes-logit" else "m3"
    return lambda request: sum(len(pair.ids) for pair in engine.pairs.make(request.query, request.passages)), role


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description="How the cost of a request grows.")
    parser.add_argument("file", type=Path, help="GGUF file to serve")
    parser.add_argument("--passages", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--words", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256], help="in each passage")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--runs", type=int, default=3, help="measurements of each point; the median counts (default 3)")
    parser.add_argument("--max-length", type=int, default=1024, help="longest pair in tokens (default 1024)")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="default: bench/results")
    arguments = parser.parse_args(argv)
    count, role = token_counter(arguments.file, arguments.max_length)
    setup = Setup(role, {"": arguments.file}, None, Path(sys.executable), ("--max-length", str(arguments.max_length)))
    machine = describe_machine(Path(sys.executable), "bench.scaling")
    running = Running(engines_of(role, [""], [])[0], setup)
    try:
        measure(running, count, (WORDS, PASSAGES, CLIENTS), 1)
        rows = [
            {"axis": axis, "value": value, **measure(running, count, shape, arguments.runs)}
            for axis, value, shape in tqdm(points(arguments), leave=False)
        ]
    finally:
        running.close()
    print("\n".join(write(arguments.file, machine, rows, arguments.out)))
    return 0


def write(file: Path, machine: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> list[str]:
    lines = [
        f"# scaling of {file.name}", "", f"`{machine['command']}`, {machine['date']}, {machine['cpus']} x "
        f"{machine['cpu']}; {WORDS} words in a passage, {PASSAGES} passages and {CLIENTS} client unless varied", "",
        *report.table(rows, COLUMNS),
    ]  # fmt: skip
    name = f"scaling-{file.stem}"
    report.write_lines(folder, name, lines, {"file": file.name, "machine": machine, "rows": rows})
    plot(rows, file.stem, folder / f"{name}.png")
    return lines


if __name__ == "__main__":
    sys.exit(main())
