"""The container image that `make image` built: its server, as its own user, beside the host's server."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_the_server import PASSAGES, QUERY, main, post

ROOT = Path(__file__).resolve().parent.parent
IMAGE = "rerank-server:latest"
START_TIMEOUT_S = 60
MAX_IMAGE_BYTES = 200_000_000
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

    def command(self, *arguments: str, **environment: str) -> list[str]:
        variables = [f"--env={name}={value}" for name, value in environment.items()]
        return ["buildah", "run", "--isolation", "chroot", *variables, self.name, "--", *arguments]

    def close(self) -> None:
        run("buildah", "rm", self.name)


@pytest.fixture(scope="module")
def container() -> Iterator[Buildah]:
    if shutil.which("buildah") is None or os.geteuid() != 0:
        pytest.skip("buildah is not here, or may not make a container: it needs root")
    try:
        made = Buildah()
    except AssertionError:
        pytest.skip("no image rerank-server:latest: `make image` builds it")
    with contextlib.closing(made):
        if (made.root / "app/rerank_server.py").read_bytes() != (ROOT / "rerank_server.py").read_bytes():
            pytest.skip("the image rerank-server:latest is of another version: `make image` builds it anew")
        yield made


@contextlib.contextmanager
def serving(container: Buildah) -> Iterator[tuple[str, int]]:
    """URL, and the process id of the server itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = container.command(*container.config["Entrypoint"], RERANK_PORT=port, RERANK_HOST="127.0.0.1")
    with subprocess.Popen(command, env={**os.environ, "STORAGE_DRIVER": "vfs"}) as process:
        try:
            until_ready(f"http://127.0.0.1:{port}", process)
            yield f"http://127.0.0.1:{port}", server_of(port)
        finally:
            with contextlib.suppress(ProcessLookupError, StopIteration):
                os.kill(server_of(port), signal.SIGTERM)
            process.wait(START_TIMEOUT_S)


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
            is_server = arguments[:2] == [b"python3", b"/app/rerank_server.py"]
            if is_server and f"RERANK_PORT={port}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
    raise StopIteration


def test_the_image_serves_its_users(container: Buildah, mini_server: str) -> None:
    """Would break: the three lines with which a user starts, and scores that depend on where the server runs."""
    with serving(container) as (url, pid):
        assert main(url) == 0
        inside = post(url, {"query": QUERY, "passages": PASSAGES})[1]
        outside = post(mini_server, {"query": QUERY, "passages": PASSAGES})[1]
        assert max(abs(a - b) for a, b in zip(inside, outside, strict=True)) < SCORE_TOLERANCE, (inside, outside)
        assert Path(f"/proc/{pid}").stat().st_uid == int(container.config["User"].split(":")[0]) != 0
        port = url.rpartition(":")[2]
        run(*container.command(*container.config["Healthcheck"]["Test"][1:], RERANK_PORT=port))


def test_sigterm_ends_it_with_status_0(container: Buildah) -> None:
    with serving(container) as (_, pid):
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + START_TIMEOUT_S
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not Path(f"/proc/{pid}").exists()


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
