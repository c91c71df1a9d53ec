"""A calibrated score is a probability; the server applies exactly the fitted map, which the file itself holds."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import Gguf
from server_process import ROOT, ServerProcess
from test_http import sigmoid

import rerank_server
from bench import calibrate
from convert.gguf_file import GgufFile

SAMPLE = Path(__file__).resolve().parent / "data" / "quality"
MINI = ROOT / "models" / "mini-Q8_0.gguf"
QUERY = "How long do cats sleep in a day?"
DOCUMENTS = ["Cats sleep between 12 and 16 hours a day.", "A cat needs fresh water.", "Stocks fell on Friday."]
SAME_SCORE = 1e-12  # the same formula on the same float


def judged(x: Any, y: Any) -> calibrate.Judged:
    number = np.arange(len(x), dtype=float) // 5
    return calibrate.Judged(np.asarray(x, float), np.asarray(y, float), np.ones(len(x)), number)


def drawn(scale: float, bias: float, n: int = 20_000) -> calibrate.Judged:
    """Logits, and judgements drawn with the probability that the curve gives them."""
    generator = np.random.default_rng(1)
    x = generator.normal(-2, 3, n)
    return judged(x, generator.uniform(size=n) < 1 / (1 + np.exp(-(scale * x + bias))))


def test_the_fit_finds_the_curve_that_the_judgements_came_from() -> None:
    """Another curve would not give probabilities."""
    scale, bias = calibrate.fit(drawn(0.6, 1.5))
    assert scale == pytest.approx(0.6, abs=0.03)
    assert bias == pytest.approx(1.5, abs=0.06)


def test_logits_that_part_the_two_kinds_perfectly_have_a_finite_curve() -> None:
    """A small and easy data set must not give infinite constants."""
    scale, bias = calibrate.fit(judged([-3, -2, -1, 1, 2, 3], [0, 0, 0, 1, 1, 1]))
    assert 0 < scale < 10
    assert math.isfinite(bias)


def test_expected_calibration_error_is_the_mean_distance_of_score_and_share() -> None:
    """By hand: half the pairs score 0.9 and half of those are relevant, half score 0.1 and none is."""
    pairs = judged([0] * 8, [1, 1, 0, 0, 0, 0, 0, 0])
    bins = calibrate.bins_of(np.array([0.9] * 4 + [0.1] * 4), pairs)
    assert calibrate.calibration_error(bins) == pytest.approx(0.5 * 0.4 + 0.5 * 0.1)


def test_calibrating_lowers_the_error_on_queries_that_were_not_fitted_on() -> None:
    """Else it is for nothing."""
    pairs = drawn(0.6, 1.5)
    before = calibrate.calibration_error(calibrate.bins_of(1 / (1 + np.exp(-pairs.x)), pairs))
    after = calibrate.calibration_error(calibrate.bins_of(calibrate.unseen_scores(pairs), pairs))
    assert before > 0.1
    assert after < 0.02


# --- the whole way: judged data -> GGUF file -> server -----------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not MINI.is_file():
        pytest.skip(f"{MINI} is not there: `make mini` makes it")
    path = tmp_path_factory.mktemp("calibration") / "mini-calibrated.gguf"
    assert calibrate.main([str(MINI), "--data", str(SAMPLE), "--balanced", "--out", str(path)]) == 0
    return path


def test_the_report_says_what_was_fitted_and_how_good_it_is(calibrated: Path) -> None:
    """A threshold is only as good as the data behind it."""
    entry = json.loads(calibrated.with_suffix(".json").read_text())
    assert entry["file"] == MINI.name
    assert (entry["kind"], entry["quantization"], entry["file_bytes"]) == ("bi-encoder", "Q8_0", MINI.stat().st_size)
    assert entry["expected_calibration_error"]["after"] < entry["expected_calibration_error"]["before"]
    assert entry["queries"] == 30
    assert calibrated.with_suffix(".png").stat().st_size > 1000
    assert not list(calibrated.parent.glob("*.part"))


def test_the_copy_differs_in_the_map_alone(calibrated: Path) -> None:
    """A tensor that moved by a byte, or a key that got lost, is another model."""
    entry = json.loads(calibrated.with_suffix(".json").read_text())
    numbers = {calibrate.SCALE: entry["scale"], calibrate.BIAS: entry["bias"]}
    assert_copy(MINI, calibrated, numbers)
    assert rerank_server.GgufFile.open(calibrated).header_is_intact(), "else it is checked in full at each start"


def assert_copy(source: Path, copy: Path, numbers: dict[str, float]) -> None:
    """By the gguf package's own reader, which had no part in making it."""
    old, new = gguf.GGUFReader(source), gguf.GGUFReader(copy)
    own = ("GGUF.", "rerank.header_sha256")
    contents = [{key: field.contents() for key, field in reader.fields.items() if not key.startswith(own)}
                for reader in (old, new)]  # fmt: skip
    assert contents[1] == contents[0] | numbers
    assert len(new.tensors) == len(old.tensors)
    for left, right in zip(old.tensors, new.tensors, strict=True):
        assert (left.name, left.tensor_type, list(left.shape)) == (right.name, right.tensor_type, list(right.shape))
        assert left.data.tobytes() == right.data.tobytes()


def test_a_copy_of_a_copy_has_the_new_map_alone(gguf_of: Gguf, tmp_path: Path) -> None:
    """A file that was calibrated for other data is calibrated again, not twice."""
    source, numbers = gguf_of("bert"), {calibrate.SCALE: 0.5, calibrate.BIAS: -1.25}
    once, twice = tmp_path / "once.gguf", tmp_path / "twice.gguf"
    GgufFile.open(source).copy_with(once, {calibrate.SCALE: 3.0, calibrate.BIAS: 1.0})
    GgufFile.open(once).copy_with(twice, numbers)
    assert_copy(source, twice, numbers)
    opened = rerank_server.GgufFile.open(twice)
    assert opened.header_is_intact()
    model = rerank_server.describe(opened)
    assert (model.calibration_scale, model.calibration_bias) == (0.5, -1.25)


def test_a_header_that_was_changed_does_not_become_right_by_copying(gguf_of: Gguf, tmp_path: Path) -> None:
    """The server checks a file in full unless its header is what was verified."""
    changed, copy = tmp_path / "changed.gguf", tmp_path / "copy.gguf"
    changed.write_bytes(gguf_of("bert").read_bytes().replace(b"rerank.source", b"rerank.sourcE", 1))
    GgufFile.open(changed).copy_with(copy, {calibrate.SCALE: 0.5})
    assert not rerank_server.GgufFile.open(copy).header_is_intact()


def test_the_server_applies_the_map_to_scores_and_leaves_logits_and_order(calibrated: Path, mini_server: str) -> None:
    """A threshold on a score that is mapped otherwise, or twice, is worth nothing."""
    server = ServerProcess("--m3", calibrated)
    try:
        assert "calibrated: sigmoid(" in server.report
        plain = ranked(mini_server_of(mini_server), raw_scores=True)
        logits, scores = ranked(server, raw_scores=True), ranked(server)
        _, native, _ = server.rerank(query=QUERY, passages=DOCUMENTS)
    finally:
        assert server.stop() == 0
    entry = json.loads(calibrated.with_suffix(".json").read_text())
    assert logits == plain
    assert [index for index, _ in scores] == [index for index, _ in logits]
    for (index, score), (_, logit) in zip(scores, logits, strict=True):
        expected = sigmoid(entry["scale"] * logit + entry["bias"])
        assert score == pytest.approx(expected, abs=SAME_SCORE)
        assert native[index] == score
    plainly = [sigmoid(logit) for _, logit in logits]
    assert [score for _, score in scores] != pytest.approx(plainly, abs=0.01), "this sample's map must differ from none"


def mini_server_of(url: str) -> ServerProcess:
    """A client of a server that another fixture runs."""
    server = object.__new__(ServerProcess)
    server.url = url
    return server


def ranked(server: ServerProcess, **fields: Any) -> list[tuple[int, float]]:
    status, body, _ = server.rerank("/v1/rerank", query=QUERY, documents=DOCUMENTS, **fields)
    assert status == 200
    return [(row["index"], row["relevance_score"]) for row in body["results"]]


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_map_that_does_not_rise_is_refused(scale: float, gguf_of: Gguf, tmp_path: Path) -> None:
    """The worst passage would come first, or no score be a number."""
    GgufFile.open(gguf_of("bert")).copy_with(tmp_path / "bad.gguf", {calibrate.SCALE: scale})
    with pytest.raises(rerank_server.ModelError, match="calibration_scale") as error:
        rerank_server.describe(rerank_server.GgufFile.open(tmp_path / "bad.gguf"))
    assert "\n" not in str(error.value)


def test_a_bias_that_is_no_number_is_refused(gguf_of: Gguf, tmp_path: Path) -> None:
    GgufFile.open(gguf_of("bert")).copy_with(tmp_path / "bad.gguf", {calibrate.BIAS: math.nan})
    with pytest.raises(rerank_server.ModelError, match="calibration_bias"):
        rerank_server.describe(rerank_server.GgufFile.open(tmp_path / "bad.gguf"))


@pytest.mark.parametrize("name", ["precious.json", "precious.gguf", "plain.gguf", "mini.gguf"])
def test_another_file_is_not_overwritten(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--out with a wrong name must not destroy a user's file: notes, another model, or the model itself."""
    if not MINI.is_file():
        pytest.skip(f"{MINI} is not there: `make mini` makes it")
    path, mini = tmp_path / name, tmp_path / "mini.gguf"
    shutil.copy(MINI, mini)
    if name == "plain.gguf":
        shutil.copy(MINI, path)
    elif name != "mini.gguf":
        path.write_text('{"mine": 1}')
    before = path.read_bytes()
    assert calibrate.main([str(mini), "--data", str(SAMPLE), "--out", str(path)]) == 1
    said = capsys.readouterr().err.splitlines()
    assert str(path) in said[-1]
    assert "Traceback" not in said[-1]
    assert path.read_bytes() == before
