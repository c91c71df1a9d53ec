"""The documentation is true: what exists is in the README, what the README names exists, its commands run."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_http import Running

import convert.models
import convert.quantize
import rerank_server

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
COMMAND_TIMEOUT_S = 120
SCORE_TOLERANCE = 0.02  # ggml's kernels differ between CPUs; the README's scores are of one of them


# -- What exists is in it ----------------------------------------------------------------------------------------------


def test_every_flag_of_the_server_is_in_it() -> None:
    """tests/test_process.py compares the table of settings; these are the flags beside it."""
    for action in rerank_server.settings_parser()._actions:
        for flag in action.option_strings:
            if flag.startswith("--") and not flag.startswith("--no-") and flag != "--help":
                assert re.search(rf"`[^`\n]*{flag}\b[^`\n]*`", README), flag


def test_every_endpoint_is_in_it() -> None:
    running = Running(debug=True)
    routes = running.server.application.routes
    running.close()
    assert len(routes) > 10
    for path in routes:
        assert re.search(rf"`(?:(?:GET|POST) )?{re.escape(path)}[` ]", README), path


def test_every_field_of_a_request_is_in_it() -> None:
    for field in rerank_server.FIELDS:
        assert re.search(rf"`[^`\n]*\b{field.name}\b[^`\n]*`", README), field.name


def make_targets() -> dict[str, str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z-]+):.*## (.*)$", makefile, re.MULTILINE))


def test_every_make_target_is_in_it_and_no_other() -> None:
    rows = re.findall(r"^\| `make ([a-z-]+)[^`\n]*` \|", README, re.MULTILINE)
    assert sorted(rows) == sorted(make_targets())
    for document, text in DOCUMENTS.items():
        named = set(re.findall(r"(?:^|`)(?:\w+=\S+ )?make ([a-z-]+)", text, re.MULTILINE))
        assert named <= make_targets().keys(), document


def test_every_error_of_the_server_is_in_the_table_of_statuses() -> None:
    described = {int(status) for row in re.findall(r"^\| ((?:\d{3}(?:, )?)+) \|", README, re.MULTILINE)
                 for status in row.split(", ")}  # fmt: skip
    assert {int(status) for status in rerank_server._STATUSES} <= described


# -- What it names exists ----------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """GitHub's: lower case, spaces are hyphens, other punctuation goes."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    text = DOCUMENTS[document]
    folder = ROOT if document == "README.md" else ROOT / "docs"
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if not re.match(r"https?:", target):
            assert not path or (folder / path).exists(), target
            assert path or anchor in anchors(text), target


def test_the_names_in_the_architecture_are_those_of_the_code() -> None:
    """Would break: somebody looks for a class that has another name by now."""
    sources = [ROOT / "rerank_server.py", *ROOT.glob("convert/*.py"), *ROOT.glob("tests/golden/*.py")]
    code = "".join(path.read_text(encoding="utf-8") for path in sources)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", DOCUMENTS["architecture.md"], flags=re.DOTALL))
    names = {span for span in spans if re.fullmatch(r"[A-Za-z_]\w*(\.[a-z_]\w*)?", span)}
    assert len(names) > 40
    elsewhere = {"llama_context", "llama.h", "rerank_server.py", "config.json", "accept"}
    for name in names - elsewhere:
        owner, _, member = name.partition(".")
        assert re.search(rf"\b{owner}\b", code), name
        assert not member or re.search(rf"(def |self\.){member}\b|^    {member}:", code, re.MULTILINE), name
    for span in spans:
        if re.fullmatch(r"[\w./]+/[\w.]*", span):
            assert (ROOT / span).exists(), span


PROGRAMS = ("convert", "convert.verify", "bench", "bench.quality", "bench.calibrate", "bench.settings")


@functools.cache
def help_of(program: str) -> str:
    command = [str(ROOT / program)] if program.endswith(".py") else ["-m", program]
    done = subprocess.run(
        [sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_programs_that_it_names_take_the_flags_that_it_names() -> None:
    """In `python -m NAME --flag ...`, in a span or a block; several lines of one command too."""
    checked = 0
    for text in DOCUMENTS.values():
        code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))
        command = r"(?<![\w-])(?:cd (\w+); )?python (?:-m )?(\w[\w./]*(?:\.py)?)((?:(?!python )[^`])*)"
        for folder, program, rest in re.findall(command, code):
            if program == "rerank_server.py" or program in PROGRAMS:
                for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", rest):
                    assert re.search(rf"{flag}\b", help_of(program)), (program, flag)
                    checked += 1
            else:
                path = program if program.endswith(".py") else f"{program.replace('.', '/')}.py"
                named = ROOT / folder / path
                assert named.exists() or named.with_suffix("").is_dir(), program
    assert checked > 5


def test_the_types_that_it_names_can_be_made() -> None:
    named = set(re.findall(r"QUANT=(\w+)", README))
    assert named
    assert named <= convert.quantize.QUANTIZATIONS.keys()
    models = set(re.findall(r"MODEL=(\w+)", README))
    assert models <= convert.models.NAMED.keys()


# -- Its commands run --------------------------------------------------------------------------------------------------

# A command that begins so is not run here, for the reason beside it. Everything else in a ```sh block is run as it is.
NOT_RUN = {
    "make test": "it is what runs this",
    "make convert": "takes the real checkpoints, 2.3 and 10 GB; tests/test_convert.py runs the command on tiny ones",
    "pip install '.[cluster]'": "Ray is installed by `make cluster`",
    "make cluster-demo": "a cluster; tests/test_cluster.py starts the same one",
    "serve run": "needs a cluster; tests/test_cluster.py runs the command in one",
    "python -m cluster.batch": "needs a list of pairs; tests/test_cluster.py runs the command in a cluster",
    "CMAKE_ARGS=": "needs the CUDA toolkit",
    ".venv/bin/python rerank_server.py --gpu-layers": "needs a GPU",
    "docker": "needs a container builder; the container tests build and run the image",
    "git clone": "needs the network",
    "cd tests; python test_the_server.py": "needs the container that the line before it starts",
}
PLACEHOLDERS = {  # what stands in the README for something that only the reader has
    "DATA=DIR": "DATA=tests/data/quality",
    "models/bge-reranker-v2-m3-Q6_K.gguf models/bge-reranker-v2-m3-Q4_K_M.gguf": "models/mini-Q8_0.gguf",
}


def shell_commands() -> list[str]:
    """Of the ```sh blocks, in order; a command that goes on over several lines is one."""
    commands: list[str] = []
    for block in re.findall(r"^```sh\n(.*?)^```", README, re.DOTALL | re.MULTILINE):
        part = ""
        for line in block.splitlines():
            part += f"{line}\n"
            if subprocess.run(["bash", "-n", "-c", part], capture_output=True).returncode == 0 and part[-2] != "\\":
                commands.append(part.strip())
                part = ""
        assert not part, f"bash cannot parse {part!r}"
    return [command for command in commands if command]


def reason_not_to_run(command: str) -> str | None:
    return next((reason for start, reason in NOT_RUN.items() if command.startswith(start)), None)


RUNNABLE = [command for command in shell_commands() if reason_not_to_run(command) is None]
START = "make run"  # it is a server, and runs while the other commands do


def environment(**changes: str) -> dict[str, str]:
    """Without what an outer `make` hands down to an inner one, or a developer has set for the server."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "RERANK_"))}
    return {**kept, **changes}


def needs_install() -> bool:
    return subprocess.run(["make", "-q", "install"], cwd=ROOT, env=environment(), capture_output=True).returncode != 0


class Started:
    """The server that the README's first command starts: as it stands, on a free port, with the small model."""

    def __init__(self, models: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        (models / "mini-Q8_0.gguf").symlink_to(ROOT / "models" / "mini-Q8_0.gguf")
        self._process = subprocess.Popen(
            ["bash", "-c", START], cwd=ROOT, env=environment(RERANK_PORT=str(port), RERANK_MODELS=str(models)),
            text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self.url, self.report = f"http://127.0.0.1:{port}", ""
        assert self._process.stdout is not None
        while "curl" not in self.report:
            self.report += (line := self._process.stdout.readline())
            assert line, self.report

    def stop(self) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)
        self._process.communicate(timeout=40)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    if needs_install():
        pytest.skip("`make install` has not run in this checkout, and compiling takes minutes")
    server = Started(tmp_path_factory.mktemp("models"))
    yield server
    server.stop()


@pytest.mark.parametrize("command", [command for command in RUNNABLE if command != START])
def test_every_command_runs(command: str, started: Started) -> None:
    """A command that takes something which is not here: into NOT_RUN, with the reason, or into PLACEHOLDERS."""
    for shown, real in PLACEHOLDERS.items():
        command = command.replace(shown, real)
    command = command.replace("http://127.0.0.1:8000", started.url)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=ROOT, env=environment(), capture_output=True, text=True,
        timeout=COMMAND_TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    if command.startswith("curl"):
        (shown_answer,) = re.findall(r"^```json\n(\[.*?\])\n```", README, re.MULTILINE)
        assert json.loads(done.stdout) == pytest.approx(json.loads(shown_answer), abs=SCORE_TOLERANCE)


def test_the_check_that_it_names_passes(started: Started) -> None:
    shown = "python tests/test_the_server.py http://127.0.0.1:8000"
    assert f"`{shown}`" in README
    command = shown.replace("http://127.0.0.1:8000", started.url).replace("python", sys.executable, 1)
    done = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr


def test_make_knows_the_commands_that_are_not_run_here() -> None:
    commands = [command for command in shell_commands() if reason_not_to_run(command) and "make " in command]
    assert len(commands) >= 5
    for command in commands:
        dry = re.sub(r"\bmake\b", "make -n", command, count=1)
        done = subprocess.run(["bash", "-c", dry], cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"


def without_figures(report: str) -> list[str]:
    """Its lines without numbers, folders, and the example at the end."""
    lines = re.sub(r"int8 engine.*", "int8 engine", report.partition("  curl")[0]).splitlines()  # built here, or not
    return [re.sub(r"[\d.,]+", "#", re.sub(r"\S+/(\S+\.gguf)", r"\1", line)) for line in lines]


def test_the_report_of_the_start_is_the_one_that_it_shows(started: Started) -> None:
    (shown,) = re.findall(r"^```\n(rerank-server .*?)^```", README, re.DOTALL | re.MULTILINE)
    assert without_figures(started.report) == without_figures(shown)
