"""A gemma fine-tune is asked what it was trained to be asked: its prompt and prefixes are written into the file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import make_bert, make_gemma
from conftest import ROOT, load_engine
from golden.inputs import TEXTS

import rerank_server
from convert.gguf_file import GgufFile
from convert.job import Job
from convert.reference import PromptParts


def run(*arguments: str | Path, module: str = "convert") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("prefix", ["Frage: ", ""])
def test_a_fine_tunes_own_prompt_is_what_the_server_asks(prefix: str, tmp_path: Path) -> None:
    """An empty prefix as well: a key that is left out would give the original's."""
    checkpoint, out = make_gemma(tmp_path / "tiny"), tmp_path / "out"
    given = [
        "--prompt",
        "Passt es? Ja oder nein.",
        "--query-prefix",
        prefix,
        "--passage-prefix",
        prefix,
    ]
    done = run(checkpoint, "--quant", "Q8_0", "--out", out, *given)
    assert done.returncode == 0, done.stderr
    assert "24/24" in done.stdout
    metadata = GgufFile.open(out / "tiny-Q8_0.gguf").metadata
    assert metadata["rerank.prompt"] == "Passt es? Ja oder nein."
    assert metadata["rerank.query_prefix"] == metadata["rerank.passage_prefix"] == prefix
    parts = PromptParts("Passt es? Ja oder nein.", prefix, prefix)
    expected, engine = (
        Job.open(checkpoint, parts=parts).pairs,
        load_engine(out / "tiny-Q8_0.gguf", 512),
    )
    (pair,) = engine.pairs.make("What is it?", ["It is this."])
    engine.close()
    assert list(pair.ids) == expected.ids("What is it?", "It is this.")
    assert list(pair.ids) != Job.open(checkpoint).pairs.ids("What is it?", "It is this.")
    verified = run(out / "tiny-Q8_0.gguf", "--against", checkpoint, module="convert.verify")
    assert verified.returncode == 0, verified.stderr + verified.stdout


def test_a_prompt_for_a_model_that_reads_none_is_refused(tmp_path: Path) -> None:
    done = run(make_bert(tmp_path / "tiny"), "--out", tmp_path / "out", "--prompt", "Does it fit?")
    assert done.returncode == 2
    assert "--prompt, --query-prefix and --passage-prefix are for a Gemma reranker" in done.stderr
    assert done.stderr.count("\n") == 1


def test_gemmas_vocabulary_is_read_from_tokenizer_json_alone(tmp_path: Path) -> None:
    """transformers 5 saves no tokenizer.model; the ids must be those of the file that is there."""
    from checkpoints import write_tokenizer_json

    checkpoint, out = make_gemma(tmp_path / "tiny"), tmp_path / "out"
    write_tokenizer_json(checkpoint)
    (checkpoint / "tokenizer.model").unlink()
    done = run(checkpoint, "--quant", "F32", "--out", out)
    assert done.returncode == 0, done.stderr
    encode, engine = (
        Job.open(checkpoint).pairs.encode,
        load_engine(out / "tiny-F32.gguf", rerank_server.MAX_MAX_LENGTH_TOKENS),
    )
    for name, text in TEXTS.items():
        if not any(marker in text for marker in ("<bos>", "<eos>", "<pad>", "<unk>")):
            assert engine.pairs._tokenize(text) == encode(text), name
    engine.close()
