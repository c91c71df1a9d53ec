"""A cluster of several nodes on this machine, for the demonstration, the measurements and the tests: every node is a
raylet of its own with its own object store, as on another machine, but they share its cores and its disk."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

import cluster  # noqa: F401  first: it sets what Ray reads when it is imported

# isort: split
import ray
from ray.cluster_utils import Cluster

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "cluster" / "config.yaml"
OBJECT_STORE_BYTES = 80_000_000  # Ray's least; what is sent between the processes here are texts and scores
START_TIMEOUT_S, ANSWER_TIMEOUT_S = 180, 600
POLL_S = 0.2


@contextlib.contextmanager
def local_cluster(n_nodes: int, cpus_per_node: int) -> Iterator[Any]:
    """A ray.cluster_utils.Cluster; every process of it is gone when the `with` ends. cpus_per_node: what Ray may
    reserve, whatever the machine has. Its nodes find this project wherever it lies."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    nodes = Cluster(initialize_head=True, head_node_args=node_options(cpus_per_node))
    try:
        for _ in range(n_nodes - 1):
            nodes.add_node(**node_options(cpus_per_node))
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()


def node_options(n_cpus: int) -> dict[str, Any]:
    return {"num_cpus": n_cpus, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}


def environment_of(nodes: Any) -> dict[str, str]:
    """For a command that uses the cluster: `serve` is this interpreter's."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "RAY_ADDRESS": nodes.address, "PATH": path}


def config_of(arguments: dict[str, Any], n_replicas: dict[str, int]) -> dict[str, Any]:
    """The committed config with these settings of the server, so many replicas of one thread each by deployment, and
    one proxy on a free port."""
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    config |= {"http_options": {"host": "127.0.0.1", "port": _free_port()}, "proxy_location": "HeadOnly"}
    ingress = {"name": "Ingress", "num_replicas": 1, "ray_actor_options": {"num_cpus": 0}}
    scorers = [{"name": name, "num_replicas": count, "ray_actor_options": {"num_cpus": 1}}
               for name, count in n_replicas.items()]  # fmt: skip
    config["applications"][0] |= {"args": arguments, "deployments": [ingress, *scorers]}
    return config


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@contextlib.contextmanager
def served(nodes: Any, config: dict[str, Any], folder: Path) -> Iterator[str]:
    """The URL of `serve run` with a config, once it is ready. folder: for the config's file. Raises RuntimeError."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    run(nodes, "serve", "run", "--non-blocking", str(file))
    url = f"http://127.0.0.1:{config['http_options']['port']}"
    _wait_until_ready(url)
    try:
        yield url
    finally:
        run(nodes, sys.executable, "-c", "import ray, ray.serve; ray.init(); ray.serve.shutdown()")


def ask(url: str, query: str, passages: Sequence[str]) -> list[float]:
    body = json.dumps({"query": query, "passages": passages}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{url}/rerank", body), timeout=ANSWER_TIMEOUT_S) as answer:
        scores: list[float] = json.load(answer)
        return scores


def run(nodes: Any, *command: str) -> str:
    """Its standard output. Raises RuntimeError with the end of what it said."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment_of(nodes))
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _is_ready(url):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{url} was not ready within {START_TIMEOUT_S} s; see Ray's log")
        time.sleep(POLL_S)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=START_TIMEOUT_S):
            return True
    except (urllib.error.URLError, ConnectionError):
        return False
