"""Files of llama.cpp's own converter: `python -m convert FILE.gguf` makes one that is served right, or says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import EngineOf, Gguf, load_engine
from test_gguf import rewrite, score, tensor_of
from test_parity import TOLERANCE, pairs_of

import rerank_server as server
from convert.__main__ import main as convert

FOREIGN_TEMPLATE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n<Query>: {query}\n"
    "<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
FOREIGN = {
    "qwen3.pooling_type": 4, "qwen3.classifier.output_labels": ["yes", "no"],
    "tokenizer.chat_template.rerank": FOREIGN_TEMPLATE, "tokenizer.chat_template": "{{ messages }}",
}  # fmt: skip



def adopted(path: Path, folder: Path, *flags: str) -> Path:
    assert convert([str(path), "--out", str(folder), *flags]) == 0
    (found,) = folder.glob("*.gguf")
    return found


def refusal(path: Path, folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert convert([str(path), "--out", str(folder), *flags]) in (1, 2)
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert path.name in message
    assert not list(folder.glob("*")), "something is left behind"
    return message


NAME = {"general.name": "Some Reranker"}


@pytest.mark.parametrize("name", ["xlmr", "bert", "gemma", "modernbert"])
def test_an_adopted_file_scores_as_the_converters_own(name: str, gguf_of: Gguf, tmp_path: Path) -> None:
    foreign = rewrite(gguf_of(name), tmp_path / "foreign.gguf", NAME, drop=("rerank.", "general.name"))
    assert score(adopted(foreign, tmp_path / "out")) == score(gguf_of(name))


@pytest.mark.parametrize(("name", "key", "wrong"), [
    ("xlmr", "tokenizer.ggml.remove_extra_whitespaces", False), ("gemma", "tokenizer.ggml.add_space_prefix", True),
])  # fmt: skip
def test_what_llama_cpps_converter_sets_wrong_is_set_right(
    name: str, key: str, wrong: bool, gguf_of: Gguf, tmp_path: Path
) -> None:
    """What it writes when it only finds tokenizer.json: other ids for runs of spaces."""
    foreign = rewrite(gguf_of(name), tmp_path / "foreign.gguf", {key: wrong}, drop=("rerank.",))
    assert score(adopted(foreign, tmp_path / "out", "--reranker")) == score(gguf_of(name))


def test_quantised_weights_are_copied_as_they_are(gguf_of: Gguf, tmp_path: Path, checkpoint_of: Any) -> None:
    assert convert([str(checkpoint_of("xlmr")), "--quant", "Q8_0", "--out", str(tmp_path), "--name", "own"]) == 0
    own = tmp_path / "own-Q8_0.gguf"
    import gguf

    reader = gguf.GGUFReader(own)
    writer = gguf.GGUFWriter(tmp_path / "foreign.gguf", "bert")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture", "rerank.")):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = adopted(tmp_path / "foreign.gguf", tmp_path / "out", "--reranker")
    assert score(found) == score(own)
    assert server.describe(server.GgufFile.open(found)).quantization == "Q8_0"


def test_a_position_table_that_was_not_cut_is_refused(
    gguf_of: Gguf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tensor_of(gguf_of("xlmr"), "position_embd.weight")
    uncut = np.concatenate([np.zeros_like(table[:2]), table])
    change = {"bert.context_length": len(uncut)}
    tensors: dict[str, Any] = {"position_embd.weight": uncut}
    path = rewrite(gguf_of("xlmr"), tmp_path / "uncut.gguf", change, ("rerank.",), tensors)
    assert "two unused rows" in refusal(path, tmp_path / "out", capsys, "--reranker")


@pytest.mark.parametrize("tensor", ["cls.weight", "cls.output.weight"])
def test_a_cross_encoder_without_its_whole_head_is_refused(
    tensor: str, gguf_of: Gguf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The vendored converter drops the pooler of MiniLM rerankers: wrong scores without a word."""
    path = rewrite(gguf_of("bert"), tmp_path / "headless.gguf", None, ("rerank.",), {tensor: None})
    assert "head" in refusal(path, tmp_path / "out", capsys, "--reranker")


WRONG: dict[str, tuple[str, dict[str, Any], tuple[str, ...], str]] = {
    "an embedding model": ("bi", {}, (), "no classification head"),
    "a gemma chat model": ("gemma", {"tokenizer.chat_template": "{{ messages }}"}, (), "chat model"),
    "a qwen chat model": ("qwen3", {"tokenizer.chat_template": "x"}, (), "not a Qwen3-Reranker"),
    "a modernbert that does not say what its head sees": (
        "modernbert", {}, ("modern-bert.classifier.pooling_type",), "which states"),
    "another first token": ("xlmr", {"tokenizer.ggml.bos_token_id": 40}, (), "its pairs begin with"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_reranker_or_a_wrong_one_is_refused(
    what: str, gguf_of: Gguf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Would break: scores between 0 and 1 that mean nothing."""
    name, change, drop, words = WRONG[what]
    path = rewrite(gguf_of(name), tmp_path / "wrong.gguf", change, ("rerank.", *drop))
    assert words in refusal(path, tmp_path / "out", capsys, "--reranker")


def test_nothing_is_adopted_that_does_not_say_that_it_is_a_reranker(
    gguf_of: Gguf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, drop = {"general.name": "Some Model"}, ("rerank.", "general.name")
    path = rewrite(gguf_of("bert"), tmp_path / "some.gguf", change, drop)
    assert "--reranker" in refusal(path, tmp_path / "out", capsys)
    assert "--m3" in refusal(gguf_of("bert"), tmp_path / "out", capsys), "it is one already"


@pytest.mark.parametrize("content", [b"", b"# not a model\n" * 100, b"GGUF" + bytes(100)])
def test_what_is_no_gguf_file_is_refused(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "some.gguf").write_bytes(content)
    refusal(tmp_path / "some.gguf", tmp_path / "out", capsys)


# -- Qwen3-Reranker ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen3_file(gguf_of: Gguf) -> Path:
    return gguf_of("qwen3")


def foreign(source: Path, target: Path, words: list[int], change: dict[str, Any] | None = None) -> Path:
    """The file that llama.cpp's converter makes of the same checkpoint: its rank head holds the rows of yes and no."""
    path = rewrite(source, target, FOREIGN | (change or {}), ("rerank.",))
    head = tensor_of(source, "token_embd.weight")[words]
    return add_tensors(path, target.with_name(f"head-{target.name}"), {"cls.output.weight": head})


def add_tensors(source: Path, target: Path, tensors: dict[str, Any]) -> Path:
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "qwen3")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.ascontiguousarray(tensor.data))
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture(scope="module")
def words(engine_of: EngineOf) -> list[int]:
    engine = engine_of("qwen3")
    assert isinstance(engine, server.YesLogitEngine)
    return engine.words


def test_a_qwen3_reranker_of_llama_cpps_converter_scores_as_the_reference(
    qwen3_file: Path, words: list[int], tmp_path: Path, golden: dict[str, Any]
) -> None:
    """Its head gives softmax of yes and no, and only that: read as a logit, every score would be near one half."""
    path = adopted(foreign(qwen3_file, tmp_path / "foreign.gguf", words), tmp_path / "out")
    engine = load_engine(path, max_length=8192)
    try:
        expected = np.array(golden["qwen3"]["logits"])
        found = server.score_all(engine, pairs_of(engine))
    finally:
        engine.close()
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.ptp(expected))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "labels the other way": ({"qwen3.classifier.output_labels": ["no", "yes"]}, "not a Qwen3-Reranker"),
    "another prompt": ({"tokenizer.chat_template.rerank": "{query} {document}"}, "not a Qwen3-Reranker"),
    "a prompt without an end": (
        {"tokenizer.chat_template.rerank": FOREIGN_TEMPLATE.partition("<|im_end|>\n<|im_start|>assistant")[0]},
        "not a Qwen3-Reranker"),
    "a prompt of two turns": (
        {"tokenizer.chat_template.rerank": FOREIGN_TEMPLATE.replace("\n<Document>", "<|im_end|>\n<Document>")},
        "not a Qwen3-Reranker"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_is_not_understood_is_refused(
    name: str, qwen3_file: Path, words: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, reason = REFUSED[name]
    path = foreign(qwen3_file, tmp_path / "foreign.gguf", words, change)
    assert "convert the checkpoint itself" in refusal(path, tmp_path / "out", capsys), reason
