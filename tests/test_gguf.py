"""Opening GGUF files: those of the converter are served, all others refused in one line, none ends the process."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
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
from convert.gguf_file import GgufFile

FUZZ_SECONDS, FUZZ_TRIES = 15, 250  # of seed 1 at most, so that a faster machine meets none that was not tried before
PAIRS = ("What is the capital of France?", ["Paris is the capital of France.", "Two  spaces\tand a tab. ", "猫は長い"])

Values = dict[str, Any]


def rewrite(
    source: Path, target: Path, change: Values | None = None, drop: tuple[str, ...] = (),
    tensors: dict[str, np.ndarray[Any, Any] | None] | None = None, architecture: str | None = None,
    is_sealed: bool = False,
) -> Path:  # fmt: skip
    """A copy of a GGUF file with other metadata (drop: prefixes of keys) or tensors (None leaves one out).

    is_sealed: the digest of its header is right, as if the converter had verified it.
    """
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
    if is_sealed:
        GgufFile.open(target).seal()
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


CHAT = {"tokenizer.chat_template": "{{ messages }}"}


def test_a_file_of_another_converter_is_refused_with_the_reason(gguf_of: Gguf, tmp_path: Path) -> None:
    """Would break: a chat or an embedding model, or another tokenizer, gives floats that look like scores."""
    for name in ("xlmr", "gemma", "bi"):
        foreign = rewrite(gguf_of(name), tmp_path / "foreign.gguf", drop=("rerank.",))
        assert "not made by this project's converter" in refusal(foreign)


CHANGES: dict[str, tuple[str, Values, tuple[str, ...]]] = {
    "another kind": ("bi", {"rerank.kind": "cross-encoder"}, ()),
    "another word": ("gemma", {"rerank.yes_token_id": 9}, ()),
    "no prompt": ("qwen3", {}, ("rerank.tail",)),
    "another special token": ("xlmr", {"tokenizer.ggml.eos_token_id": 40}, ()),
    "another normalisation": ("xlmr", {"tokenizer.ggml.remove_extra_whitespaces": False}, ()),
    "no digest": ("bert", {}, ("rerank.header_sha256",)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_header_that_was_changed_since_it_was_verified_is_refused(change: str, gguf_of: Gguf, tmp_path: Path) -> None:
    name, values, drop = CHANGES[change]
    path = rewrite(gguf_of(name), tmp_path / "changed.gguf", values, drop)
    assert "not the one that the converter verified" in refusal(path)


def test_one_changed_bit_of_a_header_is_seen(gguf_of: Gguf, tmp_path: Path) -> None:
    """llama.cpp ends the process for some damaged headers, such as a vocabulary with a token twice."""
    assert server.GgufFile.open(gguf_of("xlmr")).header_is_intact()
    data = bytearray(gguf_of("xlmr").read_bytes())
    data[data.index(b"rerank.source") + 30] ^= 1
    (tmp_path / "changed.gguf").write_bytes(data)
    assert "not the one that the converter verified" in refusal(tmp_path / "changed.gguf")


def test_a_kind_from_a_newer_version_is_refused(gguf_of: Gguf, tmp_path: Path) -> None:
    path = rewrite(gguf_of("bi"), tmp_path / "new.gguf", {"rerank.kind": "late"}, is_sealed=True)
    assert "does not know" in refusal(path)


def test_a_build_whose_tokenizer_is_not_the_references_is_refused_and_freed(gguf_of: Gguf, tmp_path: Path) -> None:
    """gemma is loaded on demand: each request for a refused file would otherwise keep another copy of it."""
    change = {"rerank.check_ids": [0, 5, 2, 2, 6, 2]}
    path = rewrite(gguf_of("xlmr"), tmp_path / "ids.gguf", change, is_sealed=True)
    assert "other ids than the reference" in refusal(path)
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_the_digest_of_a_file_that_is_written_anew_can_be_made_right(gguf_of: Gguf, tmp_path: Path) -> None:
    """What the tests above change is what makes them refuse, not the copying."""
    assert score(rewrite(gguf_of("xlmr"), tmp_path / "same.gguf", is_sealed=True)) == score(gguf_of("xlmr"))



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
                assert math.isfinite(found.calibration_scale), (key, value)
    FUZZED[f"values of a header ({name})"].update({"tried": tried})


def test_a_folder_with_files_that_cannot_be_read_still_starts(gguf_of: Gguf, tmp_path: Path) -> None:
    rewrite(gguf_of("gemma"), tmp_path / "bad.gguf", {"rerank.max_tokens": "x"})
    (tmp_path / "pointer.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (tmp_path / "page.gguf").write_text("<!DOCTYPE html><html>not found</html>")
    shutil.copy(gguf_of("xlmr"), tmp_path / "good.gguf")
    assert server.find_roles(server.Settings(models=str(tmp_path)))[0].description.path.name == "good.gguf"
    assert "git lfs pull" in refusal(tmp_path / "pointer.gguf")
    assert "web page" in refusal(tmp_path / "page.gguf")


def test_what_llama_cpp_says_is_not_kept_without_end() -> None:
    said = server.NativeLog()
    for number in range(10_000):
        said.add(4, f"line {number}".encode(), None)
    assert said.reason("") == "line 9900"


def _cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "not a readable GGUF"),
    "text": (lambda data: b"# not a model\n" * 100, "not a readable GGUF"),
    "truncated tensors": (_cut, "llama.cpp cannot load it"),
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
