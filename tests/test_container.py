"""The container image that `make image` built: its server, as its own user, beside the host's server."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import EngineOf, Gguf
from guard import needs
from test_the_server import PASSAGES, QUERY, health, main, post

import rerank_server

ROOT = Path(__file__).resolve().parent.parent
IMAGE = "rerank-server:latest"
START_TIMEOUT_S, STOP_TIMEOUT_S = 60, 60
MAX_IMAGE_BYTES = 200_000_000
LOGIT_TOLERANCE = 0.2  # tiny random models; the int8 engine, which the host's does not use here, drifts most
SCORE_TOLERANCE = 0.01  # the image's CPU library may be another variant than the host's build

pytestmark = pytest.mark.container


def run(*command: str) -> str:
    environment = {**os.environ, "STORAGE_DRIVER": os.environ.get("STORAGE_DRIVER", "vfs")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


class Buildah:
    """A container in a chroot: no daemon, the host's network, the image's user and environment."""

    def __init__(self) -> None:
        self.name = run("buildah", "from", "--pull-never", IMAGE)
        self.root = Path(run("buildah", "mount", self.name))
        self.config = json.loads(run("buildah", "inspect", self.name))["Docker"]["config"]

    def command(self, *arguments: str, models: Path | None = None, **environment: str) -> list[str]:
        options = [f"--env={name}={value}" for name, value in environment.items()]
        options += [f"--volume={models}:/models:ro"] if models else []
        return ["buildah", "run", "--isolation", "chroot", *options, self.name, "--", *arguments]

    def close(self) -> None:
        run("buildah", "rm", self.name)


@pytest.fixture(scope="module")
def container() -> Iterator[Buildah]:
    needs("buildah")
    needs("root")
    try:
        made = Buildah()
    except AssertionError:
        pytest.skip("no image rerank-server:latest (make image)")
    with contextlib.closing(made):
        if (made.root / "app/rerank_server.py").read_bytes() != (ROOT / "rerank_server.py").read_bytes():
            pytest.skip("the image rerank-server:latest is of another version (make image)")
        yield made


class Serving:
    """The container's server. pid: of the server itself, not of what started it."""

    def __init__(self, container: Buildah, models: Path | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        entrypoint = container.config["Entrypoint"]
        command = container.command(*entrypoint, models=models, RERANK_PORT=self.port, RERANK_HOST="127.0.0.1")
        self.process = subprocess.Popen(command, env={**os.environ, "STORAGE_DRIVER": "vfs"})
        try:
            until_ready(self.url, self.process)
            self.pid = server_of(self.port)
        except BaseException:
            self.process.kill()
            raise

    def stop(self) -> int:
        """SIGTERM to the server; the container's exit status."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(url + "/ready", timeout=5):
            return
        time.sleep(0.2)
    pytest.fail(f"the container's server did not become ready; exit status {process.poll()}")


def server_of(port: str) -> int:
    """The process whose environment has this port and that runs the image's server."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            is_server = arguments[0].endswith(b"python3") and arguments[1:2] == [b"/app/rerank_server.py"]
            if is_server and f"RERANK_PORT={port}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
    raise LookupError(f"no process serves port {port}")


def test_the_image_serves_its_users(container: Buildah, mini_server: str) -> None:
    """Would break: the three lines with which a user starts, and scores that depend on where the server runs."""
    with Serving(container) as server:
        assert main(server.url) == 0
        for path in ("/", "/docs", "/openapi.json"):  # files of web/; 404 without them
            urllib.request.urlopen(f"{server.url}{path}", timeout=30).close()
        inside = post(server.url, {"query": QUERY, "passages": PASSAGES})[1]
        outside = post(mini_server, {"query": QUERY, "passages": PASSAGES})[1]
        assert max(abs(a - b) for a, b in zip(inside, outside, strict=True)) < SCORE_TOLERANCE, (inside, outside)
        assert Path(f"/proc/{server.pid}").stat().st_uid == int(container.config["User"].split(":")[0]) != 0
        run(*container.command(*container.config["Healthcheck"]["Test"][1:], RERANK_PORT=server.port))


def test_it_takes_one_cpu_library_and_the_int8_engine(container: Buildah) -> None:
    """A portable build without its libraries for newer CPUs is several times slower, and says nothing."""
    with Serving(container) as server:
        mapped = {Path(line.split()[-1]).name for line in Path(f"/proc/{server.pid}/maps").read_text().splitlines()}
        (variant,) = [name for name in mapped if name.startswith("libggml-cpu")]
        flags = Path("/proc/cpuinfo").read_text().split()
        if "avx512_vnni" in flags:
            assert re.search("zen4|icelake|cascadelake|cooperlake|sapphirerapids", variant), variant
            assert health(server.url)["accel"]["used"]
        elif "avx2" in flags:
            assert re.search("haswell|alderlake|skylakex|cannonlake|piledriver", variant), variant


def test_m3_and_gemma_are_read_from_a_mounted_folder(
    container: Buildah, gguf_of: Gguf, engine_of: EngineOf, tmp_path: Path
) -> None:
    tmp_path.chmod(0o755)
    for role, architecture in (("m3", "xlmr"), ("gemma", "gemma")):
        shutil.copy(gguf_of(architecture), tmp_path / f"bge-reranker-v2-{role}-F32.gguf")
    with Serving(container, tmp_path) as server:
        for use_llm, architecture in ((False, "xlmr"), (True, "gemma")):
            engine = engine_of(architecture)
            logits = rerank_server.score_all(engine, engine.pairs.make(QUERY, PASSAGES))
            body = {"query": QUERY, "passages": PASSAGES, "use_llm": use_llm, "raw_scores": True}
            answered = post(server.url, body)[1]
            assert answered == pytest.approx(logits, abs=LOGIT_TOLERANCE), architecture


def test_sigterm_lets_it_answer_what_is_in_flight_and_ends_with_status_0(container: Buildah) -> None:
    passages = [f"{PASSAGES[0]} {n}" for n in range(300)]
    server = Serving(container)
    with ThreadPoolExecutor(1) as client:
        answer = client.submit(post, server.url, {"query": QUERY, "passages": passages})
        time.sleep(0.3)
        status = server.stop()
        code, scores, _ = answer.result()
    assert status == 0
    assert (code, len(scores)) == (200, len(passages))


def test_the_image_is_small_and_has_nothing_to_build_with(container: Buildah) -> None:
    files = [path for path in container.root.rglob("*") if path.is_file() and not path.is_symlink()]
    assert sum(path.stat().st_size for path in files) < MAX_IMAGE_BYTES
    for name in ("gcc", "g++", "cc", "pip", "sh", "apt-get"):
        assert not any(path.name == name for path in files), name
    assert not any("tests" in path.parts for path in files)


def test_healthcheck_fails_where_no_server_answers() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment = {**os.environ, "RERANK_PORT": str(free.getsockname()[1])}
        command = [sys.executable, str(ROOT / "container" / "healthcheck.py")]
        assert subprocess.run(command, env=environment, capture_output=True, timeout=60).returncode == 1
