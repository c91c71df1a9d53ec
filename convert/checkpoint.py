"""Reads a checkpoint directory: config.json, and safetensors in row blocks.

The reader is our own, not the safetensors package's: bfloat16 without torch, plain reads instead of a memory map (so
that resident memory does not follow the file's size), and every number of the header checked before it is used.
Format: https://github.com/huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import CannotStartError, ConvertError

FloatArray = npt.NDArray[np.float32]

MAX_HEADER_BYTES = 100_000_000  # the safetensors package's own limit
MAX_DIMENSIONS = 8
MAX_NUMBER = 1e30  # a file holds float32
MAX_JSON_BYTES = 100_000_000
BLOCK_BYTES = 16 << 20  # float32 bytes of one row block
_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
READABLE = ("F32", "F16", "BF16")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.ckpt")


def refuse_stub(path: Path, start: bytes) -> None:
    """Raises ConvertError for what a clone without git-lfs or a download behind a login leaves in a file's place."""
    if start.startswith(b"version https://git-lfs"):
        raise ConvertError(f"{path}: a Git LFS pointer, not the file: run `git lfs pull` in that directory")
    if start.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        raise ConvertError(f"{path}: an HTML page, not the file: download it again (is a login needed?)")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint. Raises ConvertError naming the file; a key given twice is refused."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ConvertError(f"{path}: {path.stat().st_size:,} bytes are no plausible JSON file")
        raw = path.read_bytes()
        refuse_stub(path, raw)
        value = _parse_json(raw)
    except (OSError, ValueError, RecursionError) as exc:
        raise ConvertError(f"{path}: cannot be read as JSON ({type(exc).__name__}: {str(exc)[:120]})") from exc
    if not isinstance(value, dict):
        raise ConvertError(f"{path}: expected a JSON object")
    return value


def _parse_json(raw: bytes) -> Any:
    return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is given twice")
    return result


@dataclass(frozen=True)
class Config:
    """config.json, read field by field; each error names the file and the field."""

    path: Path
    values: dict[str, Any]

    def integer(self, name: str, default: int | None = None, low: int = 1, high: int = 1 << 24) -> int:
        value = self.values.get(name, default)
        if type(value) is not int or not low <= value <= high:
            raise ConvertError(f"{self.path}: {name} is {value!r:.60}, expected an integer from {low} to {high}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MAX_NUMBER:
            raise ConvertError(f"{self.path}: {name} is {value!r:.60}, expected a positive number")
        return float(value)

    def expect(self, name: str, *allowed: Any) -> None:
        """A field may only have a value that llama.cpp computes the same way; the first allowed one is the default."""
        value = self.values.get(name, allowed[0])
        if value not in allowed:
            raise ConvertError(f"{self.path}: {name} is {value!r:.60}, but only {allowed[0]!r} can be converted")

    @property
    def architecture(self) -> str:
        names = self.values.get("architectures")
        if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
            raise CannotStartError(f"{self.path}: architectures is {names!r:.60}, expected a list of one name")
        return names[0]


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: shape rows first; start, n_bytes: bytes of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    n_bytes: int


@dataclass
class Checkpoint:
    """A checkpoint directory. Tensors are read block by block; nothing of them is kept."""

    directory: Path
    config: Config
    tensors: dict[str, TensorInfo]
    _files: dict[Path, Any] = field(default_factory=dict)

    @staticmethod
    def open(directory: Path) -> Checkpoint:
        """Reads and checks config.json and every safetensors header. Raises ConvertError naming the file."""
        path = directory / "config.json"
        _refuse_adapter(directory)
        if not path.is_file():
            raise CannotStartError(f"{directory}: no config.json there, so it is no checkpoint directory")
        config = Config(path, read_json(path))
        return Checkpoint(directory, config, _read_index(directory))

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file beside config.json; {} when it is not there."""
        path = self.directory / name
        return read_json(path) if path.is_file() else {}

    @cached_property
    def n_parameters(self) -> int:
        return sum(math.prod(info.shape) for info in self.tensors.values())

    def rows(self, name: str, first: int, last: int) -> FloatArray:
        """Rows [first, last) as float32, shape (last - first, *shape[1:]). Raises ConvertError."""
        info = self.tensors[name]
        if info.dtype not in READABLE:
            raise ConvertError(f"{info.file}: tensor {name} is {info.dtype}, expected one of {', '.join(READABLE)}")
        row_items = math.prod(info.shape[1:])
        row_bytes = row_items * _ITEM_BYTES[info.dtype]
        file = self._files.setdefault(info.file, None) or self._open(info.file)
        file.seek(info.start + first * row_bytes)
        raw = file.read((last - first) * row_bytes)
        if len(raw) != (last - first) * row_bytes:
            raise ConvertError(f"{info.file}: truncated while tensor {name} was read")
        return _to_float32(raw, info.dtype).reshape((last - first, *info.shape[1:]))

    def blocks(self, name: str, first_row: int = 0) -> Iterator[FloatArray]:
        """The tensor's rows from first_row on, in blocks of at most BLOCK_BYTES of float32 (at least one row)."""
        shape = self.tensors[name].shape
        step = max(1, BLOCK_BYTES // (4 * max(1, math.prod(shape[1:]))))
        for first in range(first_row, shape[0], step):
            yield self.rows(name, first, min(first + step, shape[0]))

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _open(self, path: Path) -> Any:
        self._files[path] = path.open("rb")
        return self._files[path]


def _to_float32(raw: bytes, dtype: str) -> FloatArray:
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, "<f4" if dtype == "F32" else "<f2").astype(np.float32)


def _read_index(directory: Path) -> dict[str, TensorInfo]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        raise _no_weights(directory)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConvertError(f"{index}: no weight_map in it")
    shards = {name: _shard_path(index, name) for name in weight_map.values() if isinstance(name, str)}
    headers = {name: read_header(path) for name, path in sorted(shards.items())}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or name not in headers[shard]:
            raise ConvertError(f"{index}: tensor {name} is not in {shard!r}, where the index says that it is")
    tensors: dict[str, TensorInfo] = {}
    for shard, header in headers.items():
        for name, info in header.items():
            if weight_map.get(name) != shard:
                raise ConvertError(f"{info.file}: tensor {name} is not listed for this shard in {index.name}")
            tensors[name] = info
    return tensors


def _refuse_adapter(directory: Path) -> None:
    """A LoRA's output folder holds differences from a base model, not a model."""
    path = directory / "adapter_config.json"
    if not path.is_file() or (directory / "model.safetensors").is_file() or any(directory.glob("model-*.safetensors")):
        return
    base, merged = read_json(path).get("base_model_name_or_path"), directory / "merged_model"
    remedy = f"convert {merged}" if merged.is_dir() else (
        "merge the two (FlagEmbedding: --save_merged_lora_model True; peft: merge_and_unload, then save_pretrained) "
        "and convert the merged_model/ that this makes"
    )
    raise CannotStartError(f"{directory}: a LoRA adapter of {base!r:.100}, not a whole model: {remedy}")


def _no_weights(directory: Path) -> ConvertError:
    pickle = next((name for name in PICKLES if (directory / name).exists()), None)
    if pickle:
        return CannotStartError(
            f"{directory / pickle}: a pickle can run any code when it is opened, so it never is. Get the model as "
            "safetensors: another revision of it (--revision), the Hub's safetensors/convert Space, or "
            "transformers' save_pretrained"
        )
    return CannotStartError(f"{directory}: no model.safetensors and no model.safetensors.index.json there")


def _shard_path(index: Path, name: str) -> Path:
    """A shard is a plain file name beside the index. (A link is followed: the Hub's cache is made of links.)"""
    if not name or name in (".", "..") or any(character in name for character in '/\\:\0'):
        raise ConvertError(f"{index}: shard {name!r} leaves the directory: expected a plain file name")
    path = index.parent / name
    if not path.is_file():
        raise ConvertError(f"{index}: shard {name!r} is missing: download it again")
    return path


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file. Raises ConvertError for whatever in the header is not as the format says:
    a size that lies, a dtype or shape that does not fit its bytes, offsets that are negative, overlap, leave a hole or
    leave the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        refuse_stub(path, file.read(64))
        file.seek(0)
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise ConvertError(f"{path}: truncated or no safetensors file (header of {length:,} bytes in {size:,})")
        raw = file.read(length)
    try:
        header = _parse_json(raw)
    except (ValueError, RecursionError) as exc:
        raise ConvertError(f"{path}: its header is not JSON ({type(exc).__name__}: {str(exc)[:100]})") from exc
    if not isinstance(header, dict):
        raise ConvertError(f"{path}: its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _tensor_info(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_layout(path, tensors, 8 + length, size)
    return tensors


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        integers = [*shape, begin, end]
        if dtype not in _ITEM_BYTES or len(shape) > MAX_DIMENSIONS:
            raise ValueError("a dtype or number of dimensions that the format does not know")
        if any(type(value) is not int or not 0 <= value < 1 << 63 for value in integers):
            raise ValueError("a number in it is negative, too large or no integer")
        if end < begin or end - begin != math.prod(shape) * _ITEM_BYTES[dtype]:
            raise ValueError("its dtype and shape do not fit its bytes")
    except (KeyError, TypeError, ValueError) as exc:
        raise ConvertError(f"{path}: the header's entry of tensor {name!r:.200} is wrong ({str(exc)[:100]})") from exc
    return TensorInfo(path, dtype, tuple(shape), data_start + begin, end - begin)


def _check_layout(path: Path, tensors: dict[str, TensorInfo], start: int, size: int) -> None:
    """The format has neither overlaps nor holes, and the data ends where the file does."""
    outside = next((name for name, info in tensors.items() if info.start + info.n_bytes > size), None)
    if outside is not None:
        raise ConvertError(f"{path}: tensor {outside!r:.200} ends beyond the file ({size:,} bytes): download it again")
    position = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].n_bytes)):
        if info.start != position:
            problem = "overlaps another one" if info.start < position else "leaves a hole before it"
            raise ConvertError(f"{path}: tensor {name!r:.200} {problem} (byte {info.start:,})")
        position += info.n_bytes
    if position != size:
        raise ConvertError(f"{path}: {size:,} bytes, but its header describes {position:,}: download it again")
