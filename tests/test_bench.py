"""The bench itself works: every number is there and of the right kind. Never whether it is fast."""

from __future__ import annotations

import gzip
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import __main__ as bench
from bench import checkpoints, fairness, gpu, http, memory, profile, report, scaling, settings
from bench.engines import ACCEL_LIBRARY, Engine, MissingError, Setup
from bench.texts import Request, made_lists, read_texts

TINY = ("--hidden", "256", "--layers", "1", "--vocabulary", "4000")
# An engine as small as one can be: its scores are the passages' lengths; "refuse" makes it answer 500.
FAKE_ENGINE = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.answer(200, {})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer(500 if "refuse" in body["passages"] else 200, [len(passage) for passage in body["passages"]])
    def answer(self, status, value):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def fake_engine(name: str) -> Engine:
    return Engine(name, lambda setup, port: [sys.executable, "-c", FAKE_ENGINE, str(port)])


def engine_that_is_missing(setup: Setup, port: int) -> list[str]:
    raise MissingError("not installed")


@pytest.fixture(scope="module")
def m3_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the results of a whole run: a tiny m3, made, converted and served, and no peer."""
    folder = tmp_path_factory.mktemp("bench")
    status = bench.main(["--models", "m3", *TINY, "--quant", "Q8_0", "--runs", "2", "--sizes", "1", "3", "--clients",
                         "2", "--peers", "text-embeddings-inference", "--cache", str(folder / "cache"), "--out",
                         str(folder / "results"), "--", "--threads", "1"])  # fmt: skip
    assert status == 0
    return folder / "results"


@pytest.fixture
def setup() -> Setup:
    return Setup("m3", {}, None, Path(sys.executable))


def test_a_run_writes_every_figure_for_every_scenario(m3_results: Path) -> None:
    """A figure that is missing or zero would leave a hole in the published table."""
    result = json.loads((m3_results / "m3.json").read_text())
    engines = ["rerank-server Q8_0"]
    if ACCEL_LIBRARY.is_file():
        engines += [f"rerank-server Q8_0, {mode} engine" for mode in ("bf16", "int8")]
    measured = sorted((row["engine"], row["scenario"]) for row in result["rows"])
    assert measured == [(engine, scenario) for engine in engines for scenario in ("1", "2 clients x 10", "3")]
    for row in result["rows"]:
        numbers = [value for value in row.values() if not isinstance(value, str)]
        assert len(numbers) == 9
        assert all(math.isfinite(number) and number > 0 for number in numbers), row
        assert row["tokens_per_second_min"] <= row["tokens_per_second"] <= row["tokens_per_second_max"]
        assert row["p50_ms"] <= row["p95_ms"]


def test_a_run_says_on_what_it_was_made(m3_results: Path) -> None:
    """A speed without its CPU, versions and command can be neither checked nor repeated."""
    result = json.loads((m3_results / "m3.json").read_text())
    machine = result["machine"]
    assert machine["cpu"]
    assert machine["cpus"] >= 1
    assert machine["command"].startswith("python -m bench")
    assert "llama-cpp-python" in machine["packages"]
    text = (m3_results / "m3.md").read_text()
    assert machine["cpu"] in text
    assert "not measured: text-embeddings-inference" in text


def test_engines_are_asked_in_turn_with_the_same_lists(setup: Setup) -> None:
    """Were one engine measured after the other, a machine that slows down would make the later ones look slow."""
    engines = [fake_engine("first"), Engine("absent", engine_that_is_missing), fake_engine("second")]
    scenario = bench.Scenario(2, clients=2, requests=3)
    rounds = [bench.Round(scenario, [Request("q", (f"{n}", "passage"))] * 3, n_tokens=60) for n in range(2)]
    saved: list[dict[str, Any]] = []
    result = bench.compare(engines, setup, rounds, saved.append)
    assert len(saved) == len(rounds)
    assert saved[-1] == result
    assert result["missing"] == {"absent": "not installed"}
    assert [row["engine"] for row in result["rows"]] == ["first", "second"]
    running = ["first", "second", "third"]
    orders = [bench.rotated(running, number) for number in range(3)]
    assert [order[0] for order in orders] == running
    assert all(sorted(order) == sorted(running) for order in orders)


def test_an_engine_that_refuses_a_list_is_left_out_with_its_reason(setup: Setup) -> None:
    """An error that is answered quickly must not count as speed."""
    rounds = [bench.Round(bench.Scenario(1), [Request("q", (text,))], n_tokens=9) for text in ("good", "refuse")]
    result = bench.compare([fake_engine("fake")], setup, rounds, save=id)
    assert result["rows"] == []
    assert "500" in result["missing"]["fake"]


def test_an_engine_that_ends_at_its_start_is_named_with_its_last_words(setup: Setup) -> None:
    broken = Engine("broken", lambda setup, port: [sys.executable, "-c", "raise SystemExit('no such file')"])
    assert "no such file" in bench.compare([broken], setup, [], save=id)["missing"]["broken"]


def test_scaling_measures_each_axis_alone(m3_results: Path, tmp_path: Path) -> None:
    (file,) = (m3_results.parent / "cache").glob("*Q8_0.gguf")
    assert scaling.main([str(file), "--passages", "1", "3", "--words", "9", "--clients", "2", "--runs", "1",
                         "--out", str(tmp_path)]) == 0  # fmt: skip
    (path,) = tmp_path.glob("scaling-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [(row["axis"], row["value"]) for row in rows] == [("passages", 1), ("passages", 3), ("words", 9),
                                                            ("clients", 2)]  # fmt: skip
    assert rows[0]["tokens"] < rows[1]["tokens"]
    assert all(row["ms"] > 0 for row in rows)


def test_the_http_side_is_measured_with_an_engine_that_computes_nothing(tmp_path: Path) -> None:
    arguments = ["--clients", "1", "2", "--seconds", "0.2", "--runs", "1", "--slow", "9", "--out", str(tmp_path)]
    assert http.main(arguments) == 0
    rows = json.loads((tmp_path / "http.json").read_text())["rows"]
    assert [(row["slow_connections"], row["clients"]) for row in rows] == [(0, 1), (0, 2), (9, 1), (9, 2)]
    assert all(row["requests_per_second"] > 0 and 0 < row["p50_ms"] <= row["p95_ms"] for row in rows)


def test_texts_of_a_beir_directory_come_in_the_run_s_order_and_never_twice(tmp_path: Path) -> None:
    """A pair that comes twice could be answered from an engine's memory."""
    documents = [{"_id": f"d{n}", "title": "Title", "text": f"text {n}"} for n in range(6)]
    queries = [{"_id": f"q{n}", "text": f"query {n}"} for n in range(2)]
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(lines_of(documents)))
    (tmp_path / "queries.jsonl").write_bytes(lines_of(queries))
    (tmp_path / "bm25.tsv").write_text("".join(f"q{n}\td{m}\t1\t9\n" for n in range(2) for m in (n, 5, n + 2)))
    texts = read_texts(tmp_path)
    first, second = texts.request(3), texts.request(3)
    n = int(first.query[-1])
    assert first.passages == (f"Title text {n}", "Title text 5", f"Title text {n + 2}")
    assert second.query != first.query


def test_a_data_directory_without_a_corpus_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="corpus"):
        read_texts(tmp_path).request(1)


def test_made_texts_have_mixed_lengths() -> None:
    """Lists of equal lengths would hide what padding costs."""
    _, passages = next(made_lists())
    lengths = sorted(len(passage.split()) for passage in passages)
    assert lengths[0] >= 10
    assert lengths[-1] > 2 * lengths[len(lengths) // 2]


@pytest.mark.parametrize("model", ["m3", "gemma"])
def test_the_true_sizes_are_those_of_the_published_models(model: str) -> None:
    """568 M and 2.5 B parameters: at another size the figures would be of another model."""
    kind = checkpoints.KINDS[model]
    n_parameters = sum(math.prod(shape) for shape in kind.shapes(kind.config()).values())
    assert round(n_parameters / 1e6) == {"m3": 568, "gemma": 2506}[model]


def test_percentiles_are_nearest_rank() -> None:
    values = [float(n) for n in range(1, 101)]
    assert [bench.percentile(values, percent) for percent in (1, 50, 95, 100)] == [1, 50, 95, 100]
    assert bench.percentile([7.0], 95) == 7


def test_the_ratio_is_to_the_first_engine_of_the_same_list_length() -> None:
    rows: list[dict[str, Any]] = [
        {"engine": engine, "scenario": scenario, "tokens_per_second": speed}
        for engine, scenario, speed in [("a", "1", 10.0), ("a", "9", 30.0), ("b", "1", 5.0), ("b", "9", 60.0)]
    ]
    ratios = [(row["engine"], row["scenario"], row["ratio"]) for row in report.with_ratios(rows)]
    assert ratios == [("a", "1", "1.00 x"), ("b", "1", "2.00 x"), ("a", "9", "1.00 x"), ("b", "9", "0.50 x")]


def lines_of(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# -- One model alone: settings, operations, memory --------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(m3_results: Path) -> Path:
    (file,) = (m3_results.parent / "cache").glob("*-Q8_0.gguf")
    return file


def test_settings_are_measured_beside_the_servers_choice(tiny: Path, tmp_path: Path) -> None:
    names = ["the server's choice", "--ubatch 128", "--threads 1"]
    status = settings.main([str(tiny), "--variants", *names, "--runs", "2", "--passages", "3", "--out", str(tmp_path)])
    assert status == 0
    rows = json.loads((tmp_path / "settings.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == names
    assert rows[0]["ratio"] == 1.0
    assert all(row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in rows)


def test_the_profile_counts_every_matrix_product(tiny: Path, tmp_path: Path) -> None:
    """A layer has six products with weights; a profile that misses some would send us after the wrong operation."""
    assert profile.main([str(tiny), "--runs", "1", "--passages", "2", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / f"profile-{tiny.stem}.json").read_text())
    rows = {row["operation"]: row for row in found["rows"]}
    n_decodes = rows["GELU"]["nodes"]  # one layer
    assert rows["MUL_MAT"]["nodes"] >= 6 * n_decodes
    assert sum(row["percent"] for row in rows.values()) == pytest.approx(100)


def test_memory_is_noted_at_every_stage(tiny: Path, tmp_path: Path) -> None:
    assert memory.main([str(tiny), "--lists", "1", "--longest", "256", "--pairs", "100", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / f"memory-{tiny.stem}.json").read_text())["rows"]
    assert len(rows) == 6
    assert all(row["resident_mb"] > 0 for row in rows)


def test_a_short_request_is_measured_alone_and_beside_a_long_one(tiny: Path, tmp_path: Path) -> None:
    arguments = ["--words", "3", "9", "--passages", "2", "--runs", "2", "--out", str(tmp_path)]
    assert fairness.main([str(tiny), "--long", "2000", *arguments]) == 0
    rows = json.loads((tmp_path / f"fairness-{tiny.stem}.json").read_text())["rows"]
    assert [row["words"] for row in rows] == [3, 9]
    assert all(row["alone_ms"] > 0 and 0 < row["beside_ms"] <= row["beside_ms_max"] for row in rows)


def test_a_long_request_that_is_done_too_soon_is_no_measurement(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="a larger --long"):
        fairness.main([str(tiny), "--long", "1", "--words", "3", "--runs", "1", "--out", str(tmp_path)])


# -- bench.gpu, whose steps must not fail in the minutes for which somebody has a GPU -----------------


@pytest.fixture
def gpu_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu.Run:
    monkeypatch.setattr(gpu, "ARCHITECTURES", ("bert",))
    monkeypatch.setattr(gpu, "TINY_TYPES", ("F32",))
    monkeypatch.setattr(gpu, "LISTS", 2)
    return gpu.Run(True, tmp_path / "cache", tmp_path / "out", Path(sys.executable), False)


def test_the_steps_of_a_gpu_run_give_every_column_of_their_tables(gpu_run: gpu.Run) -> None:
    """Here without a GPU; an error in one of them would cost the rented minutes."""
    results: dict[str, dict[str, Any]] = {}
    for name in ("models", "parity", "speed", "server", "twice"):
        rows = list(gpu.STEPS[name].work(gpu_run))
        assert rows
        assert all(set(row) >= set(gpu.STEPS[name].columns) for row in rows), name
        results[name] = {"seconds": 1.0, "problem": "", "rows": rows}
    (parity,) = results["parity"]["rows"]
    assert parity["within"] == "yes"
    text = "\n".join(gpu.write(gpu.describe(gpu_run), results, gpu_run.out))
    assert "parity: 1 of 1 architectures" in text
    assert json.loads((gpu_run.out / "gpu-no-gpu.json").read_text())["steps"]["speed"]["rows"]


@pytest.mark.parametrize("wrong", [0.01, math.nan])
def test_a_logit_that_is_off_on_a_gpu_is_told(wrong: float) -> None:
    """A wrong score must not hide in a mean, nor one that is no number in a comparison."""
    reference = np.linspace(-1, 1, 37)
    good = gpu.compare(reference + gpu.TOLERANCE, reference)
    assert gpu.worst([good], gpu.TOLERANCE)["within"] == "yes"
    logits = reference.copy()
    logits[5] += wrong * np.ptp(reference)
    assert gpu.worst([good, gpu.compare(logits, reference)], gpu.TOLERANCE)["within"] == "NO"


def test_a_step_that_hangs_is_stopped_with_all_that_it_has_started(tmp_path: Path) -> None:
    """A server or a PyTorch that lives on would sit on the card, and the next step would measure it."""
    pid_file = tmp_path / "pid"
    script = (
        "import pathlib, subprocess; child = subprocess.Popen(['sleep', '60']); "
        f"pathlib.Path({str(pid_file)!r}).write_text(str(child.pid)); child.wait()"
    )
    step = gpu.Step("hangs", gpu.parity, 2, {})
    assert gpu.end_of([sys.executable, "-c", script], step) == "it was stopped after 2 s"
    deadline = time.monotonic() + 5
    while is_running(int(pid_file.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(int(pid_file.read_text()))


def is_running(pid: int) -> bool:
    """A zombie, which nobody has waited for yet, does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_step_that_fails_is_told_and_its_rows_are_kept(gpu_run: gpu.Run) -> None:
    gpu_run.cache.mkdir()
    arguments = ["--cpu", "--cache", str(gpu_run.cache)]
    result = gpu.run_step("agreement", arguments, gpu_run)  # there are no logits to compare with
    assert result["problem"] == "it ended with status 1"
    text = "\n".join(gpu.write(gpu.describe(gpu_run), {"agreement": result}, gpu_run.out))
    assert "Not complete: it ended with status 1." in text


def test_without_a_card_the_reader_is_told_what_to_do() -> None:
    with pytest.raises(SystemExit, match="--cpu"):
        gpu.split_card("")
    assert gpu.split_card("NVIDIA H200, 580.159.04, 143771") == ("NVIDIA H200", "580.159.04", "143771")
