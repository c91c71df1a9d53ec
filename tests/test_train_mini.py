"""Training: what comes out is a file that the server can serve, a stop costs nothing, and no eval text is learned."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the extra train: pip install -e '.[convert,bench,train]'")
pytest.importorskip("transformers", reason="needs the extra train: pip install -e '.[convert,bench,train]'")

import torch

from bench import beir, quality, train_mini
from rerank_server import Settings

SAMPLE = Path(__file__).resolve().parent / "data" / "quality"
STEPS = 150  # so many learn 68 lists by heart: the tiny model knows no words, so nothing carries over to others

pytestmark = pytest.mark.reference


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample collection as training data."""
    folder = tmp_path_factory.mktemp("train")
    sample = beir.read_collection(SAMPLE)
    write_rows(folder / "own.passages.jsonl.gz", [{"id": key, "text": text} for key, text in sample.corpus.items()])
    write_rows(folder / "own.questions.jsonl.gz", [
        {"query": text, "positives": [doc for doc, grade in sample.judgements[key].items() if grade > 0], "answers": []}
        for key, text in sample.queries.items()
    ])  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def excluded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection that shares a document and a query with the data."""
    folder = tmp_path_factory.mktemp("excluded")
    sample = beir.read_collection(SAMPLE)
    document, query = next(iter(sample.corpus.values())), list(sample.queries.values())[5]
    (folder / "corpus.jsonl").write_text(json.dumps({"_id": "1", "text": document.upper()}) + "\n")
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "1", "text": f"{query} "}) + "\n")
    return folder


@pytest.fixture(scope="module")
def command(data: Path, excluded: Path, checkpoint_of: Callable[[str], Path]) -> list[str]:
    tiny = str(checkpoint_of("bi"))
    return ["--data", str(data), "--base", tiny, "--teacher", tiny, "--steps", str(STEPS), "--lists-per-step", "4",
            "--learning-rate", "5e-3", "--threads", "1", "--exclude", str(excluded)]  # fmt: skip


@pytest.fixture(scope="module")
def run(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("out")
    assert train_mini.main([*command, "--out", str(out)]) == 0
    return out


def test_a_run_ends_in_a_file_that_scores_and_its_configuration_and_results(run: Path) -> None:
    """From a checkpoint and data to what the server serves, in one command."""
    scorer = quality.FileScorer(run / "checkpoint-Q8_0.gguf", Settings(threads=1))
    try:
        assert scorer.about["kind"] == "cross-encoder"
        assert len(set(scorer.logits("how is a score made?", ["by a sigmoid", "with great care"]))) == 2
    finally:
        scorer.close()
    result = json.loads((run / "training.json").read_text())
    assert result["config"]["steps"] == STEPS
    assert -1 <= result["held_out"]["correlation_with_the_teachers"] <= 1
    assert 0 < result["held_out"]["teachers_first_is_right"] <= 1


def test_the_loss_falls(run: Path) -> None:
    """Else nothing is learned."""
    losses = torch.load(run / "state.pt", weights_only=True)["losses"]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_no_text_of_an_excluded_collection_is_trained_on(run: Path, excluded: Path) -> None:
    """A model that was trained on an eval set cannot be measured on it."""
    examples = [train_mini.Example(**row) for row in train_mini.read_jsonl(run / "lists.jsonl.gz")]
    trained = {train_mini.normal(text) for one in examples for text in (one.query, *one.passages)}
    assert len(trained) > 60
    assert not trained & train_mini.texts_of([excluded])
    [about] = json.loads((run / "training.json").read_text())["data"]
    assert about["rows_dropped_since_excluded"] >= 2


def test_a_stopped_run_goes_on_to_the_same_weights(
    run: Path, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hours of training must survive a restart, and the seed must decide what comes out."""
    learn = train_mini.Trainer.learn

    def stopped(trainer: train_mini.Trainer, examples: Any) -> float:
        if trainer.step == train_mini.CHECKPOINT_STEPS + 3:
            raise KeyboardInterrupt
        return learn(trainer, examples)

    again = [*command, "--out", str(tmp_path)]
    with monkeypatch.context() as patched:
        patched.setattr(train_mini.Trainer, "learn", stopped)
        assert train_mini.main(again) == 130
    assert "goes on" in capsys.readouterr().err
    assert not (tmp_path / "training.json").exists()
    assert train_mini.main(again) == 0
    first, second = (json.loads((folder / "training.json").read_text()) for folder in (run, tmp_path))
    assert first == second
    weights = [(folder / "checkpoint" / "model.safetensors").read_bytes() for folder in (run, tmp_path)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--steps", "50"], "holds a run with --steps 150, not 50"),
        (["--data", "nowhere", "--out", "new"], "--data nowhere: there is no NAME.passages.jsonl.gz"),
        (["--lists-per-step", "100", "--out", "new"], "are too few for steps of 100"),
    ],
)
def test_what_cannot_be_trained_on_ends_in_one_line(
    run: Path, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], change: list[str], said: str,
) -> None:  # fmt: skip
    """Not in a traceback, and never in a run that mixes two configurations."""
    monkeypatch.chdir(tmp_path)
    assert train_mini.main([*command, "--out", str(run), *change]) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bench.train_mini: ")]
    assert said in line
