"""The guard of the tests themselves: a test that would touch the machine fails, whatever it is and whoever runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from guard import MAKE_ARGUMENTS

ROOT = Path(__file__).resolve().parent.parent
OUTER_MAKE = dict.fromkeys(MAKE_ARGUMENTS, "given")
OUTER_MAKE |= {"MAKEFLAGS": " -- ARGS=given MODEL=given", "MAKELEVEL": "1", "RERANK_PORT": "1"}


def run_planted(folder: Path, test: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """pytest with this folder's conftest on a test file, as `make test` starts it."""
    planted = folder / "test_planted.py"
    planted.write_text(f"import os, pathlib, subprocess\n\n{test}", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", str(planted)]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), **environment},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("installer", ["pip install nothing", "apt-get update"])
def test_a_test_that_calls_an_installer_fails(tmp_path: Path, installer: str) -> None:
    """Would break: `make test` installs Ray and a second llama-cpp-python into the user's own Python, unseen."""
    done = run_planted(tmp_path, f"def test_it():\n    subprocess.run(['bash', '-c', '{installer}'])\n")
    assert done.returncode == 1
    assert f"this one called: {installer}" in done.stdout


def test_pip_of_the_environment_finds_nothing_to_install(tmp_path: Path) -> None:
    """It has no name on PATH that could be taken: `.venv/bin/python -m pip`, as the Makefile calls it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(tmp_path), "iniconfig"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "No matching distribution" in done.stderr or "No module named pip" in done.stderr


def test_what_tests_start_has_a_home_of_its_own(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "mine").touch()
    test = "def test_it():\n    subprocess.run('test ! -e ~/mine && touch ~/theirs', shell=True, check=True)\n"
    done = run_planted(tmp_path, test, HOME=str(home), XDG_CACHE_HOME=str(home / "caches"))
    assert done.returncode == 0, done.stdout
    assert [path.name for path in home.iterdir()] == ["mine"]


def test_nothing_that_make_was_given_reaches_a_make_in_a_test(tmp_path: Path) -> None:
    """Would break: `make test ARGS=tests/test_docs.py` starts servers with that flag."""
    test = f"""
def test_it():
    assert not set({sorted(OUTER_MAKE)}) & os.environ.keys()
    done = subprocess.run(["make", "-n", "run"], cwd={str(ROOT)!r}, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].strip().endswith("rerank_server.py"), done.stdout
    assert "given" not in done.stdout
"""
    done = run_planted(tmp_path, test, **OUTER_MAKE)
    assert done.returncode == 0, done.stdout


def test_the_guard_knows_every_variable_that_the_makefile_reads() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    read = set(re.findall(r"\$\((?:or |if )?(?:\$\()?([A-Z_]+)[),]", makefile))
    assigned = set(re.findall(r"^([A-Z_]+) *[:?]?=", makefile, re.MULTILINE))
    assert read - assigned - {"HOME", "XDG_CACHE_HOME", "MAKE", "MAKEFILE_LIST", "CURDIR"} == set(MAKE_ARGUMENTS)


def test_the_run_ends_with_what_was_skipped_for_which_tool(tmp_path: Path) -> None:
    skips = "import guard\n\ndef test_it():\n    guard.needs('curl')\n\n"
    test = skips + skips.replace("test_it", "test_another")
    done = run_planted(tmp_path, test, PATH=str(tmp_path))
    assert "skipped   2: no curl (Debian: apt install curl)" in done.stdout
    assert len(done.stdout.splitlines()) < 15
