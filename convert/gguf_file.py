"""Reads a GGUF file's header, checks a file's tensors, fills in rerank.verification in place, and copies a file with
further numbers in its header.

Not gguf.GGUFReader: that maps the whole file and makes several objects for every token of the vocabulary, about 1 GB
for 250,000 of them. Format: ggml's docs/gguf.md, version 3, little-endian.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np

from .checkpoint import refuse_stub
from .errors import ConvertError

MAX_COUNT = 1 << 24  # keys, tensors, array elements: more is a damaged header
MAX_STRING_BYTES = 1 << 24
SHORT_ARRAY = 4096  # longer arrays (vocabularies) are passed over
CHECKED_ROWS = 64  # of each end of a tensor
DIGEST_BYTES = 64  # of a SHA-256, in hexadecimal
COPIED_BYTES = 1 << 24  # at once
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _DOUBLE = 8, 9, 12


@dataclass(frozen=True)
class StoredTensor:
    """shape: rows first. start: byte of the file."""

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    start: int

    @property
    def row_bytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return int(self.shape[-1] // block * size)

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class GgufFile:
    """metadata: scalars, strings and short arrays; a long array is None. items: key -> first byte and end of all that
    the header holds of it; infos: the same of what it says of the tensors."""

    path: Path
    metadata: dict[str, Any]
    items: dict[str, tuple[int, int]]
    tensors: dict[str, StoredTensor]
    infos: tuple[int, int]

    @staticmethod
    def open(path: Path) -> GgufFile:
        """Raises ConvertError for what is no GGUF file, a damaged or a truncated one."""
        try:
            with path.open("rb") as stream:
                refuse_stub(path, stream.read(64))
                stream.seek(0)
                return _Reader(path, stream).read()
        except OSError as exc:
            raise ConvertError(f"{path}: cannot be read ({exc.strerror or exc})") from exc
        except (ValueError, struct.error) as exc:
            raise ConvertError(f"{path}: not a readable GGUF file ({str(exc)[:150]})") from exc

    def check_values(self) -> None:
        """Dequantises both ends of every tensor. Raises ConvertError for NaN or infinity (a file written in part)."""
        with self.path.open("rb") as stream:
            for tensor in self.tensors.values():
                rows = math.prod(tensor.shape[:-1])
                for first in {0, max(0, rows - CHECKED_ROWS)}:
                    stream.seek(tensor.start + first * tensor.row_bytes)
                    count = min(CHECKED_ROWS, rows)
                    raw = np.frombuffer(stream.read(count * tensor.row_bytes), np.uint8).reshape(count, -1)
                    if not np.isfinite(gguf.quants.dequantize(raw, tensor.type)).all():
                        raise ConvertError(f"{self.path}: tensor {tensor.name} holds NaN or infinity")

    @property
    def verification(self) -> dict[str, Any]:
        try:
            value = json.loads(self.metadata.get("rerank.verification", "{}"))
        except (TypeError, ValueError):
            value = {}
        return value if isinstance(value, dict) else {}

    def record(self, verification: dict[str, Any]) -> None:
        """Writes rerank.verification over the blanks kept for it, then rerank.header_sha256: the SHA-256 of everything
        before the tensor data, with zeroes in the digest's own place. Raises ConvertError when there is no room."""
        key = "rerank.verification"
        text = json.dumps(verification, separators=(",", ":"))
        room = len(self.metadata.get(key, "").encode())
        if len(text) > room:
            raise ConvertError(f"{self.path}: {key} has room for {room} bytes, {len(text)} are needed")
        with self.path.open("r+b") as stream:
            stream.seek(self.items[key][1] - room)
            stream.write(text.ljust(room).encode())
        self.seal()

    def _digest(self) -> tuple[int, str]:
        """Where rerank.header_sha256 lies, and what it should be."""
        place = self.items["rerank.header_sha256"][1] - DIGEST_BYTES
        with self.path.open("rb") as stream:
            header = bytearray(stream.read(self._data_start))
        header[place : place + DIGEST_BYTES] = b"0" * DIGEST_BYTES
        return place, hashlib.sha256(header).hexdigest()

    def seal(self) -> None:
        """Writes rerank.header_sha256: the server opens no file without a right one."""
        place, digest = self._digest()
        with self.path.open("r+b") as stream:
            stream.seek(place)
            stream.write(digest.encode())

    @property
    def _data_start(self) -> int:
        return min(tensor.start for tensor in self.tensors.values())

    def copy_with(self, path: Path, numbers: dict[str, float]) -> None:
        """The same file with these numbers (64 bits) in its header, in place of those of the same keys. The tensors'
        bytes are copied as they are; a rerank.header_sha256 that is right is made anew. Raises OSError."""
        alignment = self.metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        with self.path.open("rb") as source, path.open("wb") as copy:
            header = source.read(self._data_start)
            kept = [header[start:end] for key, (start, end) in self.items.items() if key not in numbers]
            new = [struct.pack("<Q", len(key)) + key.encode() + struct.pack("<Id", _DOUBLE, value)
                   for key, value in numbers.items()]  # fmt: skip
            copy.write(header[:16] + struct.pack("<Q", len(kept) + len(new)))  # magic, version, tensors; keys
            copy.writelines([*kept, *new, header[slice(*self.infos)]])
            copy.write(bytes(-copy.tell() % alignment))
            shutil.copyfileobj(source, copy, COPIED_BYTES)
        key = "rerank.header_sha256"
        if key in self.items and self.metadata[key] == self._digest()[1]:
            GgufFile.open(path).seal()


_Described = tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]  # name, shape, type, offset


class _Reader:
    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self._path, self._stream, self._size = path, stream, path.stat().st_size

    def read(self) -> GgufFile:
        if self._take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version, n_tensors, n_keys = self._scalar("I"), self._scalar("Q"), self._scalar("Q")
        if version not in (2, 3) or max(n_tensors, n_keys) > MAX_COUNT:
            raise ValueError(f"version {version} with {n_tensors} tensors and {n_keys} keys")
        items: dict[str, tuple[int, int]] = {}
        metadata = dict(self._item(items) for _ in range(n_keys))
        start = self._stream.tell()
        described = [self._tensor() for _ in range(n_tensors)]
        infos = (start, self._stream.tell())
        tensors = {tensor.name: tensor for tensor in self._tensors(described, metadata)}
        return GgufFile(self._path, metadata, items, tensors, infos)

    def _tensors(self, described: list[_Described], metadata: dict[str, Any]) -> Iterator[StoredTensor]:
        alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = self._stream.tell() + -self._stream.tell() % alignment
        for name, shape, kind, offset in described:
            tensor = StoredTensor(name, shape, kind, start + offset)
            if tensor.start + tensor.n_bytes > self._size:
                raise ValueError(f"truncated: tensor {name} ends at byte {tensor.start + tensor.n_bytes:,}")
            yield tensor

    def _tensor(self) -> _Described:
        name, n_dimensions = self._string(), self._scalar("I")
        if not 1 <= n_dimensions <= 4:
            raise ValueError(f"tensor {name} has {n_dimensions} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(n_dimensions))[::-1]
        kind, offset = gguf.GGMLQuantizationType(self._scalar("I")), self._scalar("Q")
        if 0 in shape or shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            raise ValueError(f"tensor {name} of shape {list(shape)} cannot be {kind.name}")
        return name, shape, kind, offset

    def _item(self, items: dict[str, tuple[int, int]]) -> tuple[str, Any]:
        start = self._stream.tell()
        key, kind = self._string(), self._scalar("I")
        value = self._value(kind)
        items[key] = (start, self._stream.tell())
        return key, value

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise ValueError(f"metadata type {kind}")
        return self._scalar(_SCALARS[kind])

    def _array(self) -> list[Any] | None:
        kind, count = self._scalar("I"), self._scalar("Q")
        if count > MAX_COUNT or kind == _ARRAY:
            raise ValueError(f"a metadata array of {count} elements of type {kind}")
        if count <= SHORT_ARRAY:
            return [self._value(kind) for _ in range(count)]
        if kind == _STRING:
            for _ in range(count):
                self._string()
        elif kind in _SCALARS:
            self._take(count * struct.calcsize(_SCALARS[kind]))
        else:
            raise ValueError(f"metadata type {kind}")
        return None

    def _string(self) -> str:
        length = self._scalar("Q")
        if length > MAX_STRING_BYTES:
            raise ValueError(f"a string of {length} bytes")
        return self._take(length).decode("utf-8", "replace")

    def _scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _take(self, count: int) -> bytes:
        raw = self._stream.read(count)
        if len(raw) != count:
            raise ValueError("truncated in its header")
        return raw
