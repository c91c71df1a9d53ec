"""The documents are true: what exists is described in one of them, what they name exists, commands run.

Described means a row of a table whose first cell begins with the name, in code (a status: with the
number). Anything may be mentioned elsewhere, as often as it helps.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from guard import needs
from test_http import Running

import convert.models
import convert.quantize
import rerank_server

ROOT = Path(__file__).resolve().parent.parent
FILES = (ROOT / "README.md", ROOT / "models" / "README.md", *sorted(ROOT.glob("docs/*.md")))
DOCUMENTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in FILES}
README = DOCUMENTS["README.md"]
README_CHARACTERS = 12_000  # five minutes of a stranger's time
COMMAND_TIMEOUT_S = 120
SCORE_TOLERANCE = 0.02  # ggml's kernels differ between CPUs; the README's scores are of one of them


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def rows(text: str) -> list[list[str]]:
    """The cells of all tables' rows, without headers."""
    lines = without_code(text).splitlines()
    is_header = {number for number, line in enumerate(lines[1:]) if re.match(r"\| ?-+ ?\|", line)}
    table = [line for number, line in enumerate(lines) if number not in is_header]
    table = [line for line in table if re.match(r"\| (?!-)|\|  \|", line)]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]


def described() -> dict[str, list[str]]:
    """What first cells name -> the documents that do, one for each row."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for document, text in DOCUMENTS.items():
        for cell in (row[0] for row in rows(text)):
            names = re.findall(r"`([^`]+)`", cell) if cell.startswith("`") else []
            if re.fullmatch(r"[45]\d\d(, [45]\d\d)*", cell):
                names = cell.split(", ")
            for name in names:
                found[name].append(document)
    return found


DESCRIBED = described()


def section(document: str, heading: str) -> str:
    """The text under a heading, up to the next of the same depth."""
    text = DOCUMENTS[document]
    (found,) = re.findall(rf"^{heading}\n(.*?)(?=^{heading.split()[0]} |\Z)", text, re.DOTALL | re.MULTILINE)
    return str(found)


# -- What exists is described in exactly one place ---------------------------------------------------------------------


def check_described(names: set[str], rows_like: str) -> None:
    """names: what exists. rows_like: what the names of such rows look like; there may be no other."""
    places = {name: DESCRIBED.get(name, []) for name in sorted(names)}
    assert {name: where for name, where in places.items() if len(where) != 1} == {}
    assert {name for name in DESCRIBED if re.fullmatch(rows_like, name)} - names == set()


def test_every_flag_of_the_server_and_of_convert() -> None:
    of_server = {flag for action in rerank_server.settings_parser()._actions for flag in action.option_strings}
    usage = help_of("convert").partition("positional arguments")[0]
    flags = of_server | set(re.findall(r"--[a-z][a-z0-9-]+", usage))
    flags = {flag for flag in flags if flag.startswith("--") and not flag.startswith("--no-")}
    check_described(flags - {"--help"}, "--.*")


def test_every_setting_has_its_variable_and_its_default() -> None:
    table = {row[0]: row for row in rows(section("docs/operating.md", "## Settings"))}
    for field in dataclasses.fields(rerank_server.Settings):
        row = table[f"`{rerank_server.flag_of(field.name)}`"]
        assert row[1] == f"`{rerank_server.environment_variable_of(field.name)}`"
        if re.fullmatch(r"\d+", row[2]):
            assert float(row[2]) == field.default, row[0]


def test_every_endpoint() -> None:
    running = Running()
    routes = {(path, method) for path, methods in running.server.application.routes.items() for method in methods}
    running.close()
    table = rows(section("docs/api.md", "## Endpoints"))
    found = {tuple(row[0].strip("`").split(" ")): re.findall(r"`([^`]+)`", row[1]) for row in table}
    assert len(found) == len(table)
    assert found.keys() == {(method, path) for path, method in routes}
    for (_, path), last in found.items():
        assert tuple(name for name in last if "/" not in name) == rerank_server.ENDPOINTS.get(path, ()), path


def test_every_contract() -> None:
    names = [row[0] for row in rows(section("docs/api.md", "## The contracts of other servers"))]
    assert sorted(names) == sorted(rerank_server.CONTRACTS)


def test_every_field_of_a_request() -> None:
    named = {field.name for field in rerank_server.FIELDS}
    named |= {*rerank_server.PASSAGE_KEYS, *rerank_server.QUERY_KEYS, "rank_fields"}
    check_described(named, "(?!)")
    table = {name: row for row in rows(section("docs/api.md", "## Fields")) for name in re.findall(r"`(\w+)`", row[0])}
    assert table.keys() == named
    for field in rerank_server.FIELDS:
        about = table[field.name][1]
        assert ("no limit" in about) == bool(getattr(field.read, "unlimited", ())), field.name


def test_every_metric() -> None:
    names = {family.name for family in rerank_server.Metrics().registry.collect()}
    kept = {name.removesuffix("_total").removesuffix("_info") for name in DESCRIBED if name.startswith("rerank_")}
    assert names == kept


def test_every_model_by_name() -> None:
    cells = [row[0] for row in rows(section("docs/models.md", "## Which model"))]
    assert {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)} == convert.models.NAMED.keys()


def statuses(error: type[Any]) -> set[int]:
    own = {int(error.status)} if isinstance(getattr(error, "status", None), int) else set()
    return own.union(*map(statuses, error.__subclasses__()))


def test_every_status() -> None:
    running = Running()
    _, document, _ = running.request("GET", "/openapi.json")
    running.close()
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    found = {int(code) for operation in operations for code in operation.get("responses", ()) if code.isdigit()}
    for error in vars(rerank_server).values():
        if isinstance(error, type) and issubclass(error, Exception) and error.__module__ == "rerank_server":
            found |= statuses(error)
    check_described({str(status) for status in found if 400 <= status <= 599 and status != 499}, "(?!)")


def make_targets() -> dict[str, str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z-]+):.*## (.*)$", makefile, re.MULTILINE))


def test_every_make_target() -> None:
    check_described({f"make {target}" for target in make_targets()}, "make [a-z-]+")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_make_target_is_named_that_does_not_exist(document: str) -> None:
    named = set(re.findall(r"(?:^|`)(?:\w+=\S+ )?make ([a-z-]+)", DOCUMENTS[document], re.MULTILINE))
    assert named <= make_targets().keys()


# -- Figures are of committed results ----------------------------------------------------------------------------------

FIGURE = re.compile(r"[+−-]?\d[\d,]*\.?\d*")
WITH_FIGURES = ("README.md", *(f"docs/{name}.md" for name in ("performance", "quality", "models", "cluster")))


def is_figure(cell: str) -> bool:
    """A number, perhaps with a unit or an interval behind it."""
    return FIGURE.match(cell) is not None and len(cell) < 30


def sections_with_figures() -> Iterator[tuple[str, list[list[str]], str]]:
    """document, rows of the section's tables that hold a figure, the section's text."""
    for document in WITH_FIGURES:
        for text in re.split(r"^#+ .*\n", without_code(DOCUMENTS[document]), flags=re.MULTILINE):
            table = [row for row in rows(text) if any(map(is_figure, row[1:]))]
            if table:
                yield document, table, text


def numbers(text: str) -> set[float]:
    return {abs(float(found.replace(",", "").replace("−", "-"))) for found in FIGURE.findall(text)}


def test_figures_in_tables_are_those_of_the_result_files_beside_them() -> None:
    """Would break: a bench is run again, and a document goes on telling what it was."""
    checked = 0
    for document, table, text in sections_with_figures():
        results = re.findall(r"\]\((?:\.\./)?(bench/results/[\w.-]+\.(?:md|json))\)", text)
        assert results, f"{document}: no link to a file of bench/results beside {table[0]}"
        known = set().union(*(numbers((ROOT / path).read_text(encoding="utf-8")) for path in results))
        for row in table:
            figures = list(filter(is_figure, row[1:]))
            assert numbers(" ".join(figures)) <= known, (document, row, numbers(" ".join(figures)) - known)
            checked += len(figures)
    assert checked > 50


def test_no_row_and_no_picture_stands_twice() -> None:
    rows_with_figures = [tuple(row) for _, table, _ in sections_with_figures() for row in table]
    assert sorted(rows_with_figures) == sorted(set(rows_with_figures))
    pictures = [target for text in DOCUMENTS.values() for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)]
    assert len({Path(target).name for target in pictures}) == len(pictures)


# -- A stranger finds the way ------------------------------------------------------------------------------------------


def test_the_readme_takes_five_minutes() -> None:
    assert len(README) <= README_CHARACTERS


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name.startswith("docs/")])
def test_a_document_opens_with_who_needs_it_and_the_readme_leads_there(document: str) -> None:
    assert re.match(r"# [^\n]+\n\nFor those (?:\w|[,.:'\n /`-])+?\.\s", DOCUMENTS[document])
    assert f"]({document})" in section("README.md", "## Where to read on")


def anchors(text: str) -> set[str]:
    """GitHub's: lower case, spaces are hyphens, other punctuation goes."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", DOCUMENTS[document]):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / document).parent / path).resolve() if path else ROOT / document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_it_names_exist(document: str) -> None:
    folders = "accel|bench|cluster|container|convert|docs|tests|web|.ci"
    for span in re.findall(rf"`((?:{folders})/[\w./-]+)`", DOCUMENTS[document]):
        assert (ROOT / span).exists() or span == "accel/lib", span


def test_the_names_in_the_architecture_are_those_of_the_code() -> None:
    """Would break: somebody looks for a class that has another name by now."""
    sources = [ROOT / "rerank_server.py", *ROOT.glob("convert/*.py"), *ROOT.glob("tests/golden/*.py")]
    code = "".join(path.read_text(encoding="utf-8") for path in sources)
    spans = re.findall(r"`([^`\n]+)`", without_code(DOCUMENTS["docs/architecture.md"]))
    names = {span for span in spans if re.fullmatch(r"[A-Za-z_]\w*(\.[a-z_]\w*)?", span)}
    assert len(names) > 40
    elsewhere = {"llama_context", "llama.h", "rerank_server.py", "config.json", "accept"}
    for name in names - elsewhere:
        owner, _, member = name.partition(".")
        assert re.search(rf"\b{owner}\b", code), name
        assert not member or re.search(rf"(def |self\.){member}\b|^    {member}:", code, re.MULTILINE), name


PROGRAMS = ("convert", "convert.verify", "bench", "bench.quality", "bench.calibrate", "bench.settings")


@functools.cache
def help_of(program: str) -> str:
    command = [str(ROOT / program)] if program.endswith(".py") else ["-m", program]
    done = subprocess.run(
        [sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_programs_that_they_name_take_the_flags_that_they_name() -> None:
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
    assert checked > 3


def test_the_types_that_they_name_can_be_made() -> None:
    everything = "".join(DOCUMENTS.values())
    named = set(re.findall(r"QUANT=(\w+)", everything))
    assert named
    assert named <= convert.quantize.QUANTIZATIONS.keys()
    assert set(re.findall(r"MODEL=([\w.-]+)", everything)) <= convert.models.NAMED.keys()


# -- Commands run ------------------------------------------------------------------------------------------------------

START = "make run"  # it is a server, and runs while the other commands do
# A command in an `sh` block begins with one of these: it is run, or it is known why it is not.
RUN_HERE = ("curl -s http://127.0.0.1:8000/", "make quality DATA=DIR")
NOT_RUN = {
    "make test": "it is what runs this",
    "make convert": "takes the real checkpoints; tests/test_convert.py runs the command on tiny ones",
    ".venv/bin/python -m convert some-reranker-Q8_0.gguf": "needs such a file; tests/test_adopt.py makes some",
    "make accel": "downloads oneDNN; tests/test_accel.py tests what it has built",
    "make cluster-demo": "a cluster; tests/test_cluster.py starts the same one",
    "pip install '.[cluster]'": "Ray is installed by `make cluster`",
    "serve run": "needs a cluster; tests/test_cluster.py runs the command in one",
    "python -m cluster.batch": "needs a list of pairs; tests/test_cluster.py runs the command",
    "CMAKE_ARGS=": "needs the CUDA toolkit",
    ".venv/bin/python rerank_server.py --gpu-layers": "needs a GPU",
    "docker": "needs a container builder; tests/test_container.py runs the image",
    "cd tests; python test_the_server.py": "needs the container that the line before it starts",
    "git clone": "needs the network",
    "git lfs": "needs git-lfs",
}
PLACEHOLDERS = {  # what stands in a document for something that only the reader has
    "DATA=DIR": "DATA=tests/data/quality",
    "models/bge-reranker-v2-m3-Q6_K.gguf models/bge-reranker-v2-m3-Q4_K_M.gguf": "models/mini-Q8_0.gguf",
}


class Command(NamedTuple):
    document: str
    text: str

    def begins_with(self, starts: tuple[str, ...]) -> bool:
        return self.text.startswith(starts)


def without_comment(command: str) -> str:
    """A # that follows a space and is not in quotation marks ends a line."""
    quoted_or_comment = r"""('[^']*'|"(?:\\.|[^"\\])*")|(?:^|(?<=\s))#[^\n]*"""
    return re.sub(quoted_or_comment, lambda match: match[1] or "", command, flags=re.MULTILINE).strip()


def commands_in(block: str) -> Iterator[str]:
    """In order; a command that goes on over several lines is one."""
    part = ""
    for line in block.splitlines():
        part += f"{line}\n"
        if subprocess.run(["bash", "-n", "-c", part], capture_output=True).returncode == 0 and part[-2:-1] != "\\":
            if command := without_comment(part):
                yield command
            part = ""
    assert not part, f"bash cannot parse {part!r}"


COMMANDS = [
    Command(document, command)
    for document, text in DOCUMENTS.items()
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for command in commands_in(block)
]


def test_a_block_is_a_command_or_says_what_else_it_is() -> None:
    languages = {language for text in DOCUMENTS.values() for language in re.findall(r"^```(\w*)\n(?!\n)", text, re.M)}
    assert languages - {""} <= {"sh", "json", "text"}  # "" is what ends a block
    for document, text in DOCUMENTS.items():
        fences = re.findall(r"^```(\w*)", text, re.MULTILINE)
        assert all(fences[::2]), f"{document}: a block without a language"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.text[:40])
def test_a_command_is_on_a_list(command: Command) -> None:
    known = (START, *RUN_HERE, *NOT_RUN)
    assert command.begins_with(known), (
        f"{command.document}: {command.text!r} is in neither RUN_HERE nor NOT_RUN, and is not run"
    )


def test_comments_are_no_part_of_a_command() -> None:
    """Would break: `pip install x  # or make y` was taken for a make command, and installed x."""
    block = "pip install x  # or `make y`, it's the same\ncurl -d '{ # 1}' x # z\n# alone\n"
    assert list(commands_in(block)) == ["pip install x", "curl -d '{ # 1}' x"]


def needs_install() -> bool:
    """Whether `make` would install something now: the guard would let it fail."""
    targets = ["make", "-q", "install", ".venv/.installed-dev"]
    return subprocess.run(targets, cwd=ROOT, capture_output=True).returncode != 0


class Started:
    """The server that the README's first command starts: as it stands, on a free port, with the small model."""

    def __init__(self, models: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        (models / "mini-Q8_0.gguf").symlink_to(ROOT / "models" / "mini-Q8_0.gguf")
        environment = {**os.environ, "RERANK_PORT": str(port), "RERANK_MODELS": str(models)}
        self._process = subprocess.Popen(
            ["bash", "-c", START], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, start_new_session=True,
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
        pytest.skip("this checkout is not installed as `make test` does it (make test)")
    server = Started(tmp_path_factory.mktemp("models"))
    yield server
    server.stop()


RUNNABLE = [command for command in COMMANDS if command.begins_with(RUN_HERE)]


@pytest.mark.parametrize("command", RUNNABLE, ids=lambda command: command.text[:40])
def test_a_command_runs(command: Command, started: Started) -> None:
    """With something that only the reader has: into PLACEHOLDERS."""
    text = command.text.replace("http://127.0.0.1:8000", started.url)
    for shown, real in PLACEHOLDERS.items():
        text = text.replace(shown, real)
    if text.startswith("curl"):
        needs("curl")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    if command.document == "README.md" and text.startswith("curl"):
        (shown_answer,) = re.findall(r"^```json\n(\[.*?\])\n```", README, re.MULTILINE)
        assert json.loads(done.stdout) == pytest.approx(json.loads(shown_answer), abs=SCORE_TOLERANCE)


def test_the_lists_of_commands_name_nothing_that_is_gone() -> None:
    for start in (START, *RUN_HERE, *NOT_RUN):
        assert any(command.begins_with((start,)) for command in COMMANDS), start


def test_make_knows_the_commands_that_are_not_run() -> None:
    """`make -n` with the command's own words, and never a shell: what is not a make command is not started."""
    words = [shlex.split(command.text) for command in COMMANDS if command.begins_with(tuple(NOT_RUN))]
    made = [[word for word in command if command[0] == "make" or "=" not in word] for command in words]
    made = [command[1:] for command in made if command[:1] == ["make"]]
    assert len(made) >= 5
    for arguments in made:
        done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"make {arguments}: {done.stderr}"


def test_the_check_that_they_name_passes(started: Started) -> None:
    shown = "python tests/test_the_server.py http://127.0.0.1:8000"
    assert f"`{shown}`" in DOCUMENTS["docs/clients.md"]
    command = shown.replace("http://127.0.0.1:8000", started.url).replace("python", sys.executable, 1)
    done = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr


def without_figures(report: str) -> list[str]:
    """Its lines without numbers, folders, the example at the end, and what says whether the engine is built here."""
    report = re.sub(r"(accel engine|computed by:).*", r"\1", report.partition("  curl")[0])
    lines = report.splitlines()
    return [re.sub(r"[\d.,]+", "#", re.sub(r"\S+/(\S+\.gguf)", r"\1", line)) for line in lines]


def test_the_report_of_the_start_is_the_one_that_the_readme_shows(started: Started) -> None:
    (shown,) = re.findall(r"^```text\n(rerank-server .*?)^```", README, re.DOTALL | re.MULTILINE)
    assert without_figures(started.report) == without_figures(shown)
