"""A calibrated score is a probability; the server applies exactly the fitted map, and only to the file it is for."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from server_process import ROOT, ServerProcess

import rerank_server
from bench import calibrate

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


# --- the whole way: judged data -> file -> server -------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not MINI.is_file():
        pytest.skip(f"{MINI} is not there: `make mini` makes it")
    path = tmp_path_factory.mktemp("calibration") / "mini.json"
    assert calibrate.main([str(MINI), "--data", str(SAMPLE), "--balanced", "--out", str(path)]) == 0
    return path


def test_the_file_says_what_it_was_fitted_for_and_how_good_it_is(calibration: Path) -> None:
    """A threshold is only as good as the data behind it."""
    [entry] = json.loads(calibration.read_text())["calibrations"]
    assert entry["file"] == MINI.name
    assert (entry["kind"], entry["quantization"], entry["file_bytes"]) == ("bi-encoder", "Q8_0", MINI.stat().st_size)
    assert entry["expected_calibration_error"]["after"] < entry["expected_calibration_error"]["before"]
    assert entry["queries"] == 30
    assert calibration.with_suffix(".png").stat().st_size > 1000


def test_the_server_applies_the_map_to_scores_and_leaves_logits_and_order(calibration: Path, mini_server: str) -> None:
    """A threshold on a score that is mapped otherwise, or twice, is worth nothing."""
    server = ServerProcess("--m3", MINI, "--calibration", calibration)
    try:
        assert "calibrated: sigmoid(" in server.report
        plain = ranked(mini_server_of(mini_server), raw_scores=True)
        logits, scores = ranked(server, raw_scores=True), ranked(server)
        _, native, _ = server.rerank(query=QUERY, passages=DOCUMENTS)
    finally:
        assert server.stop() == 0
    [entry] = json.loads(calibration.read_text())["calibrations"]
    assert logits == plain
    assert [index for index, _ in scores] == [index for index, _ in logits]
    for (index, score), (_, logit) in zip(scores, logits, strict=True):
        expected = rerank_server.sigmoid(entry["scale"] * logit + entry["bias"])
        assert score == pytest.approx(expected, abs=SAME_SCORE)
        assert native[index] == score
    plainly = [rerank_server.sigmoid(logit) for _, logit in logits]
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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"file_bytes": 1}, "was fitted for another mini-Q8_0.gguf (its file_bytes was 1"),
        ({"kind": "cross-encoder"}, "was fitted for another mini-Q8_0.gguf (its kind was 'cross-encoder'"),
        ({"file": "other.gguf"}, "was fitted for other.gguf, not for mini-Q8_0.gguf"),
        ({"scale": -1.0}, "make no rising curve"),
        ({"scale": "steep"}, "not a file of `python -m bench.calibrate`"),
        ({"bias": float("nan")}, "make no rising curve"),
    ],
)
def test_a_map_for_another_file_or_without_sense_ends_the_start(
    calibration: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    """Scores by another model's curve look like probabilities and are none."""
    entry = json.loads(calibration.read_text())["calibrations"][0] | change
    assert said in refused(tmp_path, json.dumps({"calibrations": [entry]}))


@pytest.mark.parametrize("text", ["", "[]", "null", '{"calibrations": 3}', '{"calibrations": [{}]}', "\x00"])
def test_a_file_that_is_no_calibration_ends_the_start_in_one_line(tmp_path: Path, text: str) -> None:
    """Not in a traceback."""
    if not MINI.is_file():
        pytest.skip(f"{MINI} is not there: `make mini` makes it")
    assert "not a file of `python -m bench.calibrate`" in refused(tmp_path, text)


def refused(folder: Path, text: str) -> str:
    """The one line with which a server refuses a calibration file of this content."""
    path = folder / "calibration.json"
    path.write_text(text)
    with pytest.raises(rerank_server.SettingsError) as error:
        rerank_server.find_roles(rerank_server.Settings(m3=MINI, calibration=path))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_calibration_file_ends_the_start_with_status_2(tmp_path: Path) -> None:
    """As every wrong setting does."""
    command = [sys.executable, str(ROOT / "rerank_server.py"), "--calibration", str(tmp_path / "none.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"rerank_server.py: --calibration: there is no file {tmp_path / 'none.json'}\n"


def test_maps_of_other_files_are_kept(calibration: Path, tmp_path: Path) -> None:
    """One file serves m3 and gemma."""
    path = tmp_path / "both.json"
    [entry] = json.loads(calibration.read_text())["calibrations"]
    path.write_text(json.dumps({"calibrations": [entry | {"file": "gemma.gguf"}, entry]}))
    assert calibrate.main([str(MINI), "--data", str(SAMPLE), "--negatives", "5", "--out", str(path)]) == 0
    first, second = json.loads(path.read_text())["calibrations"]
    assert (first["file"], second["file"]) == ("gemma.gguf", MINI.name)
    assert second["pairs"] < entry["pairs"]


def test_a_file_with_something_else_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], calibration: Path
) -> None:
    """--out with a wrong name must not destroy a user's file."""
    path = tmp_path / "precious.json"
    path.write_text('{"mine": 1}')
    assert calibrate.main([str(MINI), "--data", str(SAMPLE), "--out", str(path)]) == 1
    assert "holds no calibrations" in capsys.readouterr().err
    assert path.read_text() == '{"mine": 1}'
