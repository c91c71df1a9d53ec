"""python -m bench.cluster FILE.gguf: throughput against replicas on Ray, beside the single server, on this machine.

Each row is a fresh start: the single server, Ray Serve with one replica and more, and a batch job with as many actors,
every one with one thread and llama.cpp's own kernels. The same requests each time, from twice as many clients as there
are replicas. Then what a billion pairs cost on paper, by the figures of bench/results/m3.json. Writes
bench/results/cluster.md and .json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import report
from bench.engines import Running, Setup, engines_of
from bench.machine import describe_machine
from bench.texts import Request, made_lists
from cluster.local import ask, config_of, environment_of, local_cluster, served

PASSAGES = 4  # in a request, and rows in a part of the batch job
POLL_S = 0.02
COLUMNS = {
    "what": ("", "{}"),
    "replicas": ("replicas", "{}"),
    "pairs_per_second": ("pairs/s", "{:.2f}"),
    "per_replica": ("per replica", "{:.2f}"),
    "replica_mb": ("MB of a replica", "{}"),
    "ray_mb": ("MB of Ray's own", "{}"),
}
N_PAIRS = 1_000_000_000
CORES = 32  # of a machine on paper
BYTES_PER_TOKEN = 5  # of English some 4, and a line of JSON has its names and quotes
CORES_PER_REPLICA = 2  # as measured in bench/results/m3.json
OUTPUT_BYTES = 60  # of a pair in the Parquet file; an upper bound: its columns before compression


def requests_of(n: int) -> list[Request]:
    """Each passage with the query of its own list; every text once."""
    lists = itertools.islice(made_lists(), n)
    return [Request(query, tuple(passages[:PASSAGES])) for query, passages in lists]


def measure_served(ask: Callable[[Request], Any], requests: Sequence[Request], n_clients: int) -> float:
    """Pairs per second, until the last client has its answer."""
    for request in requests[:n_clients]:  # warm
        ask(request)
    started = time.perf_counter()
    with ThreadPoolExecutor(n_clients) as clients:
        list(clients.map(ask, requests[n_clients:]))
    n_pairs = sum(len(request.passages) for request in requests[n_clients:])
    return n_pairs / (time.perf_counter() - started)


def single(file: Path, requests: Sequence[Request]) -> dict[str, Any]:
    setup = Setup("m3", {"": file}, None, Path(sys.executable), ("--threads", "1", "--cache-mb", "0"))
    running = Running(engines_of("m3", [""], [])[0], setup)
    try:
        rate = measure_served(lambda request: running.rerank(request.query, request.passages), requests, 2)
    finally:
        running.close()
    return {"what": "single server", "replicas": 1, "pairs_per_second": rate, "replica_mb": "", "ray_mb": ""}


def on_serve(nodes: Any, file: Path, requests: Sequence[Request], n: int, folder: Path) -> dict[str, Any]:
    config = config_of({"m3": str(file), "cache_mb": 0, "accel": "off"}, {"M3": n})
    with served(nodes, config, folder) as url:
        rate = measure_served(lambda request: ask(url, request.query, request.passages), requests, 2 * n)
        memory = memory_mb("ServeReplica:rerank:M3", n)
    return {"what": "Ray Serve", "replicas": n, "pairs_per_second": rate, **memory}


def in_batch(nodes: Any, file: Path, requests: Sequence[Request], n: int, folder: Path) -> dict[str, Any]:
    """From the first part that is done to the last: without the start of the actors."""
    pairs = folder / f"pairs-{n}.jsonl"
    rows = [{"query": request.query, "passage": passage} for request in requests for passage in request.passages]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = folder / f"scores-{n}.parquet"
    command = [sys.executable, "-m", "cluster.batch", str(pairs), str(output), "--set", f"m3={file}", "--set",
               "accel=off", "--actors", str(n), "--threads", "1", "--part-rows", str(PASSAGES)]  # fmt: skip
    job = subprocess.Popen(command, env=environment_of(nodes), stderr=subprocess.DEVNULL)
    times: list[float] = []
    memory: dict[str, int] = {}
    while job.poll() is None:
        done = len(list(folder.glob(f"{output.name}.parts/*.parquet")))
        times += [time.perf_counter()] * (done - len(times))
        if done > len(requests) // 2 and not memory:
            memory = memory_mb("ScoreParts", n)
        time.sleep(POLL_S)
    if job.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed")
    rate = PASSAGES * (len(times) - n) / (times[-1] - times[n - 1])
    return {"what": "batch job", "replicas": n, "pairs_per_second": rate, **memory}


def memory_mb(title: str, n: int) -> dict[str, int]:
    """Resident memory of a replica, and of Ray's own processes together."""
    replicas: list[float] = []
    others: list[float] = []
    for name, mb in ray_processes():
        (replicas if title in name else others).append(mb)
    return {"replica_mb": round(sum(replicas) / n), "ray_mb": round(sum(others))}


def ray_processes() -> Iterator[tuple[str, float]]:
    """(command line, resident MB) of each process of Ray on this machine."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            resident = int((folder / "statm").read_text().split()[1]) * 4096 / 1e6
        except OSError:  # it ended meanwhile
            continue
        if name.startswith("ray::") or "/ray/" in name:
            yield name, resident


@contextmanager
def fresh(n_cpus: int) -> Iterator[tuple[Any, Path]]:
    with local_cluster(1, n_cpus) as nodes, tempfile.TemporaryDirectory() as folder:
        yield nodes, Path(folder)


def paper() -> list[str]:
    """The calculation, from what was measured on two cores."""
    measured = json.loads((report.RESULTS / "m3.json").read_text())
    (row,) = [row for row in measured["rows"] if row["engine"] == "rerank-server Q6_K" and row["scenario"] == "10"]
    rate, resident_mb = row["pairs_per_second"], row["resident_mb"]
    per_machine = rate * CORES / CORES_PER_REPLICA
    replicas = CORES // CORES_PER_REPLICA
    text_bytes = measured["mean_tokens_per_pair"] * BYTES_PER_TOKEN
    hours = N_PAIRS / per_machine / 3600
    return [
        "## A billion pairs, on paper", "",
        f"Measured (m3.json): {rate:.2f} pairs/s of {measured['mean_tokens_per_pair']:.0f} tokens on "
        f"{CORES_PER_REPLICA} cores, {resident_mb:,.0f} MB resident. Taken for granted, not measured: machines with "
        f"{CORES} such cores, on which {replicas} actors of {CORES_PER_REPLICA} threads do {replicas} times as "
        "much. Memory bandwidth that cores share makes that less; measure one machine first.", "",
        f"- rate of a machine: {replicas} x {rate:.2f} = {per_machine:.1f} pairs/s",
        f"- work: 10^9 / {per_machine:.1f} / 3,600 = {hours:,.0f} machine-hours, {hours * CORES:,.0f} core-hours",
        f"- time: {hours / 24 / 10:,.0f} days on 10 machines, {hours / 24 / 100:,.1f} days on 100, "
        f"{hours / 1000:,.1f} hours on 1,000",
        f"- memory of a machine: at most {replicas} x {resident_mb:,.0f} MB = {replicas * resident_mb / 1000:,.1f} GB "
        "(the mapped file in it is shared), and what Ray takes (the table above)",
        f"- network: about {text_bytes:,.0f} bytes of text for a pair in ({BYTES_PER_TOKEN} a token), "
        f"{N_PAIRS * text_bytes / 1e12:,.1f} TB in all; at most {OUTPUT_BYTES} bytes out, "
        f"{N_PAIRS * OUTPUT_BYTES / 1e9:,.0f} GB. A machine reads "
        f"{per_machine * text_bytes / 1000:,.0f} kB/s: no network is a limit here, the cores are",
        "- parts: --part-rows 10000 makes 100,000 files, each some "
        f"{10_000 / rate / 3600:,.1f} hours of an actor; that is what a machine that dies has done in vain",
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cluster", description="Throughput against replicas.")
    parser.add_argument("file", type=Path, help="GGUF file for the m3 role")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--requests", type=int, default=16, help=f"of {PASSAGES} passages each (default: 16)")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="default: bench/results")
    arguments = parser.parse_args(argv)
    machine, file = describe_machine(Path(sys.executable), "bench.cluster"), arguments.file.resolve()
    requests = requests_of(arguments.requests)
    rows = [single(file, requests)]
    with fresh(max(arguments.replicas)) as (nodes, folder):
        for measure in (on_serve, in_batch):
            rows += [measure(nodes, file, requests, n, folder) for n in arguments.replicas]
    for row in rows:
        row["per_replica"] = row["pairs_per_second"] / row["replicas"]
    print("\n".join(write(file, machine, rows, arguments.out)))
    return 0


def write(file: Path, machine: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> list[str]:
    lines = [
        "# On Ray", "", f"`{machine['command']}`, {machine['date']}, commit {machine['commit']}; {machine['cpus']} x "
        f"{machine['cpu']}, load at the start {machine['load_at_start']}; {file.name}", "",
        "Every replica has one thread and llama.cpp's own kernels; all of them, the proxy, the ingress and the clients "
        "share these cores. One run of each row.", "",
        *report.table(rows, COLUMNS), "", *paper(),
    ]  # fmt: skip
    return report.write_lines(folder, "cluster", lines, {"file": file.name, "machine": machine, "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
