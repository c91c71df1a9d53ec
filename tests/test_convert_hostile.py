"""Broken and hostile input to python -m convert: one clear line, no traceback, nothing written, nothing executed."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_bert, make_bi, make_gemma, make_xlmr, write_json, write_tokenizer_json
from conftest import FUZZED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from convert.__main__ import Output
from convert.checkpoint import Checkpoint, read_header
from convert.errors import ConvertError
from convert.gguf_file import GgufFile
from convert.job import Job
from convert.quantize import find_quantization

ROOT = Path(__file__).resolve().parent.parent
FUZZ_EXAMPLES = 400  # inputs tried for each reader in one run; seconds, not minutes

Edit = Callable[[Path], None]


def run_convert(checkpoint: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "convert", str(checkpoint), "--quant", "Q8_0", "--out", str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("hostile") / "tiny")


@pytest.fixture
def checkpoint(bert: Path, tmp_path: Path) -> Path:
    """A good checkpoint of its own, for a test to break."""
    return Path(shutil.copytree(bert, tmp_path / "tiny"))


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def config(**changes: Any) -> Edit:
    return lambda directory: edit_json(directory / "config.json", **changes)


def edit_header(change: Callable[[dict[str, Any]], None]) -> Edit:
    """Rewrites the safetensors header, leaving the data as it is."""

    def edit(directory: Path) -> None:
        path = directory / "model.safetensors"
        raw = path.read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + length])
        change(header)
        new = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])

    return edit


def entry(**changes: Any) -> Edit:
    return edit_header(lambda header: header["classifier.bias"].update(changes))


def edit_tensors(change: Callable[[dict[str, Any]], Any]) -> Edit:
    def edit(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return edit


def edit_weights(change: Callable[[bytes], bytes]) -> Edit:
    def edit(directory: Path) -> None:
        path = directory / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return edit


def write(name: str, content: bytes) -> Edit:
    def edit(directory: Path) -> None:
        (directory / name).write_bytes(content)

    return edit


def edit_vocabulary(change: Callable[[list[str]], list[str]]) -> Edit:
    def edit(directory: Path) -> None:
        path = directory / "vocab.txt"
        path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")

    return edit


def overlap(header: dict[str, Any]) -> None:
    names = [name for name in header if name != "__metadata__"]
    norms = [name for name in names if header[name]["shape"] == [128]]
    header[norms[-1]]["data_offsets"] = header[norms[0]]["data_offsets"]


QUERY = "bert.encoder.layer.0.attention.self.query.weight"
DEEP = b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"

BROKEN: dict[str, tuple[Edit, str]] = {
    "truncated weights": (edit_weights(lambda raw: raw[:-1000]), "download it again"),
    "trailing bytes": (edit_weights(lambda raw: raw + b"x"), "download it again"),
    "an empty file": (edit_weights(lambda raw: b""), "truncated or no safetensors"),
    "a header cut off": (edit_weights(lambda raw: raw[:100]), "truncated or no safetensors"),
    "a header of 2 GB": (edit_weights(lambda raw: struct.pack("<Q", 2 << 30) + raw[8:]), "truncated or no safetensors"),
    "a header of 2^64-1": (edit_weights(lambda raw: b"\xff" * 8 + raw[8:]), "truncated or no safetensors"),
    "no JSON in the header": (edit_weights(lambda raw: raw[:8] + b"\xff" + raw[9:]), "not JSON"),
    "a Git LFS pointer": (edit_weights(lambda raw: b"version https://git-lfs.example/spec/v1\n"), "git lfs pull"),
    "a list as header": (edit_weights(lambda raw: struct.pack("<Q", 2) + b"[]"), "not a JSON object"),
    "a deep header": (edit_weights(lambda raw: struct.pack("<Q", len(DEEP)) + DEEP), "header"),
    "a negative offset": (entry(data_offsets=[-4, 0]), "classifier.bias"),
    "an offset beyond the file": (entry(data_offsets=[1 << 40, (1 << 40) + 4]), "classifier.bias"),
    "a huge offset": (entry(data_offsets=[10**300, 10**300 + 4]), "classifier.bias"),
    "an offset that is no integer": (entry(data_offsets=[0.0, 4.0]), "classifier.bias"),
    "offsets the wrong way round": (entry(data_offsets=[8, 4]), "classifier.bias"),
    "three offsets": (entry(data_offsets=[0, 4, 8]), "classifier.bias"),
    "no offsets": (edit_header(lambda header: header["classifier.bias"].pop("data_offsets")), "classifier.bias"),
    "overlapping tensors": (edit_header(overlap), "overlaps"),
    "a shape that lies": (entry(shape=[2]), "do not fit its bytes"),
    "a negative shape": (entry(shape=[-1, -1]), "classifier.bias"),
    "a shape of a million dimensions": (entry(shape=[1] * 1_000_000), "classifier.bias"),
    "an unknown dtype": (entry(dtype="F7"), "classifier.bias"),
    "a dtype that is a list": (entry(dtype=["F32"]), "classifier.bias"),
    "a dtype of integers": (entry(dtype="I32"), "classifier.bias is I32"),
    "a tensor that nothing maps": (edit_tensors(lambda t: t.update(extra=np.zeros(3, "f4"))), "extra is not part"),
    "a missing tensor": (edit_tensors(lambda t: t.pop(QUERY)), f"{QUERY} is missing"),
    "a wrong shape": (edit_tensors(lambda t: t.update({QUERY: np.zeros((128, 64), np.float32)})), "has shape"),
    "a NaN": (edit_tensors(lambda t: t[QUERY].__setitem__((0, 0), np.nan)), "holds NaN or infinity"),
    "a value beyond float16": (edit_tensors(lambda t: t[QUERY].__setitem__((0, 0), 1e6)), "float16 cannot"),
    "a larger vocabulary in config": (config(vocab_size=999_999), "has shape"),
    "fewer layers in config": (config(num_hidden_layers=1), "is not part of"),
    "more layers in config": (config(num_hidden_layers=9), "is missing"),
    "a billion layers": (config(num_hidden_layers=10**9), "num_hidden_layers"),
    "a size that is text": (config(hidden_size="128"), "hidden_size"),
    "a size that is true": (config(hidden_size=True), "hidden_size"),
    "no hidden size": (config(hidden_size=...), "hidden_size"),
    "heads that do not divide": (config(num_attention_heads=7), "num_attention_heads"),
    "another activation": (config(hidden_act="relu"), "hidden_act"),
    "relative positions": (config(position_embedding_type="relative_key"), "position_embedding_type"),
    "two labels": (config(id2label={"0": "no", "1": "yes"}), "2 labels"),
    "a NaN as epsilon": (config(layer_norm_eps=float("nan")), "layer_norm_eps"),
    "an unsupported architecture": (config(architectures=["LlamaForCausalLM"]), "LlamaForCausalLM is not supported"),
    "no architecture": (config(architectures=...), "architectures"),
    "an architecture that is a number": (config(architectures=[7]), "architectures"),
    "config.json that is no JSON": (write("config.json", b"{"), "config.json"),
    "config.json that is a list": (write("config.json", b"[]"), "expected a JSON object"),
    "config.json that is deep": (write("config.json", DEEP), "config.json"),
    "config.json in latin-1": (write("config.json", b'{"a": "\xe9"}'), "config.json"),
    "a duplicate piece": (edit_vocabulary(lambda pieces: [*pieces[:-1], pieces[-2]]), "the same token as"),
    "an empty piece": (edit_vocabulary(lambda pieces: [*pieces[:-1], ""]), "of its vocabulary is empty"),
    "a truncated vocabulary": (edit_vocabulary(lambda pieces: pieces[:300]), "config.json says"),
    "a vocabulary that is too long": (edit_vocabulary(lambda pieces: [*pieces, "one", "more"]), "config.json says"),
    "no special tokens": (edit_vocabulary(lambda pieces: [f"a{piece}" for piece in pieces]), "has no [CLS]"),
    "no vocabulary": (lambda directory: (directory / "vocab.txt").unlink(), "vocab.txt"),
    "no labels": (config(id2label=None), "id2label is None"),
    "labels that are a number": (config(id2label=7), "id2label is 7"),
    "two numbers of labels": (config(num_labels=2), "num_labels is 2, but id2label has one"),
    "keys of a wrapper": (
        edit_tensors(lambda tensors: tensors.update({f"module.{key}": tensors.pop(key) for key in list(tensors)})),
        "module.bert.embeddings.word_embeddings.weight is there",
    ),
    "no classification head": (
        edit_tensors(lambda tensors: [tensors.pop(f"classifier.{name}") for name in ("weight", "bias")]),
        "no classification head",
    ),
    "a vocabulary that is a pointer": (write("vocab.txt", LFS_POINTER), "git lfs pull"),
    "a vocabulary that is a page": (write("vocab.txt", b"\n<!DOCTYPE html><html>"), "an HTML page"),
    "a tokenizer that is a pointer": (write("tokenizer.json", LFS_POINTER), "git lfs pull"),
    "a configuration that is a page": (write("config.json", b"<html>"), "an HTML page"),
    "no config.json": (lambda directory: (directory / "config.json").unlink(), "config.json"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_line(name: str, checkpoint: Path, tmp_path: Path) -> None:
    """Anything else is a traceback that tells a user nothing, or a file with wrong scores."""
    edit, message = BROKEN[name]
    edit(checkpoint)
    done = run_convert(checkpoint, tmp_path / "out")
    assert done.returncode in (1, 2), done.stdout
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_a_pickle_is_never_opened(name: str, checkpoint: Path, tmp_path: Path) -> None:
    """Unpickling runs whatever its author wrote into it."""

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    (checkpoint / "model.safetensors").unlink()
    (checkpoint / name).write_bytes(pickle.dumps(Trap()))
    done = run_convert(checkpoint, tmp_path / "out")
    assert done.returncode == 2
    assert "save_pretrained" in done.stderr
    assert not (tmp_path / "executed").exists()


# -- sharded checkpoints ----------------------------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_gemma(tmp_path / "tiny", shards=3)


def shards_of(directory: Path) -> dict[str, str]:
    weight_map: dict[str, str] = json.loads((directory / INDEX).read_text())["weight_map"]
    return weight_map


@pytest.mark.parametrize("shard", ["../tiny/outside.safetensors", "/etc/passwd", "..", "", "a\0b", "sub/x.safetensors",
                                   "..\\x", "C:x"])  # fmt: skip
def test_a_shard_cannot_leave_the_directory(shard: str, sharded: Path) -> None:
    """A downloaded index must not choose which files of this machine are read."""
    weight_map = shards_of(sharded)
    edit_json(sharded / INDEX, weight_map=weight_map | {next(iter(weight_map)): shard})
    with pytest.raises(ConvertError, match="leaves the directory"):
        Checkpoint.open(sharded)


def test_a_missing_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    shard = sorted(set(shards_of(sharded).values()))[1]
    (sharded / shard).unlink()
    done = run_convert(sharded, tmp_path / "out")
    assert done.returncode == 1
    assert f"{shard!r} is missing" in done.stderr


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", {"a": 1}, {"a": None}])
def test_an_index_without_a_map_is_refused(weight_map: Any, sharded: Path) -> None:
    edit_json(sharded / INDEX, weight_map=weight_map)
    with pytest.raises(ConvertError, match=r"index\.json"):
        Checkpoint.open(sharded)


def test_an_index_that_contradicts_its_shards_is_refused(sharded: Path) -> None:
    """The index and the shards name tensors twice; when they differ, nobody knows which tensor is meant."""
    weight_map = shards_of(sharded)
    names = list(weight_map)
    other = next(shard for shard in weight_map.values() if shard != weight_map[names[0]])
    edit_json(sharded / INDEX, weight_map=weight_map | {names[0]: other})
    with pytest.raises(ConvertError, match=names[0]):
        Checkpoint.open(sharded)
    edit_json(sharded / INDEX, weight_map={name: weight_map[name] for name in names[1:]})
    with pytest.raises(ConvertError, match="not listed"):
        Checkpoint.open(sharded)


# -- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"not a protobuf", b"\x0a\xff\xff\xff\xff\x0f"])
@pytest.mark.parametrize(("make", "name"), [(make_xlmr, "sentencepiece.bpe.model"), (make_gemma, "tokenizer.model")])
def test_a_damaged_sentencepiece_model_is_refused(
    make: Callable[[Path], Path], name: str, content: bytes, tmp_path: Path
) -> None:
    checkpoint = make(tmp_path / "tiny")
    (checkpoint / name).write_bytes(content)
    with pytest.raises(ConvertError, match=name):
        Job.open(checkpoint)


def test_another_models_vocabulary_is_refused(tmp_path: Path) -> None:
    """A unigram model in place of Gemma's BPE would tokenise, and every id would be another word's."""
    xlmr, gemma = make_xlmr(tmp_path / "xlmr"), make_gemma(tmp_path / "gemma")
    shutil.copy(xlmr / "sentencepiece.bpe.model", gemma / "tokenizer.model")
    with pytest.raises(ConvertError, match="not a SentencePiece BPE model"):
        Job.open(gemma)


@pytest.mark.parametrize("content", [{}, {"model": None}, {"model": {"type": "BPE"}},
                                     {"model": {"type": "Unigram", "vocab": [["a"]]}, "normalizer": {}}])  # fmt: skip
def test_an_unusable_tokenizer_json_is_refused(content: dict[str, Any], tmp_path: Path) -> None:
    for make in (make_xlmr, make_bert):
        checkpoint = make(tmp_path / make.__name__)
        (checkpoint / "sentencepiece.bpe.model").unlink(missing_ok=True)
        (checkpoint / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(ConvertError):
            Job.open(checkpoint)


def test_a_bi_encoder_that_does_not_pool_by_the_mean_is_refused(tmp_path: Path) -> None:
    """The server pools by the mean; a CLS-pooling model would get plausible, wrong cosines."""
    checkpoint = make_bi(tmp_path / "tiny")
    edit_json(checkpoint / "1_Pooling" / "config.json", pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    with pytest.raises(ConvertError, match="mean pooling"):
        Job.open(checkpoint)


# -- fuzzing: whatever the bytes, a reader answers or raises ConvertError ---------------------------------------------


def flip(raw: bytes, changes: list[tuple[int, int]], cut: int) -> bytes:
    """raw with some bytes replaced and the end cut off."""
    damaged = bytearray(raw)
    for position, value in changes:
        damaged[position % len(damaged)] = value
    return bytes(damaged[: len(damaged) - cut % len(damaged)])


CHANGES = st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 255)), max_size=8)
CUTS = st.one_of(st.just(0), st.integers(0, 1 << 30))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "X"]) | JSON,
        "shape": st.lists(st.integers(-2, 8) | JSON, max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-8, 64) | JSON, min_size=2, max_size=2) | JSON,
    },
)
# The same examples each time: a run that meets new ones fails by chance, and for another's change.
FUZZ = settings(max_examples=FUZZ_EXAMPLES, deadline=None, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck))  # fmt: skip


@FUZZ
@given(header=st.dictionaries(st.text(max_size=8), ENTRIES | JSON, max_size=4) | JSON, n_bytes=st.integers(0, 64))
def test_any_safetensors_header_is_read_or_refused(
    header: Any, n_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = json.dumps(header).encode()
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(n_bytes))
    FUZZED["safetensors headers"]["tried"] += 1
    try:
        tensors = read_header(path)
    except ConvertError:
        FUZZED["safetensors headers"]["refused"] += 1
        return
    for info in tensors.values():  # what is accepted lies inside the file
        assert 8 + len(raw) <= info.start
        assert info.start + info.n_bytes <= path.stat().st_size


@FUZZ
@given(changes=CHANGES, cut=CUTS)
def test_any_damaged_checkpoint_is_read_or_refused(
    changes: list[tuple[int, int]], cut: int, bert: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Bytes of the header of a real checkpoint are damaged; opening it must answer or raise ConvertError."""
    raw = (bert / "model.safetensors").read_bytes()
    length = 8 + struct.unpack("<Q", raw[:8])[0]
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(flip(raw[:length], changes, cut) + raw[length:])
    FUZZED["damaged checkpoints"]["tried"] += 1
    with contextlib.suppress(ConvertError):
        read_header(path)
        FUZZED["damaged checkpoints"]["still readable"] += 1


@pytest.fixture(scope="session")
def gguf_bytes(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    Job.open(bert).write(path, half=True)
    return path.read_bytes()


@FUZZ
@given(changes=CHANGES, cut=CUTS)
def test_any_damaged_gguf_is_read_or_refused(
    changes: list[tuple[int, int]], cut: int, gguf_bytes: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """convert.verify opens files from anywhere."""
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    header = gguf_bytes[:4096]  # counts, keys and types are there; most of the rest is vocabulary and weights
    path.write_bytes(flip(header, changes, cut) + (b"" if cut else gguf_bytes[4096:]))
    FUZZED["the converter's GGUF reader"]["tried"] += 1
    with contextlib.suppress(ConvertError):
        GgufFile.open(path)
        FUZZED["the converter's GGUF reader"]["still readable"] += 1


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGML" + bytes(100), b"GGUF" + struct.pack("<IQQ", 9, 0, 0),
                                     b"GGUF" + struct.pack("<IQQ", 3, 1 << 63, 1 << 63)])  # fmt: skip
def test_verify_refuses_what_is_no_gguf(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    command = [sys.executable, "-m", "convert.verify", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "not a readable GGUF" in done.stderr
    assert done.stderr.count("\n") == 1


# -- what a user points at --------------------------------------------------------------------------------------------

FUZZ_SECONDS, FUZZ_TRIES = 8, 300


@pytest.mark.parametrize("make", [make_xlmr, make_bert, make_gemma])
def test_changed_json_files_never_end_in_a_traceback(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """config.json, tokenizer.json and tokenizer_config.json come from anywhere, and from many versions."""
    checkpoint = make(tmp_path / "tiny")
    write_tokenizer_json(checkpoint)
    for model in checkpoint.glob("*.model"):
        model.unlink()  # so that tokenizer.json is what is read
    command = [sys.executable, str(ROOT / "tests" / "fuzz_convert.py"), str(checkpoint), str(FUZZ_SECONDS),
               str(FUZZ_TRIES), "1"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=FUZZ_SECONDS + 60)
    assert done.returncode == 0, f"{(checkpoint / 'damage.txt').read_text()}\n{done.stderr[-3000:]}"
    counts = json.loads(done.stdout)
    FUZZED[f"the converter's JSON files ({make.__name__[5:]})"].update(counts)
    assert counts["tried"] >= 20
    assert counts["refused"] > 0
    assert "refused in several lines" not in counts


@pytest.mark.parametrize("normalizer", [None, {"type": "Sequence", "normalizers": ["x"]}, {"type": "NFKC"}])
def test_a_tokenizer_without_its_normalisation_table_says_what_to_copy(normalizer: Any, tmp_path: Path) -> None:
    checkpoint = make_xlmr(tmp_path / "tiny")
    write_tokenizer_json(checkpoint)
    (checkpoint / "sentencepiece.bpe.model").unlink()
    edit_json(checkpoint / "tokenizer.json", normalizer=normalizer)
    with pytest.raises(ConvertError, match=r"transformers 5 .*copy sentencepiece\.bpe\.model"):
        Job.open(checkpoint)


def in_one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode in (1, 2), done.stdout
    assert done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr


def test_a_name_that_is_not_utf_8_is_refused(bert: Path, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    shutil.copytree(bert, odd)
    in_one_line(run_convert(odd, tmp_path / "out"), "not a name in UTF-8", "caf")
    in_one_line(run_convert(bert, odd / "out"), "not a name in UTF-8", "caf")


def test_the_output_folder_of_a_lora_names_the_base_model(tmp_path: Path) -> None:
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": "BAAI/bge-reranker-v2-gemma"})
    in_one_line(run_convert(tmp_path, tmp_path / "out"), "LoRA", "'BAAI/bge-reranker-v2-gemma'", "merged_model/")
    (tmp_path / "merged_model").mkdir()
    in_one_line(run_convert(tmp_path, tmp_path / "out"), f"convert {tmp_path / 'merged_model'}")


def test_a_source_that_is_no_checkpoint_says_what_it_is(bert: Path, tmp_path: Path) -> None:
    """models/typo is not looked for on the Hub, where the answer would be a network error."""
    in_one_line(run_convert(Path("models/typo"), tmp_path / "out"), "models/typo: no such directory")
    in_one_line(run_convert(Path("models/x.gguf"), tmp_path / "out"), "models/x.gguf: no such file")
    in_one_line(run_convert(bert / "config.json", tmp_path / "out"), "name the checkpoint's directory")


def test_verify_says_that_a_gguf_is_a_pointer_or_a_page(tmp_path: Path) -> None:
    for content, reason in ((LFS_POINTER, "git lfs pull"), (b"<!DOCTYPE html>", "HTML page")):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(ConvertError, match=reason):
            GgufFile.open(tmp_path / "x.gguf")


def test_a_folder_of_the_hubs_cache_gives_the_models_name(bert: Path, tmp_path: Path) -> None:
    sha = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--owner--some-reranker" / "snapshots" / sha
    shutil.copytree(bert, snapshot)
    done = run_convert(snapshot, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    metadata = GgufFile.open(tmp_path / "out" / "some-reranker-Q8_0.gguf").metadata
    assert (metadata["rerank.source"], metadata["rerank.revision"]) == ("owner/some-reranker", sha)


def test_two_fine_tunes_in_folders_of_one_name_can_both_be_kept(bert: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "convert", str(bert), "--quant", "Q8_0", "--out", str(tmp_path / "out"), "--name"]
    for name in ("first", "second"):
        done = subprocess.run([*command, name], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["first-Q8_0.gguf", "second-Q8_0.gguf"]
    in_one_line(subprocess.run([*command, "../x"], cwd=ROOT, capture_output=True, text=True, timeout=120), "--name")


def test_two_conversions_into_one_folder_do_not_take_each_others_files(bert: Path, tmp_path: Path) -> None:
    first, second = Output(tmp_path, "tiny"), Output(tmp_path, "tiny")
    q8 = find_quantization("Q8_0")
    with first.opened():
        first.part(q8).write_bytes(b"first")
        with second.opened():
            second.part(q8).write_bytes(b"second")
            assert first.part(q8).read_bytes() == b"first"
        assert first.part(q8).read_bytes() == b"first"
        first.finish(q8)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-Q8_0.gguf"]


def test_verify_works_where_the_file_lies_in_a_read_only_folder(bert: Path, tmp_path: Path) -> None:
    """The README's container mounts models/ read-only. (A folder of /proc is one for every user.)"""
    assert run_convert(bert, tmp_path).returncode == 0
    with (tmp_path / "tiny-Q8_0.gguf").open("rb") as file:
        path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        command = [sys.executable, "-m", "convert.verify", path, "--against", str(bert)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "made from the checkpoint" in done.stdout
