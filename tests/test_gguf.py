"""Opening GGUF files: right ones from anywhere are served, wrong ones refused in one line, none ends the process."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import FUZZED, ROOT, Gguf

import rerank_server as server
from bench import checkpoints as bench_checkpoints

FUZZ_SECONDS, FUZZ_TRIES = 15, 250  # of seed 1 at most, so that a faster machine meets none that was not tried before
PAIRS = ("What is the capital of France?", ["Paris is the capital of France.", "Two  spaces\tand a tab. ", "猫は長い"])

Values = dict[str, Any]


def rewrite(
    source: Path, target: Path, change: Values | None = None, drop: tuple[str, ...] = (),
    tensors: dict[str, np.ndarray[Any, Any] | None] | None = None, architecture: str | None = None,
) -> Path:  # fmt: skip
    """A copy of a GGUF file with other metadata (drop: prefixes of keys) or tensors (None leaves one out)."""
    reader = gguf.GGUFReader(source)
    architecture = architecture or str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(target, architecture)
    for key, field in reader.fields.items():
        if key.startswith(("GGUF.", "general.architecture", *drop)) or key in (change or {}):
            continue
        kind, inner = field.types[0], field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub_type=inner)
    for key, value in (change or {}).items():
        kinds: dict[type, gguf.GGUFValueType] = {
            bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, str: gguf.GGUFValueType.STRING,
            float: gguf.GGUFValueType.FLOAT32,
        }  # fmt: skip
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, kinds[type(value)])
    for tensor in reader.tensors:
        replaced = (tensors or {}).get(tensor.name, tensor.data)
        if replaced is not None:
            writer.add_tensor(tensor.name, np.ascontiguousarray(replaced))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def tensor_of(path: Path, name: str) -> np.ndarray[Any, Any]:
    return next(np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)


def score(path: Path) -> list[float]:
    engine = server.load_engine(path, server.Settings())
    try:
        return server.score_all(engine, engine.pairs.make(*PAIRS))
    finally:
        engine.close()


def refusal(path: Path) -> str:
    with pytest.raises(server.ModelError) as caught:
        server.load_engine(path, server.Settings())
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


@pytest.mark.parametrize("name", ["xlmr", "gemma"])
def test_a_file_without_our_metadata_scores_the_same(name: str, gguf_of: Gguf, tmp_path: Path) -> None:
    """Files made with llama.cpp's own converter are right when they are right."""
    foreign = rewrite(gguf_of(name), tmp_path / "foreign.gguf", drop=("rerank.",))
    assert score(foreign) == score(gguf_of(name))


def test_wrong_white_space_handling_is_set_right(gguf_of: Gguf, tmp_path: Path) -> None:
    """What the vendored converter writes when it only finds tokenizer.json: other ids for runs of spaces."""
    key = "tokenizer.ggml.remove_extra_whitespaces"
    foreign = rewrite(gguf_of("xlmr"), tmp_path / "spaces.gguf", {key: False}, drop=("rerank.",))
    assert server.describe(server.GgufFile.open(foreign)).fixes == (key,)
    assert score(foreign) == score(gguf_of("xlmr"))


def test_a_missing_space_prefix_setting_is_set_right(gguf_of: Gguf, tmp_path: Path) -> None:
    key = "tokenizer.ggml.add_space_prefix"
    foreign = rewrite(gguf_of("gemma"), tmp_path / "prefix.gguf", drop=("rerank.", key))
    assert server.describe(server.GgufFile.open(foreign)).fixes == (key,)
    assert score(foreign) == score(gguf_of("gemma"))


def test_a_position_table_that_was_not_cut_is_refused(gguf_of: Gguf, tmp_path: Path) -> None:
    table = tensor_of(gguf_of("xlmr"), "position_embd.weight")
    uncut = np.concatenate([np.zeros_like(table[:2]), table])
    change = {"bert.context_length": len(uncut)}
    path = rewrite(gguf_of("xlmr"), tmp_path / "uncut.gguf", change, tensors={"position_embd.weight": uncut})
    assert "two unused rows" in refusal(path)


@pytest.mark.parametrize("tensor", ["cls.weight", "cls.output.weight"])
def test_a_cross_encoder_without_its_whole_head_is_refused(tensor: str, gguf_of: Gguf, tmp_path: Path) -> None:
    """The vendored converter drops the pooler of MiniLM rerankers: wrong scores without a word."""
    path = rewrite(gguf_of("bert"), tmp_path / "headless.gguf", tensors={tensor: None})
    assert tensor in refusal(path)


def test_an_embedding_model_from_elsewhere_is_refused(gguf_of: Gguf, tmp_path: Path) -> None:
    assert "not a reranker" in refusal(rewrite(gguf_of("bi"), tmp_path / "embedding.gguf", drop=("rerank.",)))


def test_a_chat_model_is_refused(gguf_of: Gguf, tmp_path: Path) -> None:
    path = rewrite(gguf_of("gemma"), tmp_path / "chat.gguf", drop=("rerank.", "gemma."), architecture="llama")
    assert "'llama' is not a reranker" in refusal(path)


CHAT = {"tokenizer.chat_template": "{{ messages }}"}


def test_a_gemma_chat_model_is_refused_even_when_a_flag_names_it(gguf_of: Gguf, tmp_path: Path) -> None:
    """Would break: scores between 0 and 1 that mean nothing."""
    path = rewrite(gguf_of("gemma"), tmp_path / "gemma-2b-it.gguf", CHAT, drop=("rerank.",))
    assert "chat model" in refusal(path)
    known = rewrite(gguf_of("gemma"), tmp_path / "known.gguf", CHAT)
    assert server.describe(server.GgufFile.open(known)).doubt == "", "a reranker may keep its template"


@pytest.mark.parametrize("name", ["xlmr", "bert", "gemma"])
def test_a_file_takes_a_role_by_itself_only_when_it_says_that_it_is_a_reranker(
    name: str, gguf_of: Gguf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Would break: a newer file of something else in the folder answers in the reranker's place."""
    role = "gemma" if name == "gemma" else "m3"
    own = [gguf_of("gemma"), gguf_of("bi")] if name == "gemma" else [gguf_of(name)]
    for file in own:
        os.utime(shutil.copy(file, tmp_path / file.name), (1, 1))
    drop = ("rerank.", "general.name")
    other = rewrite(gguf_of(name), tmp_path / "other.gguf", {"general.name": "Some Model"}, drop=drop)
    served = {one.name: one for one in server.find_roles(server.Settings(models=str(tmp_path)))}[role]
    assert served.description.path.name == own[0].name
    assert "other.gguf" in caplog.text
    flag: Values = {role: other}
    named_by_flag = server.Settings(models=str(tmp_path), **flag)
    named = {one.name: one for one in server.find_roles(named_by_flag)}[role]
    assert named.description.path == other, "a flag names it"
    assert named.description.doubt
    if name != "gemma":
        says = rewrite(gguf_of(name), tmp_path / "says.gguf", {"general.name": "Bge Reranker"}, drop=drop)
        assert server.describe(server.GgufFile.open(says)).doubt == ""


WRONG_VALUES: tuple[Any, ...] = ("x", -5, 0, 2**31, True, 1.5, float("nan"), float("inf"), ["a"], [1, 2], None)


@pytest.mark.parametrize("name", ["xlmr", "bert", "bi", "gemma", "qwen3", "modernbert"])
def test_no_value_of_a_header_ends_a_description_in_anything_but_one_line(name: str, gguf_of: Gguf) -> None:
    """Would break: one file in the folder stops the start, or a wrong number is scored with."""
    good, tried = server.GgufFile.open(gguf_of(name)), 0
    for key in good.metadata:
        for value in WRONG_VALUES:
            metadata = {**good.metadata, key: value} if value is not None else dict(good.metadata)
            if value is None:
                del metadata[key]
            tried += 1
            with contextlib.suppress(server.ModelError):
                found = server.describe(dataclasses.replace(good, metadata=metadata))
                assert 32 <= found.max_tokens <= 131072, (key, value)
                assert math.isfinite(found.cosine_scale), (key, value)
    FUZZED[f"values of a header ({name})"].update({"tried": tried})


def test_a_folder_with_files_that_cannot_be_read_still_starts(gguf_of: Gguf, tmp_path: Path) -> None:
    rewrite(gguf_of("gemma"), tmp_path / "bad.gguf", {"rerank.max_tokens": "x"})
    (tmp_path / "pointer.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (tmp_path / "page.gguf").write_text("<!DOCTYPE html><html>not found</html>")
    shutil.copy(gguf_of("xlmr"), tmp_path / "good.gguf")
    assert server.find_roles(server.Settings(models=str(tmp_path)))[0].description.path.name == "good.gguf"
    assert "git lfs pull" in refusal(tmp_path / "pointer.gguf")
    assert "web page" in refusal(tmp_path / "page.gguf")


def test_the_sizes_of_ggmls_types_are_those_of_the_gguf_package() -> None:
    assert {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()} == server._BLOCKS


def test_a_file_is_tried_in_a_child_with_the_servers_own_settings(gguf_of: Gguf, tmp_path: Path) -> None:
    """Would break: a file that only fails with these settings passes the trial and ends the server."""
    foreign = rewrite(gguf_of("xlmr"), tmp_path / "foreign.gguf", drop=("rerank.",))
    settings = server.Settings(max_length=64, ubatch=64, threads=1)
    environment = server._environment_of(settings)
    assert (environment["RERANK_MAX_LENGTH"], environment["RERANK_UBATCH"]) == ("64", "64")
    server.load_engine(foreign, settings).close()


def test_a_trial_that_does_not_end_is_given_up(
    gguf_of: Gguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CHILD_TIMEOUT_S", 0.01)
    assert "took more than" in refusal(rewrite(gguf_of("xlmr"), tmp_path / "foreign.gguf", drop=("rerank.",)))


def test_what_llama_cpp_says_is_not_kept_without_end() -> None:
    said = server.NativeLog()
    for number in range(10_000):
        said.add(4, f"line {number}".encode(), None)
    assert said.reason("") == "line 9900"


def test_a_kind_from_a_newer_version_is_refused(gguf_of: Gguf, tmp_path: Path) -> None:
    assert "does not know" in refusal(rewrite(gguf_of("bi"), tmp_path / "new.gguf", {"rerank.kind": "late"}))


def test_another_tokenizer_than_the_recorded_one_is_refused(gguf_of: Gguf, tmp_path: Path) -> None:
    path = rewrite(gguf_of("xlmr"), tmp_path / "ids.gguf", {"rerank.check_ids": [0, 5, 2, 2, 6, 2]})
    assert "other ids than the reference" in refusal(path)


@pytest.mark.parametrize(
    ("name", "key", "words"),
    [("xlmr", "eos", "'</s>' belongs"), ("bert", "seperator", "'[SEP]' belongs"), ("gemma", "bos", "'<bos>' belongs")],
)
def test_a_wrong_special_token_is_refused(name: str, key: str, words: str, gguf_of: Gguf, tmp_path: Path) -> None:
    """For example an XLM-R file without the key: llama.cpp then takes T5's </s>, which is XLM-R's <pad>."""
    path = rewrite(gguf_of(name), tmp_path / "special.gguf", {f"tokenizer.ggml.{key}_token_id": 40})
    assert words in refusal(path)


def test_a_yes_token_that_is_not_the_tokenizers_is_refused(gguf_of: Gguf, tmp_path: Path) -> None:
    assert "'Yes'" in refusal(rewrite(gguf_of("gemma"), tmp_path / "yes.gguf", {"rerank.yes_token_id": 9}))


def test_a_refused_file_is_freed(gguf_of: Gguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gemma is loaded on demand: each request for a refused file would otherwise keep another copy of it."""
    path = rewrite(gguf_of("gemma"), tmp_path / "yes.gguf", {"rerank.yes_token_id": 9})
    monkeypatch.setenv(server.IN_CHILD, "1")  # so that it is loaded in this process
    refusal(path)
    assert str(path) not in Path("/proc/self/maps").read_text()


def _cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "not a readable GGUF"),
    "text": (lambda data: b"# not a model\n" * 100, "not a readable GGUF"),
    "truncated tensors": (_cut, "truncated"),
    "truncated header": (lambda data: data[:3000], "not a readable GGUF"),
    "wrong version": (lambda data: data[:4] + struct.pack("<I", 99) + data[8:], "not a readable GGUF"),
    "huge tensor count": (lambda data: data[:8] + struct.pack("<Q", 1 << 60) + data[16:], "not a readable GGUF"),
    "huge metadata count": (lambda data: data[:16] + struct.pack("<Q", 1 << 60) + data[24:], "not a readable GGUF"),
    "huge string": (lambda data: data[:24] + struct.pack("<Q", 1 << 62) + data[32:], "not a readable GGUF"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_refused_in_one_line(name: str, gguf_of: Gguf, tmp_path: Path) -> None:
    change, words = DAMAGES[name]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(change(gguf_of("bi").read_bytes()))
    assert words in refusal(path)


def test_a_file_that_aborts_llama_cpp_does_not_take_the_server_down(gguf_of: Gguf, tmp_path: Path) -> None:
    """A vocabulary with a token twice: llama.cpp ends the process (GGML_ASSERT), a child's and not ours."""
    data = gguf_of("bi").read_bytes()
    first = data.index("▁and".encode())
    path = tmp_path / "twice.gguf"
    path.write_bytes(data[:first] + "▁the".encode() + data[first + len("▁and".encode()) :])
    assert "llama.cpp ends the process" in refusal(path)


def test_a_header_that_the_converter_wrote_is_known_to_be_intact(gguf_of: Gguf, tmp_path: Path) -> None:
    """Such a file is opened without trying it in a child process first."""
    assert server.GgufFile.open(gguf_of("xlmr")).header_is_intact()
    data = bytearray(gguf_of("xlmr").read_bytes())
    place = data.index(b"rerank.source") + 30
    data[place] ^= 1
    (tmp_path / "changed.gguf").write_bytes(data)
    assert not server.GgufFile.open(tmp_path / "changed.gguf").header_is_intact()


@pytest.mark.parametrize("name", ["bi", "gemma"])
def test_damaged_files_never_crash_the_reader(name: str, gguf_of: Gguf, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "fuzz_gguf.py"), str(gguf_of(name)), str(tmp_path / "damaged.gguf")]
    command += [str(FUZZ_SECONDS), str(FUZZ_TRIES), "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=FUZZ_SECONDS + 60)
    damage = tmp_path / "damaged.txt"
    assert done.returncode == 0, f"{damage.read_text()}\n{done.stderr[-2000:]}"
    counts = json.loads(done.stdout)
    FUZZED[f"the server's GGUF reader ({name})"].update(counts)
    assert counts["tried"] >= 20
    assert counts["refused"] > 0
    assert "refused in several lines" not in counts


def test_loading_a_model_leaves_the_memory_of_others_alone(tmp_path: Path) -> None:
    """Would break: a request's body, a KV cache or weights become zeroes while a model loads."""
    checkpoint = bench_checkpoints.make_checkpoint("m3", tmp_path / "wide", hidden=256, layers=1, vocabulary=250_002)
    command = [sys.executable, "-m", "convert", str(checkpoint), "--quant", "Q8_0", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    settings = server.Settings(max_length=64, ubatch=64, threads=1)
    n_bytes = 64 * 250_002 * 4 + (1 << 16)  # what llama.cpp allocates for the logits, and what malloc adds
    done, damaged = threading.Event(), 0

    def others() -> None:
        nonlocal damaged
        while not done.is_set():
            block = np.ones(n_bytes, dtype=np.uint8)
            time.sleep(0.01)
            damaged += int(n_bytes - np.count_nonzero(block))

    thread = threading.Thread(target=others)
    thread.start()
    for _ in range(5):
        server.load_engine(tmp_path / "wide-Q8_0.gguf", settings).close()
    done.set()
    thread.join()
    assert damaged == 0
