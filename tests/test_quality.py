"""Ranking quality: the measures are the field's, a broken model is noticed, and a bad file ends in one line."""

from __future__ import annotations

import gzip
import http.server
import itertools
import json
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import pytest
from ir_measures import RR, R, nDCG
from server_process import ServerProcess

from bench import beir, metrics, quality

SAMPLE = Path(__file__).resolve().parent / "data" / "quality"  # 30 questions about this project, 60 short texts
MINI = Path(__file__).resolve().parent.parent / "models" / "mini-Q8_0.gguf"
# mini has 0.65 there and BM25 0.35; a ranking by chance 0.08. Another CPU's rounding moves a place or two: 0.01.
FLOOR = 0.62
SAME_MEASURE = 1e-9  # both are sums of a few floats


class FakeScorer:
    """Orders the passages by a function."""

    def __init__(self, order: Callable[[str, list[str]], list[int]]) -> None:
        self._order, self.about, self.n_computed = order, {"file": "fake.gguf", "file_mb": 1.0}, 0

    def order(self, query: str, passages: list[str]) -> list[int]:
        self.n_computed += len(passages)
        return self._order(query, passages)

    def close(self) -> None:
        pass


def system(order: Callable[[str, list[str]], list[int]], name: str = "fake") -> quality.System:
    return quality.System(name, lambda: FakeScorer(order))


def task(top_k: int = 100) -> quality.Task:
    collection = beir.read_collection(SAMPLE)
    return quality.Task(collection, list(collection.queries), beir.bm25_run(collection, 100), "bm25s", top_k)


def measured(*arguments: str, out: Path) -> Any:
    assert quality.main([*arguments, "--data", str(SAMPLE), "--top-k", "100", "--out", str(out)]) == 0
    return json.loads(out.with_suffix(".json").read_text())


@pytest.fixture
def mini() -> str:
    if not MINI.is_file():
        pytest.skip(f"{MINI} is not there: `make mini` makes it")
    return str(MINI)


# --- measures -------------------------------------------------------------------------------------------------------


def test_the_measures_are_those_of_ir_measures_on_the_same_run(tmp_path: Path) -> None:
    """Figures that mean something else than everybody's cannot be compared with any published one."""
    generator = random.Random(1)
    ids = [f"d{number}" for number in range(60)]
    judgements = {
        f"q{number}": {key: generator.choice([-1, 0, 1, 1, 2, 3]) for key in generator.sample(ids, 12)} | {"d0": 1}
        for number in range(40)
    }
    run = {query: generator.sample(ids, generator.randint(1, 40)) for query in judgements}
    beir.write_run(run, tmp_path / "run.trec", "test")
    lines = [f"{query} 0 {key} {grade}\n" for query, grades in judgements.items() for key, grade in grades.items()]
    (tmp_path / "qrels").write_text("".join(lines))
    theirs: dict[str, dict[str, float]] = {"nDCG@10": {}, "RR@10": {}, "R@10": {}}
    for one in ir_measures.iter_calc(
        [nDCG @ 10, RR @ 10, R @ 10], ir_measures.read_trec_qrels(str(tmp_path / "qrels")),
        ir_measures.read_trec_run(str(tmp_path / "run.trec")),
    ):  # fmt: skip
        theirs[str(one.measure)][one.query_id] = one.value
    ours = metrics.measure(beir.read_run(tmp_path / "run.trec"), judgements, list(judgements))
    for name, other in zip(ours, theirs.values(), strict=True):
        assert ours[name].tolist() == pytest.approx([other[query] for query in judgements], abs=SAME_MEASURE), name


def test_a_whole_run_has_the_figures_of_ir_measures(mini: str, tmp_path: Path) -> None:
    """The table would be wrong if reranking lost a candidate, or a query were averaged that should not be."""
    result = measured(mini, "--write-runs", str(tmp_path / "runs"), out=tmp_path / "out")
    [run] = (tmp_path / "runs").iterdir()
    qrels = [ir_measures.Qrel(query, document, grade)
             for query, grades in beir.read_collection(SAMPLE).judgements.items()
             for document, grade in grades.items()]  # fmt: skip
    found = ir_measures.calc_aggregate([nDCG @ 10, RR @ 10, R @ 10], qrels, ir_measures.read_trec_run(str(run)))
    ours = result["systems"][1]["mean"]
    assert ours["ndcg_at_10"] == pytest.approx(found[nDCG @ 10], abs=SAME_MEASURE)
    assert ours["mrr_at_10"] == pytest.approx(found[RR @ 10], abs=SAME_MEASURE)
    assert ours["recall_at_10"] == pytest.approx(found[R @ 10], abs=SAME_MEASURE)


def test_systems_that_never_differ_do_not_differ() -> None:
    """A quantisation that changes no ranking must not look better or worse."""
    values = np.array([0.1, 0.9, 0.5])
    assert metrics.compare([values], [values]) == metrics.Difference(0.0, 0.0, 0.0, 1.0)
    assert metrics.compare([values], [np.array([0.1, 0.9, 0.4])]).p == 1.0, "one query is no evidence"


def test_p_is_the_share_of_sign_flips_that_differ_as_much() -> None:
    """Of the 2^5 ways to swap five queries' values, the two extreme ones differ as much: 1/16."""
    ours, theirs = np.array([0.5, 0.6, 0.7, 0.8, 0.9]), np.array([0.1, 0.1, 0.1, 0.1, 0.1])
    assert metrics.compare([ours], [theirs]).p == pytest.approx(2 / 32)


def test_the_interval_holds_the_difference_and_narrows_with_more_queries() -> None:
    """An interval that is too narrow would make a user choose by chance."""
    generator = np.random.default_rng(1)
    widths = []
    for n_queries in (20, 2000):
        theirs = generator.uniform(0, 1, n_queries)
        found = metrics.compare([theirs + generator.normal(0.1, 0.3, n_queries)], [theirs])
        assert found.low < found.mean < found.high
        # the interval of a mean of n normal values is 2 x 1.96 standard errors wide
        assert found.high - found.low == pytest.approx(2 * 1.96 * 0.3 / np.sqrt(n_queries), rel=0.3)
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 5


def test_every_collection_weighs_the_same_in_the_mean() -> None:
    """A large collection would otherwise decide alone."""
    small, large = np.full(5, 0.4), np.full(500, 0.0)
    assert metrics.compare([small, large], [small * 0, large * 0]).mean == pytest.approx(0.2)


# --- the models -----------------------------------------------------------------------------------------------------


def test_mini_ranks_better_than_the_floor_and_than_bm25(mini: str, tmp_path: Path) -> None:
    """What every clone serves must rank: 30 questions whose answers share few words with them."""
    bm25, ours = measured(mini, out=tmp_path / "out")["systems"]
    assert ours["mean"]["ndcg_at_10"] > FLOOR
    difference = ours["against"]["BM25"]["mean"]
    assert difference["low"] > 0
    assert difference["p"] < 0.05
    assert bm25["mean"]["ndcg_at_10"] < FLOOR


def test_a_shuffled_scorer_stays_under_the_floor() -> None:
    """Else the floor would notice nothing."""
    generator = random.Random(1)
    shuffled = system(lambda _, texts: generator.sample(range(len(texts)), len(texts)))
    swapped = system(lambda query, texts: sorted(range(len(texts)), key=lambda row: len(texts[row])), "by length")
    for row in quality.measure_all([shuffled, swapped], [task()], None, lambda rows: None)[1:]:
        assert row.means("quality")["ndcg_at_10"] < FLOOR / 2


def test_a_model_with_wrong_weights_stays_under_the_floor(gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    """A GGUF that loads and answers, and whose numbers mean nothing."""
    ours = measured(str(gguf_of("bi")), out=tmp_path / "out")["systems"][1]
    assert ours["mean"]["ndcg_at_10"] < FLOOR / 2


def test_a_running_server_ranks_as_its_file_does(mini: str, mini_server: str, tmp_path: Path) -> None:
    """Whoever measures a deployed server must get what the file is worth."""
    address = f"deployed={mini_server}?max_length=256"
    _, file, server = measured(mini, address, "--queries", "10", out=tmp_path / "out")["systems"]
    assert server["name"] == "deployed"
    assert server["mean"] == pytest.approx(file["mean"], abs=0.02)  # one place: batches differ, so does rounding
    assert server["fields"] == {"max_length": 256}


def test_roles_and_two_stages_stand_in_one_table(gguf_of: Callable[..., Path], tmp_path: Path) -> None:
    """Whether gemma is worth its time, alone or after m3, is what this table is asked."""
    for name in ("xlmr", "bi", "gemma"):
        (tmp_path / f"{name}.gguf").symlink_to(gguf_of(name))
    roles = ("mini", "m3", "gemma", "two-stage")
    arguments = ("--models", str(tmp_path), "--queries", "2", "--llm-top-n", "3", "--threads", "1")
    systems = measured(*roles, *arguments, out=tmp_path / "out")["systems"]
    assert [row["name"] for row in systems] == ["BM25", "bi", "xlmr", "gemma", "two-stage (3)"]
    assert systems[4]["files"] == ["xlmr.gguf", "gemma.gguf"]
    assert set(systems[4]["against"]) == {"BM25", "bi"}


def test_a_server_with_a_key_is_asked_with_it(
    gguf_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deployed server has one; without it the answer is one line that says 401."""
    server = ServerProcess("--m3", gguf_of("bi"), "--threads", "1", RERANK_API_KEY="secret")
    try:
        scorer = quality.ServerScorer(server.url)
        monkeypatch.delenv("RERANK_API_KEY", raising=False)
        with pytest.raises(quality.UnusableError, match="answered 401"):
            scorer.order("q", ["one", "two"])
        monkeypatch.setenv("RERANK_API_KEY", "secret")
        assert sorted(scorer.order("q", ["one", "two"])) == [0, 1]
    finally:
        server.stop()


def test_two_stages_rank_the_best_by_the_second_and_the_rest_after_them() -> None:
    """Else two-stage would be measured as another thing than the server's llm_top_n."""
    backwards = FakeScorer(lambda _, texts: list(range(len(texts)))[::-1])
    longest = FakeScorer(lambda _, texts: sorted(range(len(texts)), key=lambda row: -len(texts[row])))
    order = quality.TwoStageScorer(longest, backwards, 2).order("q", ["a", "aaaa", "aaa", "aa"])
    assert order == [2, 1, 3, 0]


def test_candidates_beyond_top_k_stay_behind_in_their_order(tmp_path: Path) -> None:
    """A reranker is not to be praised or blamed for what it was not shown."""
    whole = task(top_k=3)
    runs = tmp_path / "runs"
    quality.measure_all([system(lambda _, texts: list(range(len(texts)))[::-1])], [whole], runs, lambda rows: None)
    run = beir.read_run(runs / "quality.fake.trec")
    for query, candidates in whole.candidates.items():
        assert run[query] == [*candidates[2::-1], *candidates[3:]]


def test_a_table_has_a_row_for_each_system_and_its_difference_to_the_first(mini: str, tmp_path: Path) -> None:
    """A user chooses a quantisation by this table."""
    result = measured(f"one={mini}", f"two={mini}", out=tmp_path / "out")
    assert [row["name"] for row in result["systems"]] == ["BM25", "one", "two"]
    assert result["systems"][2]["against"]["one"]["mean"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    text = (tmp_path / "out.md").read_text()
    assert "− BM25" in text
    assert "− one" in text
    assert sum(row["pairs_per_second"] is not None for row in result["systems"]) == 2


# --- what users give ------------------------------------------------------------------------------------------------


@pytest.fixture
def broken_server() -> Iterator[Callable[[Any], str]]:
    """JSON value -> URL of a server that answers every POST with it."""
    servers = []

    def start(answer: Any) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        servers.append(http.server.HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([0.5], "no results with index and relevance_score"),
        ({"results": [{"index": 0, "relevance_score": 0.5}]}, "2 documents were sent and 1 results came back"),
        ({"results": [{"index": row, "relevance_score": float("nan")} for row in range(2)]}, "not a number"),
    ],
)  # fmt: skip
def test_a_server_that_does_not_score_every_document_is_an_error(
    broken_server: Callable[[Any], str], answer: Any, said: str
) -> None:
    """A lost document or a NaN must not become a figure."""
    with pytest.raises(quality.UnusableError, match=said):
        quality.ServerScorer(broken_server(answer)).order("q", ["one", "two"])


RUNS = {
    "trec": "q1 Q0 d2 1 9.5 tag\nq1 Q0 d1 2 3.5 tag\nq2 Q0 d3 1 -1 tag\n",
    "tsv with ranks": "q1\td2\t1\t9.5\nq1\td1\t2\t3.5\nq2\td3\t1\t-1\n",
    "tsv with a header, not sorted": "query\tdocument\tscore\nq1\td1\t3.5\nq1\td2\t9.5\nq2\td3\t-1\n",
}


@pytest.mark.parametrize(("name", "ending"), list(itertools.product(RUNS, ("", ".gz"))))
def test_candidates_are_read_in_each_format(tmp_path: Path, name: str, ending: str) -> None:
    """Every search engine writes one of these."""
    path = tmp_path / f"run{ending}"
    path.write_bytes(gzip.compress(RUNS[name].encode()) if ending else RUNS[name].encode())
    assert beir.read_run(path) == {"q1": ["d2", "d1"], "q2": ["d3"]}


def write_collection(directory: Path, **files: str) -> Path:
    contents = {
        "corpus.jsonl": '{"_id": "d1", "title": "Cats", "text": "sleep."}\n{"_id": "d2", "text": "Dogs bark."}\n',
        "queries.jsonl": '{"_id": "q1", "text": "who sleeps"}\n{"_id": "q2", "text": "nobody judged this"}\n',
        "qrels/test.tsv": "query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td2\t0\n",
    } | {name.replace("__", "/").replace("_", "."): text for name, text in files.items()}
    for name, text in contents.items():
        path = directory / f"{name}.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()))
    return directory


def test_a_collection_is_read_as_beir_lays_it_out(tmp_path: Path) -> None:
    """Titles belong to the text; a query without a relevant document would count as a failure of every system."""
    collection = beir.read_collection(write_collection(tmp_path / "set"))
    assert collection.corpus == {"d1": "Cats sleep.", "d2": "Dogs bark."}
    assert list(collection.queries) == ["q1"]
    assert beir.find_collections([tmp_path]) == [tmp_path / "set"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"corpus_jsonl": "{"}, "corpus.jsonl.gz, line 1: not a JSON object with _id and text"),
        ({"queries_jsonl": '{"_id": "q1"}'}, "queries.jsonl.gz, line 1"),
        ({"qrels__test_tsv": "query-id\tcorpus-id\tscore\nq1\td1\tyes\n"}, "test.tsv.gz, line 2"),
        ({"qrels__test_tsv": "q1\td1\t0\n"}, "no query of queries.jsonl has a relevant document"),
    ],
)
def test_a_bad_collection_ends_in_one_line_that_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mini: str, files: dict[str, str], said: str
) -> None:
    """Not in a traceback."""
    directory = write_collection(tmp_path / "set", **files)
    assert quality.main([mini, "--data", str(directory), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing.gguf"], "'nothing.gguf' is neither a file, nor a URL"),
        (["m3", "--models", "."], "make convert MODEL=m3 makes one"),
        (["two-stage", "--models", "."], "there is no m3 file"),
        (["http://127.0.0.1:9/"], "http://127.0.0.1:9/v1/rerank"),
        ([str(SAMPLE / "corpus.jsonl")], "corpus.jsonl"),
    ],
)
def test_a_system_that_cannot_be_used_ends_in_one_line_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    """Not in a traceback."""
    monkeypatch.chdir(tmp_path)
    assert quality.main([*arguments, "--data", str(SAMPLE), "--out", str(tmp_path / "out")]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bench.quality: ")]
    assert len(error) == 1
    assert said in error[0]
