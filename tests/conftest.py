"""Fixtures that several test files share: tiny checkpoints, their GGUF files and the engines that score with them.

Each checkpoint is made and converted once for the whole run, through the command line that a user types.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import guard  # noqa: E402

# Before anything is imported that looks for its folders, and before anything is started.
GUARD = guard.Guard()
GUARD.install()

import checkpoints  # noqa: E402
from server_process import ServerProcess  # noqa: E402

import rerank_server  # noqa: E402

# What is tested is llama.cpp by itself; test_accel.py alone asks for the int8 engine, which has another tolerance.
ACCEL_LIBRARY = rerank_server.ACCEL_LIBRARY
rerank_server.ACCEL_LIBRARY = Path("absent.so")
os.environ["RERANK_ACCEL"] = "off"

ARCHITECTURES = ("xlmr", "bert", "modernbert", "bi", "gemma", "qwen3", "qwen2", "zerank")
PROMPTED = ("gemma", "qwen3", "qwen2", "zerank")  # language models: the pairs of a query share their beginning
CONVERT_TIMEOUT_S = 120

FUZZED: defaultdict[str, Counter[str]] = defaultdict(Counter)  # what was tried, for the end of the report

Gguf = Callable[..., Path]
EngineOf = Callable[[str], rerank_server.Engine]


@pytest.fixture(autouse=True)
def nothing_is_installed() -> Iterator[None]:
    """Fails the test that calls an installer, even where the failure of that call is not looked at."""
    yield
    if calls := GUARD.calls():
        pytest.fail(f"tests install nothing, and this one called: {calls}")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for name, counts in FUZZED.items():
        shown = ", ".join(f"{count} {what}" for what, count in counts.items())
        terminalreporter.write_line(f"fuzzed {name}: {shown}")
    skipped = terminalreporter.stats.get("skipped", ())
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped {count:3}: {reason}")


def pytest_unconfigure() -> None:
    GUARD.remove()


def convert(checkpoint: Path, out: Path, *quantizations: str) -> list[Path]:
    """`python -m convert` on a checkpoint directory; returns the files it wrote, by name."""
    command = [sys.executable, "-m", "convert", str(checkpoint), "--out", str(out), "--quant", *quantizations]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=CONVERT_TIMEOUT_S)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return sorted(out.glob("*.gguf"))


def load_engine(file: Path, max_length: int, ubatch: int = 512) -> rerank_server.Engine:
    """With one thread: two gain nothing on a tiny model, and wait for each other where the machine is busy."""
    return rerank_server.load_engine(file, rerank_server.Settings(max_length=max_length, ubatch=ubatch, threads=1))


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name of ARCHITECTURES -> directory of its tiny checkpoint."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = getattr(checkpoints, f"make_{name}")(tmp_path_factory.mktemp("checkpoints") / f"tiny-{name}")
        return made[name]
    return make


@pytest.fixture(scope="session")
def gguf_of(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Gguf:
    """(name of ARCHITECTURES, quantisation = "F32") -> its converted file."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, quantization: str = "F32") -> Path:
        key = (name, quantization)
        if key not in made:
            (made[key],) = convert(checkpoint_of(name), tmp_path_factory.mktemp("gguf"), quantization)
        return made[key]
    return make


@pytest.fixture(scope="session")
def engine_of(gguf_of: Gguf) -> Iterator[EngineOf]:
    """name of ARCHITECTURES -> an engine on its F32 file that takes pairs as long as the model does."""
    engines: dict[str, rerank_server.Engine] = {}

    def load(name: str) -> rerank_server.Engine:
        if name not in engines:
            engines[name] = load_engine(gguf_of(name), rerank_server.MAX_MAX_LENGTH_TOKENS)
        return engines[name]
    yield load
    for engine in engines.values():
        engine.close()


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """The reference's answers for each of ARCHITECTURES, made by tests/golden/make_golden.py."""
    folder = Path(__file__).resolve().parent / "golden"
    return {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def mini_server() -> Iterator[str]:
    """URL of a server with the real mini model, which `make test` makes before it runs the tests."""
    file = ROOT / "models" / "mini-Q8_0.gguf"
    if not file.is_file():
        pytest.skip(f"{file} is not there: `make mini` makes it")
    server = ServerProcess("--m3", file)
    yield server.url
    assert server.stop() == 0


@pytest.fixture(scope="session")
def tiny_server(gguf_of: Gguf) -> Iterator[ServerProcess]:
    """A server with the tiny m3 and gemma, for long pairs."""
    files = ("--m3", gguf_of("xlmr"), "--gemma", gguf_of("gemma"))
    server = ServerProcess(*files, "--max-length", "8192", "--threads", "1")
    yield server
    assert server.stop() == 0
