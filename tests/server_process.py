"""A server process for tests, as a user starts it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STOP_TIMEOUT_S = 40


class ServerProcess:
    """`python rerank_server.py --port 0 ARGUMENTS`, waited for until it listens. `report` is what it printed."""

    def __init__(self, *arguments: str | Path, stderr: Any = subprocess.PIPE, **environment: str) -> None:
        """stderr: where a log goes that is too long for a pipe that nobody reads."""
        command = [sys.executable, str(ROOT / "rerank_server.py"), "--port", "0", *map(str, arguments)]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, env={**os.environ, **environment}
        )
        assert self._process.stdout is not None
        lines: list[str] = []
        for line in self._process.stdout:
            lines.append(line)
            if "curl " in line:
                break
        self.report = "".join(lines)
        found = re.search(r"listening on (\S+)", self.report)
        assert found, f"{self.report}\n{self._process.communicate(timeout=10)}"
        self.url, self.pid = found.group(1), self._process.pid

    def rerank(self, path: str = "/rerank", **body: Any) -> tuple[int, Any, dict[str, str]]:
        request = urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode())
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer), dict(answer.headers)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error), dict(error.headers)

    def health(self) -> Any:
        with urllib.request.urlopen(f"{self.url}/health", timeout=30) as answer:
            return json.load(answer)

    def peak_bytes(self) -> int:
        """The most that was resident since its start."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))

    def stop(self, number: int = signal.SIGTERM) -> int:
        self._process.send_signal(number)
        return self.wait()

    def is_running(self) -> bool:
        return self._process.poll() is None

    def wait(self) -> int:
        """Until it has stopped: its exit status."""
        _, self.log = self._process.communicate(timeout=STOP_TIMEOUT_S)
        return self._process.returncode

    def kill(self) -> None:
        """If it still runs."""
        self._process.kill()
        self._process.wait()
