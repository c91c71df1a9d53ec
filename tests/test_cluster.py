"""cluster/: on Ray, the answers are the single server's to the bit, and nothing is lost or scored twice in the output
when processes and nodes die. The nodes are processes of this machine; they are gone when the tests end."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from conftest import ROOT, Gguf, convert
from server_process import ServerProcess
from test_contracts import ALL as ALL_CONTRACTS

from rerank_server import Call, EngineError, RerankRequest, Settings

pytest.importorskip("ray", reason="Ray is not installed: `make cluster`")

import requests
import yaml

from cluster.local import config_of, environment_of, local_cluster, node_options, served

pytestmark = pytest.mark.cluster

COMMAND_TIMEOUT_S = 150
N_CLIENTS = 6
KEY = "a-key"
PACKING_TOLERANCE = 0.02  # of logits: pairs share a decode with others, and attention rounds keys and values to 16 bits
# In an answer, where two servers differ by nature.
CHANGING = {"id", "created", "cache", "arithmetic", "tokenization_workers"}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """Two nodes of two CPUs each."""
    with local_cluster(n_nodes=2, cpus_per_node=2) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one narrow layer, for long lists."""
    checkpoint = checkpoints.make_xlmr(tmp_path_factory.mktemp("small") / "small", hidden_size=64, layers=1)
    (file,) = convert(checkpoint, tmp_path_factory.mktemp("gguf"), "F32")
    return file


def run(nodes: Any, *command: str | Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S,
                          env=environment_of(nodes))  # fmt: skip
    assert not ok or done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


# -- Lists of pairs: what needs no Ray ---------------------------------------------------------------------------------

WORDS = "cats sleep stocks fell friday katzen schlafen viel market closed lower water every day".split()
GOOD_LINE = b'{"query": "a", "passage": "b", "query_id": 7, "passage_id": "p"}\n'
BAD_LINES = {
    b'{"query": "a"}\n': "'passage' is missing",
    b'{"query": "a", "passage": 3}\n': "'passage' must be a string",
    b'{"query": "a", "passage": "b"\n': "JSON",
    b'{"query": "\xff", "passage": "b"}\n': "UTF-8",
    b'{"query": "\\ud800", "passage": "b"}\n': "lone surrogate",
}  # fmt: skip


def pair(number: int) -> dict[str, str]:
    """Different for each number, of a few words."""
    picked = [WORDS[number // 13**place % 13] for place in range(4)]
    return {"query": f"question {number // 100}", "passage": " ".join(picked), "query_id": f"q{number // 100}",
            "passage_id": f"p{number}"}  # fmt: skip


def write_pairs(path: Path, n: int, bad: dict[int, bytes] | None = None) -> Path:
    lines = [json.dumps(pair(number)).encode() + b"\n" for number in range(n)]
    for number, line in (bad or {}).items():
        lines[number] = line
    path.write_bytes(b"".join(lines))
    return path


def write_beir(folder: Path, n: int) -> tuple[Path, Path]:
    """The same pairs as a BEIR directory and a run; the last candidate has no text."""
    pairs = [pair(number) for number in range(n)]
    folder.mkdir()
    corpus = [{"_id": p["passage_id"], "title": (words := p["passage"].split(" ", 1))[0], "text": words[1]}
              for p in pairs]  # fmt: skip
    queries = [{"_id": key, "text": text} for key, text in {p["query_id"]: p["query"] for p in pairs}.items()]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = folder / "bm25.trec"
    lines = [f"{p['query_id']} Q0 {p['passage_id']} {number % 100 + 1} {-number} bm25\n"
             for number, p in enumerate(pairs)]  # fmt: skip
    run.write_text("".join(lines) + "q0 Q0 nowhere 101 -1e9 bm25\n")
    return folder, run


def write_parquet(path: Path, n: int) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([pair(number) for number in range(n)]), path, row_group_size=70)
    return path


@pytest.mark.parametrize("part_rows", [1, 7, 64, 1000])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "beir"])
def test_parts_hold_each_row_once_and_in_order(tmp_path: Path, kind: str, part_rows: int) -> None:
    """Whatever the part size, row groups and files: no pair is lost or scored twice."""
    from cluster.inputs import BadRow, BeirRun, Row, open_source

    n = 200
    if kind == "beir":
        beir = open_source(*write_beir(tmp_path / "beir", n), needs_ids=True)
        assert isinstance(beir, BeirRun)
        source: Any = beir.indexed(tmp_path / "texts.sqlite")[0]
    else:
        write = {"jsonl": write_pairs, "parquet": write_parquet}[kind]
        write(tmp_path / f"1.{kind}", n)
        source = open_source(tmp_path, None, needs_ids=True)
    parts = list(source.parts(part_rows))
    rows = [row for part in parts for row in source.rows(part)]
    assert [part.number for part in parts] == list(range(len(parts)))
    assert max(part.n_rows for part in parts) <= part_rows
    assert rows[:n] == [Row(number, **pair(number)) for number in range(n)]
    assert [type(row) for row in rows[n:]] == ([BadRow] if kind == "beir" else [])


def test_several_files_are_one_list(tmp_path: Path) -> None:
    from cluster.inputs import Row, open_source

    for name in ("a.jsonl", "b.jsonl"):
        write_pairs(tmp_path / name, 5)
    source = open_source(tmp_path, None, needs_ids=False)
    rows = [row for part in source.parts(2) for row in source.rows(part)]
    assert [row.row for row in rows] == list(range(10))
    assert [row.passage_id for row in rows if isinstance(row, Row)] == [f"p{n % 5}" for n in range(10)]


def test_what_cannot_be_read_has_its_reason(tmp_path: Path) -> None:
    """Each bad line becomes a bad row with the field's name, and the good one among them is still scored."""
    from cluster.inputs import BadRow, Row, open_source

    (tmp_path / "x.jsonl").write_bytes(b"".join(BAD_LINES) + b"\n" + GOOD_LINE)
    source = open_source(tmp_path / "x.jsonl", None, needs_ids=False)
    *bad, good = [row for part in source.parts(3) for row in source.rows(part)]
    assert good == Row(len(BAD_LINES) + 1, "a", "b", "7", "p")
    assert len(bad) == len(BAD_LINES)
    for row, said in zip(bad, BAD_LINES.values(), strict=True):
        assert isinstance(row, BadRow)
        assert said in row.reason


class Poisoned:
    """An engine in front of another: gives NaN for the longest pair, or fails for a list with it."""

    max_batch_tokens, max_sequences = 4096, 64

    def __init__(self, engine: Any, fails: bool) -> None:
        self.engine, self.pairs, self.fails = engine, engine.pairs, fails

    def score(self, pairs: Sequence[Any]) -> list[float]:
        if self.fails and any(len(pair.ids) > 60 for pair in pairs):
            raise EngineError("the decode failed")
        return [math.nan if len(pair.ids) > 60 else float(len(pair.ids)) for pair in pairs]


@pytest.mark.parametrize(("fails", "said"), [(False, "the model gave nan in place of a score"),
                                             (True, "the decode failed")])  # fmt: skip
def test_a_pair_that_the_model_cannot_score_costs_no_other(
    fails: bool, said: str, tmp_path: Path, small: Path
) -> None:
    """It is set aside, and the others of its part have their scores."""
    from cluster.inputs import open_source
    from cluster.parts import Folder, Scorer, score_part

    poison = json.dumps({"query": "a", "passage": "poison " * 100}).encode() + b"\n"
    source = open_source(write_pairs(tmp_path / "x.jsonl", 10, {4: poison}), None, needs_ids=False)
    (part,) = source.parts(100)
    scorer = Scorer("m3", Settings(m3=small, max_length=64, threads=1, accel="off"))
    scorer._engine = Poisoned(scorer._engine, fails)  # type: ignore[assignment]
    score_part(part, scorer, source, folder := Folder(tmp_path))
    (table,) = folder.tables()
    assert table["row"].to_pylist() == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert table["logit"].to_pylist() == [float(count) for count in table["n_tokens"].to_pylist()]
    (bad,) = map(json.loads, folder.bad(0).read_text().splitlines())
    assert (bad["row"], bad["reason"]) == (4, said)


@pytest.mark.parametrize(("arguments", "said"), [
    (["x.jsonl", "there.parquet"], "there.parquet is there already"),
    (["x.jsonl", "no/such/out.parquet"], "there is no such directory"),
    (["missing.jsonl", "out.parquet"], "there is no such file"),
    (["y.parquet", "out.trec"], "there is no column 'query_id', only query, passage"),
    (["z.parquet", "out.parquet"], "not a Parquet file"),
    ([".", "out.parquet"], "one kind of files is needed"),
    (["beir", "out.trec"], "--run FILE"),
    (["x.jsonl", "out.parquet", "--set", "max_lenght=512"], "'max_lenght' is not set here"),
    (["x.jsonl", "out.parquet", "--set", "max_length"], "must look like max_length=512"),
])  # fmt: skip
def test_what_is_wrong_is_said_before_anything_starts(
    arguments: list[str], said: str, tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One line and status 2, and nothing is left behind."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from cluster.batch import main

    monkeypatch.chdir(tmp_path)
    write_pairs(Path("x.jsonl"), 3)
    write_beir(Path("beir"), 3)
    pq.write_table(pa.table({"query": ["a"], "passage": ["b"]}), "y.parquet")
    Path("z.parquet").write_text("no Parquet")
    Path("there.parquet").touch()
    assert main([*arguments, "--set", f"m3={small}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cluster.batch: ")
    assert said in line
    assert not list(Path().rglob("*.parts"))


# -- Lists of pairs: on the cluster ------------------------------------------------------------------------------------

N_PAIRS, PART_ROWS = 20_000, 500
BAD = {n * 3000 + 17: line for n, line in enumerate(BAD_LINES)}


@pytest.fixture(scope="module")
def batch_arguments(small: Path) -> list[str]:
    return ["--set", f"m3={small}", "--set", "max_length=64", "--set", "accel=off", "--threads", "1",
            "--part-rows", str(PART_ROWS)]


@pytest.fixture(scope="module")
def expected(small: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one process makes of the pairs, without Ray."""
    from cluster.inputs import open_source
    from cluster.parts import Folder, Scorer, score_part

    folder = tmp_path_factory.mktemp("expected")
    source = open_source(write_pairs(folder / "pairs.jsonl", N_PAIRS, BAD), None, needs_ids=False)
    scorer = Scorer("m3", Settings(m3=small, max_length=64, threads=1, accel="off"))
    for part in source.parts(PART_ROWS):
        score_part(part, scorer, source, Folder(folder))
    scorer.close()
    return [row for table in Folder(folder).tables() for row in table.to_pylist()]


def start_job(nodes: Any, *arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cluster.batch", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment_of(nodes))


def wait_for_parts(job: subprocess.Popen[str], folder: Path, n: int) -> None:
    deadline = time.monotonic() + COMMAND_TIMEOUT_S
    while len(list(folder.glob("*.parquet"))) < n:
        assert job.poll() is None, job.stderr and job.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_job_outlives_a_node_and_bad_rows(
    nodes: Any, tmp_path: Path, batch_arguments: list[str], expected: list[dict[str, Any]]
) -> None:
    """20,000 pairs over several nodes, one of which is killed half way: each pair's score is that of a single process
    to the bit, once and in order, and the bad rows stand beside it with their reasons."""
    import pyarrow.parquet as pq

    pairs, output = write_pairs(tmp_path / "pairs.jsonl", N_PAIRS, BAD), tmp_path / "scores.parquet"
    added = nodes.add_node(**node_options(2))
    job = start_job(nodes, pairs, output, *batch_arguments)
    wait_for_parts(job, tmp_path / "scores.parquet.parts", N_PAIRS // PART_ROWS // 2)
    nodes.remove_node(added, allow_graceful=False)
    _, report = job.communicate(timeout=COMMAND_TIMEOUT_S)
    assert job.returncode == 0, report
    assert pq.read_table(output).to_pylist() == expected
    assert [row["row"] for row in expected] == [number for number in range(N_PAIRS) if number not in BAD]
    aside = [json.loads(line) for line in (tmp_path / "scores.parquet.bad.jsonl").read_text().splitlines()]
    assert [row["row"] for row in aside] == list(BAD)
    assert f"{N_PAIRS - len(BAD)} pairs scored" in report
    assert f"{len(BAD)} bad rows set aside" in report
    assert not (tmp_path / "scores.parquet.parts").exists()


def test_a_killed_job_goes_on_without_scoring_anything_twice(
    nodes: Any, tmp_path: Path, batch_arguments: list[str], expected: list[dict[str, Any]]
) -> None:
    """The driver is killed half way. What was scored is marked before the job is continued, and the marks are still
    there at the end. Continued with another setting, it is refused: half of the scores would be others."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    n_parts = 16
    pairs, output = write_pairs(tmp_path / "pairs.jsonl", N_PAIRS, BAD), tmp_path / "scores.parquet"
    pairs.write_bytes(b"".join(pairs.read_bytes().splitlines(keepends=True)[: n_parts * PART_ROWS]))
    arguments = [str(pairs), str(output), *batch_arguments, "--actors", "2"]
    job = start_job(nodes, *arguments)
    wait_for_parts(job, folder := tmp_path / "scores.parquet.parts", 3)
    job.kill()
    job.communicate()
    wait_until_still(folder)
    done = {int(file.stem) for file in folder.glob("*.parquet")}
    assert 3 <= len(done) < n_parts
    for file in folder.glob("*.parquet"):
        table = pq.ParquetFile(file).read()
        marked = pc.negate(table["score"])
        pq.write_table(table.set_column(table.schema.get_field_index("score"), "score", marked), file)
    other = run(nodes, sys.executable, "-m", "cluster.batch", *arguments, "--set", "max_length=32", ok=False)
    assert "begun with another settings" in other.stderr
    assert other.returncode == 2
    report = run(nodes, sys.executable, "-m", "cluster.batch", *arguments).stderr
    assert f"{len(done)} of {n_parts} parts are done already" in report
    marks = [{**row, "score": -row["score"] if row["row"] // PART_ROWS in done else row["score"]}
             for row in expected if row["row"] < n_parts * PART_ROWS]  # fmt: skip
    assert pq.read_table(output).to_pylist() == marks


def wait_until_still(folder: Path) -> None:
    """Until the dead driver's actors are gone too: no part has come for a while."""
    while time.time() - max(path.stat().st_mtime for path in folder.iterdir()) < 3:
        time.sleep(0.1)


def test_candidates_of_a_run_become_a_run(
    nodes: Any, tmp_path: Path, batch_arguments: list[str], small: Path
) -> None:
    """What a search team has, a BEIR directory and a first stage's run, becomes a run that TREC's tools read: ranks
    from 1, by the score that the server gives."""
    n = 250
    directory, candidates = write_beir(tmp_path / "beir", n)
    output = tmp_path / "m3.trec"
    run(nodes, sys.executable, "-m", "cluster.batch", directory, output, "--run", candidates, *batch_arguments)
    lines = [line.split() for line in output.read_text().splitlines()]
    assert [(line[0], int(line[3])) for line in lines] == [(f"q{k // 100}", k % 100 + 1) for k in range(n)]
    found = {line[2]: float(line[4]) for line in lines}
    logits = logits_of_the_server(small, [pair(number) for number in range(n)])
    assert found == pytest.approx({f"p{number}": logit for number, logit in enumerate(logits)}, abs=PACKING_TOLERANCE)
    for line, after in itertools.pairwise(lines):
        assert line[0] != after[0] or float(line[4]) >= float(after[4])
    (bad,) = map(json.loads, (tmp_path / "m3.trec.bad.jsonl").read_text().splitlines())
    assert bad["reason"] == "corpus.jsonl has no text with the _id 'nowhere'"


def logits_of_the_server(file: Path, pairs: list[dict[str, str]]) -> list[float]:
    from cluster.settings import find_role

    role = find_role("m3", Settings(m3=file, max_length=64, threads=1, accel="off"))
    request = RerankRequest(tuple(p["query"] for p in pairs), tuple(p["passage"] for p in pairs))
    logits = [result.logit for result in role.score(request, range(len(pairs)), Call())]
    role.close()
    return logits


# -- Serve ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arguments(gguf_of: Gguf) -> dict[str, Any]:
    return {"m3": str(gguf_of("xlmr")), "gemma": str(gguf_of("gemma")), "max_length": 256, "api_key": KEY,
            "accel": "off"}


@pytest.fixture(scope="module")
def single(arguments: dict[str, Any]) -> Iterator[str]:
    flags = [part for name, value in arguments.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    server = ServerProcess(*flags, "--threads", "1", stderr=subprocess.DEVNULL)
    yield server.url
    server.stop()


@pytest.fixture(scope="module")
def url(nodes: Any, arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the committed config with two replicas of M3, started as a user starts it."""
    config = config_of(arguments, {"M3": 2, "Gemma": 1})
    with served(nodes, config, tmp_path_factory.mktemp("serve")) as url:
        yield url


def ask(url: str, path: str, body: Any = None, method: str = "POST", **headers: str) -> tuple[Any, ...]:
    """What a client sees of an answer and must not depend on how many machines are behind it."""
    raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    sent = {"Authorization": f"Bearer {KEY}", **headers}
    answer = requests.request(method, url + path, data=raw, headers=sent, timeout=60)
    shown = ("Content-Type", "X-Rerank-Model", "X-Rerank-Truncated", "Allow", "WWW-Authenticate")
    seen = {name: answer.headers.get(name) for name in shown}
    is_json = seen["Content-Type"] == "application/json"
    if is_json:  # a 404 names the server's own base URL
        return answer.status_code, seen, without(json.loads(answer.text.replace(url, "URL")), CHANGING)
    return answer.status_code, seen, answer.text


def without(value: Any, names: set[str]) -> Any:
    if isinstance(value, dict):
        return {name: without(item, names) for name, item in value.items() if name not in names}
    return [without(item, names) for item in value] if isinstance(value, list) else value


TEXTS = ["Cats sleep a lot.", "", "Stocks fell on Friday. " * 60, "Katzen schlafen viel.", "Cats sleep a lot."]
NATIVE = {"query": "how long do cats sleep", "passages": TEXTS}


def contract_requests() -> Iterator[Any]:
    for contract in ALL_CONTRACTS:
        for what, texts in (("texts", TEXTS), ("nothing", []), ("a number", [1])):
            yield pytest.param(contract.route, contract.body(texts), "POST", {}, id=f"{contract.name} of {what}")


@pytest.mark.parametrize(("path", "body", "method", "headers"), [
    *contract_requests(),
    pytest.param("/rerank", NATIVE, "POST", {}, id="native"),
    pytest.param("/rerank", {**NATIVE, "use_llm": True}, "POST", {}, id="gemma"),
    pytest.param("/rerank", {**NATIVE, "use_llm": True, "llm_top_n": 2}, "POST", {}, id="two stages"),
    pytest.param("/rerank", {**NATIVE, "on_overflow": "error"}, "POST", {}, id="overflow names its passage"),
    pytest.param("/rerank", {**NATIVE, "on_overflow": "chunk", "use_llm": True}, "POST", {}, id="windows"),
    pytest.param("/rerank", {**NATIVE, "raw_scores": True, "model": "gemma"}, "POST", {}, id="by name"),
    pytest.param("/rerank", {**NATIVE, "timeout": 1e-9}, "POST", {}, id="too late"),
    pytest.param("/rerank", NATIVE, "POST", {"Authorization": "Bearer another"}, id="wrong key"),
    pytest.param("/rerank", b'{"query": "\xff"}', "POST", {}, id="not UTF-8"),
    pytest.param("/rerank", b'{"texts": ["a"], "query": 1}', "POST", {}, id="TEI's error"),
    pytest.param("/rerank", b"x" * 33_000_000, "POST", {}, id="too large"),
    pytest.param("/rerank", None, "DELETE", {}, id="method"),
    pytest.param("/nothing", NATIVE, "POST", {}, id="route"),
    *(pytest.param(path, None, "GET", {}, id=path)
      for path in ("/health", "/info", "/v1/models", "/openapi.json", "/docs")),
])  # fmt: skip
def test_serve_answers_as_the_single_server(
    single: str, url: str, path: str, body: Any, method: str, headers: dict[str, str]
) -> None:
    """A client that moves from one server to many machines sees no difference: scores to the bit, error shapes,
    headers."""
    ask(single, "/rerank", {**NATIVE, "use_llm": True})  # gemma is loaded: /health then says the same
    assert ask(url, path, body, method, **headers) == ask(single, path, body, method, **headers)


def test_no_request_is_lost_when_a_replica_dies(single: str, url: str) -> None:
    """Under load one of M3's two replicas is killed: every request is still answered, and with the right scores."""
    bodies = [{"query": f"question {n}", "passages": [f"text {n} of {m}" for m in range(40)]} for n in range(90)]
    expected = [ask(single, "/rerank", body) for body in bodies]
    answers: list[Any] = [None] * len(bodies)
    numbers = iter(range(len(bodies)))
    lock = threading.Lock()

    def client() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            answers[number] = ask(url, "/rerank", bodies[number])

    clients = [threading.Thread(target=client) for _ in range(N_CLIENTS)]
    for thread in clients:
        thread.start()
    while sum(answer is not None for answer in answers) < len(bodies) // 3:
        time.sleep(0.01)
    os.kill(processes_named("ServeReplica:rerank:M3")[0], signal.SIGKILL)
    for thread in clients:
        thread.join()
    for answer, due in zip(answers, expected, strict=True):
        assert answer[:2] == due[:2]
        assert answer[2] == pytest.approx(due[2], abs=PACKING_TOLERANCE)


def processes_named(title: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            is_it = title in path.read_bytes().decode("utf-8", "replace")
        except OSError:  # it ended meanwhile
            continue
        if is_it and is_ours(int(path.parent.name)):
            found.append(int(path.parent.name))
    return found


def is_ours(pid: int) -> bool:
    """Whether it descends from this process."""
    while pid > 1 and pid != os.getpid():
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return pid == os.getpid()


def test_serve_build_writes_a_valid_config(nodes: Any, tmp_path: Path) -> None:
    """`serve build` knows the deployments by the names that config.yaml uses, and Serve's own schema takes both."""
    from ray.serve.schema import ServeDeploySchema

    if not (ROOT / "models" / "mini-Q8_0.gguf").is_file():
        pytest.skip("models/mini-Q8_0.gguf is not there: `make mini` makes it")
    built = tmp_path / "built.yaml"
    run(nodes, "serve", "build", "cluster.serve_app:default", "-o", built)
    names = []
    for file in (built, ROOT / "cluster" / "config.yaml"):
        config = ServeDeploySchema.model_validate(yaml.safe_load(file.read_text()))
        names.append({deployment.name for deployment in config.applications[0].deployments})
    assert names[0] >= names[1] == {"Ingress", "M3"}


@pytest.mark.parametrize(("values", "said"), [
    ({"port": 9000}, "'port' is not set here"),
    ({"max_lenght": 512}, "'max_lenght' is not set here"),
    ({"max_length": 7}, "--max-length must be between"),
    ({"m3": "/no/such.gguf"}, "--m3: there is no file /no/such.gguf"),
])  # fmt: skip
def test_a_wrong_argument_is_named(values: dict[str, Any], said: str) -> None:
    """A typing error in the config is found at once and not served with a default in its place."""
    from cluster.serve_app import app
    from rerank_server import SettingsError

    with pytest.raises(SettingsError, match=said):
        app(values)
