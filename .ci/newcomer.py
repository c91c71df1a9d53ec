"""The README's first command, `make run`, until the server answers the README's request as the README shows.

Needs nothing but the standard library: it is run in a system that has no curl.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
START_TIMEOUT_S = 1800  # compiling takes minutes
SCORE_TOLERANCE = 0.02  # as in tests/test_docs.py


def readme_request() -> tuple[urllib.request.Request, list[float]]:
    """The request of the README's curl command, and the answer below it."""
    url, body = re.findall(r"^curl -s (\S+) .*?-d '(.*?)'\n```", README, re.DOTALL | re.MULTILINE)[0]
    (answer,) = re.findall(r"^```json\n(\[.*?\])\n```", README, re.MULTILINE)
    return urllib.request.Request(url, body.encode()), json.loads(answer)


def main() -> int:
    request, shown = readme_request()
    server = subprocess.Popen(["make", "run"], start_new_session=True)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and server.poll() is None:
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    scores = json.load(answer)
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
                continue
            print(f"\nthe README's request is answered: {scores}", flush=True)
            pairs = zip(scores, shown, strict=True)
            return int(max(abs(score - other) for score, other in pairs) > SCORE_TOLERANCE)
        print(f"make run gave no answer; its status: {server.poll()}", file=sys.stderr)
        return 1
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


if __name__ == "__main__":
    sys.exit(main())
