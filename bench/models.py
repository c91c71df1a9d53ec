"""python -m bench.models FILE.gguf ...: what each model costs, side by side, in this process and without HTTP.

Each file is opened in a process of its own and scores the same lists of 10 pairs, with and without the engine of
accel/. Files of true size with random weights are as fast as real ones. Writes bench/results/models.md and .json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rerank_server
from bench import report
from bench.machine import describe_machine

N_PASSAGES = 10
QUERY = "Where does the train to the north leave, number {}?"
TEXT = (
    "The river runs through the old town, where bread and cheese are sold on the market every Saturday morning, and "
    "the trains to the north leave from the small station behind the bridge. "
)
COLUMNS = {
    "file": ("file", "{}"),
    "file_mb": ("MB", "{:,.0f}"),
    "arithmetic": ("computed by", "{}"),
    "tokens": ("tokens of a pair", "{:,.0f}"),
    "tokens_per_s": ("tokens/s", "{:,.0f}"),
    "list_ms": ("list of 10, ms", "{:,.0f}"),
    "resident_mb": ("resident MB", "{:,.0f}"),
}


def measure(file: Path, accel: str, n_runs: int) -> dict[str, Any]:
    """In the process that it is called in. tokens/s counts all tokens of a pair, a shared query's in each."""
    engine = rerank_server.load_engine(file, rerank_server.Settings(accel=accel), is_alone=True)
    seconds, n_tokens = list[float](), 0
    for run in range(n_runs + 1):
        pairs = engine.pairs.make(QUERY.format(run), [f"{n} {TEXT * 5}" for n in range(N_PASSAGES)])
        started = time.perf_counter()
        rerank_server.score_all(engine, pairs)
        seconds.append(time.perf_counter() - started)
        n_tokens = sum(len(pair.ids) for pair in pairs)
    median = statistics.median(seconds[1:])
    row = {
        "file": file.name, "file_mb": file.stat().st_size / 1e6, "arithmetic": engine.arithmetic,
        "tokens": n_tokens / N_PASSAGES, "tokens_per_s": n_tokens / median, "list_ms": 1000 * median,
        "resident_mb": rerank_server.resident_bytes() / 1e6,
    }  # fmt: skip
    engine.close()
    return row


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", type=Path, nargs="+", help="GGUF files")
    parser.add_argument("--runs", type=int, default=5, help="lists (default 5); the median is shown")
    parser.add_argument("--accel", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="default: bench/results")
    arguments = parser.parse_args(argv)
    if arguments.accel:
        print(json.dumps(measure(arguments.files[0], arguments.accel, arguments.runs)))
        return 0
    machine = describe_machine(Path(sys.executable), "bench.models")
    rows = []
    for file in arguments.files:
        for accel in ("off", "auto"):
            command = [sys.executable, "-m", "bench.models", str(file), "--accel", accel]
            command += ["--runs", str(arguments.runs)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    lines = [
        "# Models side by side", "",
        f"`{machine['command']}`, {machine['date']}, commit {machine['commit']}, {machine['cpu']}; medians of "
        f"{arguments.runs} lists", "", *report.table(rows, COLUMNS),
    ]  # fmt: skip
    print("\n".join(report.write_lines(arguments.out, "models", lines, {"machine": machine, "rows": rows})))
    return 0


if __name__ == "__main__":
    sys.exit(main())
