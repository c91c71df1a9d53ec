"""A cluster of three nodes on this machine: deploys the endpoint, asks it, and scores a file. make cluster-demo"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cluster.local import ask, config_of, environment_of, local_cluster, served

N_NODES, CPUS_PER_NODE, N_PAIRS = 3, 2, 2000
QUERY = "How long do cats sleep in a day?"
PASSAGES = ["Cats sleep between 12 and 16 hours a day, and kittens sleep even longer.",
            "A cat needs fresh water every day.", "The stock market closed lower on Friday."]  # fmt: skip


def main() -> None:
    say(f"starting {N_NODES} nodes of {CPUS_PER_NODE} CPUs each on this machine")
    with local_cluster(N_NODES, CPUS_PER_NODE) as nodes, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("deploying cluster/config.yaml with two replicas of M3 (serve run)")
        with served(nodes, config_of({}, {"M3": 2}), folder) as url:
            say(f"POST {url}/rerank: {ask(url, QUERY, PASSAGES)}")
        say(f"scoring {N_PAIRS} pairs: python -m cluster.batch pairs.jsonl scores.parquet")
        score_file(nodes, folder)


def say(text: str, started: float = time.monotonic()) -> None:
    print(f"[{time.monotonic() - started:5.1f} s] {text}", flush=True)


def score_file(nodes: Any, folder: Path) -> None:
    import pyarrow.parquet as pq

    pairs = ({"query": QUERY, "passage": f"{PASSAGES[n % 3]} ({n})", "passage_id": str(n)} for n in range(N_PAIRS))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    command = [sys.executable, "-m", "cluster.batch", str(folder / "pairs.jsonl"), str(folder / "scores.parquet"),
               "--threads", "1", "--part-rows", "100"]  # fmt: skip
    subprocess.run(command, env=environment_of(nodes), check=True)
    best = pq.read_table(folder / "scores.parquet").sort_by([("logit", "descending")])
    for row in best.slice(0, 3).to_pylist():
        say(json.dumps(row))


if __name__ == "__main__":
    main()
