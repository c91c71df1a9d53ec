"""`make bench`: the served model on this machine, over HTTP: pairs per second, latency, time to ready, memory.

Starts `rerank_server.py` with the models it finds (or the file given), sends lists of 1, 10 and 100 passages of mixed
length, several times each, and prints medians with their spread. Prints a Markdown table; --json writes the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm

SERVER = Path(__file__).resolve().parent.parent / "rerank_server.py"
READY_TIMEOUT_S = 120
WORDS = (
    "the of and in a to was is for on as by with that from at his it an were are which this also be has had first one "
    "their its new after but who not they have city river species university music war film school station season team"
).split()


class RunningServer:
    """A server process on a free port; `seconds_to_ready` counts from its start to its first answer."""

    def __init__(self, arguments: list[str]) -> None:
        started = time.perf_counter()
        command = [sys.executable, str(SERVER), "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.url = self._read_url()
        requests.get(f"{self.url}/health", timeout=READY_TIMEOUT_S).raise_for_status()
        self.seconds_to_ready = time.perf_counter() - started

    def _read_url(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if match := re.search(r"listening on (\S+)", line):
                return match.group(1)
        raise SystemExit("the server did not start; run it by hand to see why")

    def resident_mb(self) -> float:
        """Resident memory now (Linux), in MB; 0 where it cannot be read."""
        try:
            pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        except OSError:
            return 0.0
        return int(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def make_passages(count: int, generator: random.Random) -> list[str]:
    """Passages of 20 to 200 words: speed depends on the lengths, not on the words."""
    return [" ".join(generator.choices(WORDS, k=generator.randint(20, 200))) for _ in range(count)]


def measure(server: RunningServer, n_passages: int, n_runs: int, use_llm: bool) -> dict[str, Any]:
    """Medians over n_runs requests of n_passages distinct passages each."""
    generator = random.Random(n_passages)
    seconds = []
    for run in tqdm(range(n_runs + 1), desc=f"{n_passages} passages", leave=False):
        body = {"query": f"question {run}", "passages": make_passages(n_passages, generator), "use_llm": use_llm}
        started = time.perf_counter()
        requests.post(f"{server.url}/rerank", json=body, timeout=600).raise_for_status()
        seconds.append(time.perf_counter() - started)
    seconds = sorted(seconds[1:])  # the first request warms up
    return {
        "passages": n_passages,
        "pairs_per_second": n_passages / statistics.median(seconds),
        "p50_ms": 1000 * statistics.median(seconds),
        "p95_ms": 1000 * seconds[min(len(seconds) - 1, int(0.95 * len(seconds)))],
        "spread_ms": 1000 * (seconds[-1] - seconds[0]),
        "resident_mb": server.resident_mb(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--runs", type=int, default=10, help="requests for each list size (default 10)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 10, 100], help="passages in a request")
    parser.add_argument("--use-llm", action="store_true", help="measure the gemma role")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments, server_arguments = parser.parse_known_args()
    server = RunningServer(server_arguments)
    try:
        models = requests.get(f"{server.url}/health", timeout=30).json()["models"]
        model = models["gemma" if arguments.use_llm else "m3"]
        rows = [measure(server, size, arguments.runs, arguments.use_llm) for size in arguments.sizes]
    finally:
        server.close()
    print(f"{model['file']} ({model['quantization']}), ready in {server.seconds_to_ready:.1f} s\n")
    print("| passages | pairs/s | p50 ms | p95 ms | spread ms | resident MB |\n|---|---|---|---|---|---|")
    for row in rows:
        print("| {passages} | {pairs_per_second:.1f} | {p50_ms:.1f} | {p95_ms:.1f} | {spread_ms:.1f} "
              "| {resident_mb:.0f} |".format(**row))  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps({"model": model, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
