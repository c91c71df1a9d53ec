"""What keeps the tests off the machine that they run on, and looks for what they need from it.

From `install` on, an installer that anything under test starts by its name (a line of a document, a
recipe of the Makefile) is a script that fails and is noted, HOME is a temporary folder, pip and the
Hub's client have no network, and nothing that an outer `make` was given reaches what the tests start.
`needs` skips a test for a tool that is not there.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
INSTALLERS = ("pip", "pip3", f"pip3.{sys.version_info.minor}", "pipx", "uv", "npm", "apt", "apt-get")
INSTALLER = """#!/bin/sh
echo "$(basename "$0") $*" >> '{calls}'
echo "tests/guard.py: a test called $(basename "$0"), and tests install nothing" >&2
exit 97
"""
# What a user gives to `make`: it is exported to every process below, where another `make` reads it.
MAKE_ARGUMENTS = ("ARGS", "MODEL", "QUANT", "DATA", "PORTABLE", "CMAKE_ARGS", "BASE", "TARGET")
MAKE_INTERNALS = ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "MAKEFILES", "GNUMAKEFLAGS")
XDG = tuple(f"XDG_{kind}_HOME" for kind in ("CACHE", "CONFIG", "DATA", "STATE"))
HOMES = (*XDG, "HF_HOME", "HF_HUB_CACHE", "MPLCONFIGDIR")  # would win over HOME
FOR_TESTS = ("RERANK_FUZZ", "RERANK_XLMR_TOKENIZER")  # settings of the tests themselves, not of the server

# tool -> the programs that it may be, and the command that brings it
TOOLS = {
    "curl": (("curl",), "Debian: apt install curl"),
    "chromium": (("chromium", "chromium-browser", "google-chrome"), "Debian: apt install chromium"),
    "buildah": (("buildah",), "Debian: apt install buildah"),
}


class Guard:
    """The folder with the installers that fail and with the HOME of all that the tests start."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rerank-tests-"))
        self.programs, self.home = self.folder / "bin", self.folder / "home"
        self._calls = self.folder / "calls"
        self.programs.mkdir()
        self.home.mkdir()
        for name in INSTALLERS:
            program = self.programs / name
            program.write_text(INSTALLER.format(calls=self._calls), encoding="utf-8")
            program.chmod(0o755)

    def install(self) -> None:
        """Changes this process's environment, which all that it starts inherits."""
        real_caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        of_server = {name for name in os.environ if name.startswith("RERANK_")} - set(FOR_TESTS)
        for name in (*MAKE_ARGUMENTS, *MAKE_INTERNALS, *HOMES, *of_server, "PIP_FIND_LINKS"):
            os.environ.pop(name, None)
        os.environ["HOME"] = str(self.home)
        os.environ["PATH"] = f"{self.programs}{os.pathsep}{os.environ['PATH']}"
        # Only looked up: the wheel that `make` has compiled, and a browser that Playwright has installed.
        os.environ.setdefault("CACHE", str(real_caches / "rerank-server"))
        os.environ.setdefault("PLAYWRIGHT_BROWSERS_PATH", str(real_caches / "ms-playwright"))
        os.environ.update(PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull, HF_HUB_OFFLINE="1")

    def calls(self) -> str:
        """The installers that were called since this was last asked, with their arguments."""
        if not self._calls.exists():
            return ""
        found = self._calls.read_text(encoding="utf-8")
        self._calls.unlink()
        return found.strip()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def find(tool: str) -> str | None:
    """Where a tool's program is, or None."""
    programs, _ = TOOLS[tool]
    return next(filter(None, map(shutil.which, programs)), None)


def needs(tool: str) -> None:
    """Skips a test where the tool (of TOOLS, or "root") is not, and says what brings it."""
    if tool == "root":
        if os.geteuid() != 0:
            pytest.skip("no root (sudo make test)")
    elif find(tool) is None:
        pytest.skip(f"no {tool} ({TOOLS[tool][1]})")


def needs_module(name: str, command: str) -> Any:
    """The imported module; skips a test where it is not, and says what brings it."""
    return pytest.importorskip(name, reason=f"no {name.partition('.')[0]} ({command})")
