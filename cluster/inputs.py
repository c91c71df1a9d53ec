"""Lists of pairs on disk: JSON lines, Parquet, and a BEIR directory with a TREC run.

An input is cut into parts of some rows each, by a pass that keeps no text; any machine then reads any part alone.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow.parquet as pq

import rerank_server
from rerank_server import BadRequestError

PARQUET_BATCH_ROWS = 1024  # in memory at once
TREC_FIELDS = ("query_id", "Q0", "passage_id", "rank", "score", "tag")


class InputError(Exception):
    """An input that cannot be read, or an output that cannot be written: one line that names it and says what to do."""


@dataclass(frozen=True)
class Part:
    """Rows that are scored and kept together. place: of the first one, as the source counts within `path`."""

    number: int
    path: str
    place: int
    first_row: int  # of the whole input, from 0
    n_rows: int
    group: int = 0  # Parquet: the row group


@dataclass(frozen=True)
class Row:
    row: int
    query: str
    passage: str
    query_id: str | None
    passage_id: str | None


@dataclass(frozen=True)
class BadRow:
    """What cannot be scored. given: how it stands in the input."""

    row: int
    reason: str
    given: str


class Source(Protocol):
    """Can be pickled: the driver asks for parts, actors on other machines for their rows."""

    def files(self) -> list[Path]:
        """What a continued job must find unchanged."""

    def parts(self, part_rows: int) -> Iterator[Part]: ...

    def rows(self, part: Part) -> Iterator[Row | BadRow]: ...


def open_source(path: Path, run: Path | None, needs_ids: bool) -> JsonLines | Parquet | BeirRun:
    """path: a file, a directory of such files, or with `run` a BEIR directory. needs_ids: rows without query_id and
    passage_id are bad ones. Raises InputError."""
    if run is not None:
        return BeirRun(path, _existing(run))
    files = sorted(path.glob("*.*")) if path.is_dir() else [_existing(path)]
    kinds = {kind: [file for file in files if file.suffix in endings] for kind, endings in _ENDINGS.items()}
    found = {kind: own for kind, own in kinds.items() if own}
    if any(file.name == "corpus.jsonl" for file in files):
        raise InputError(f"{path}: a BEIR directory needs a run of candidates: --run FILE, in TREC's format")
    if len(found) != 1:
        raise InputError(f"{path}: one kind of files is needed, .parquet or .jsonl; there is {_names(found)}")
    ((kind, own),) = found.items()
    source = kind(tuple(own), needs_ids)
    source.check()
    return source


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    return path


def _names(found: dict[Any, list[Path]]) -> str:
    return " and ".join(own[0].name for own in found.values()) or "none"


def _checked(number: int, values: dict[str, Any], needs_ids: bool) -> Row:
    """Raises BadRequestError that names the field."""
    query, passage = (_text(values, name) for name in ("query", "passage"))
    return Row(number, query, passage, *(_id(values, name, needs_ids) for name in ("query_id", "passage_id")))


def _text(values: dict[str, Any], name: str) -> str:
    if name not in values:
        raise BadRequestError(f"'{name}' is missing", name)
    return rerank_server.read_string(values[name], name)


def _id(values: dict[str, Any], name: str, is_needed: bool) -> str | None:
    value = None if values.get(name) is None else str(values[name])
    if is_needed and (not value or len(value.split()) != 1):
        raise BadRequestError(f"'{name}' must be given, without white space: a TREC run is made of them", name)
    return value


# -- JSON lines --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JsonLines:
    """{"query": str, "passage": str, "query_id"?, "passage_id"?} in each line. Empty lines are passed over."""

    paths: tuple[Path, ...]
    needs_ids: bool

    def check(self) -> None:
        pass

    def files(self) -> list[Path]:
        return list(self.paths)

    def parts(self, part_rows: int) -> Iterator[Part]:
        return _line_parts(self.paths, part_rows)

    def rows(self, part: Part) -> Iterator[Row | BadRow]:
        for number, line in _lines(part):
            try:
                if line.strip():
                    yield _checked(number, rerank_server.parse_json_object(line), self.needs_ids)
            except BadRequestError as error:
                yield BadRow(number, error.message, line.decode("utf-8", "replace").rstrip("\n"))


def _line_parts(paths: Sequence[Path], part_rows: int) -> Iterator[Part]:
    number = first_row = 0
    for path in paths:
        with path.open("rb") as file:
            place = n_rows = 0
            for end, n_rows in _every(file, part_rows):
                yield Part(number, str(path), place, first_row, n_rows)
                number, first_row, place = number + 1, first_row + n_rows, end


def _every(file: BinaryIO, n_lines: int) -> Iterator[tuple[int, int]]:
    """(offset after them, how many) for each n_lines lines, and for those that are left."""
    end = count = 0
    for line in file:
        end, count = end + len(line), count + 1
        if count == n_lines:
            yield end, count
            count = 0
    if count:
        yield end, count


def _lines(part: Part) -> Iterator[tuple[int, bytes]]:
    with Path(part.path).open("rb") as file:
        file.seek(part.place)
        for number in range(part.first_row, part.first_row + part.n_rows):
            yield number, file.readline()


# -- Parquet -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parquet:
    """Columns query and passage, and perhaps query_id and passage_id; others are not read."""

    paths: tuple[Path, ...]
    needs_ids: bool

    def check(self) -> None:
        for path in self.paths:
            names = _parquet(path).schema_arrow.names
            for name in ("query", "passage", *(("query_id", "passage_id") if self.needs_ids else ())):
                if name not in names:
                    raise InputError(f"{path}: there is no column {name!r}, only {', '.join(names)}")

    def files(self) -> list[Path]:
        return list(self.paths)

    def parts(self, part_rows: int) -> Iterator[Part]:
        number = first_row = 0
        for path in self.paths:
            metadata = _parquet(path).metadata
            for group in range(metadata.num_row_groups):
                n_group = metadata.row_group(group).num_rows
                for place in range(0, n_group, part_rows):
                    n_rows = min(part_rows, n_group - place)
                    yield Part(number, str(path), place, first_row, n_rows, group)
                    number, first_row = number + 1, first_row + n_rows

    def rows(self, part: Part) -> Iterator[Row | BadRow]:
        for number, values in enumerate(_parquet_rows(part), part.first_row):
            try:
                yield _checked(number, values, self.needs_ids)
            except BadRequestError as error:
                yield BadRow(number, error.message, json.dumps(values, default=str))


def _parquet(path: Path) -> Any:
    try:
        return pq.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise InputError(f"{path}: not a Parquet file: {error}") from None


def _parquet_rows(part: Part) -> Iterator[dict[str, Any]]:
    """Batch by batch from the start of the row group: Parquet has no index of rows, and texts are not kept."""
    file, skipped, left = _parquet(Path(part.path)), part.place, part.n_rows
    columns = [name for name in ("query", "passage", "query_id", "passage_id") if name in file.schema_arrow.names]
    for batch in file.iter_batches(PARQUET_BATCH_ROWS, row_groups=[part.group], columns=columns):
        taken = batch.slice(skipped, left)
        yield from taken.to_pylist()
        skipped, left = max(0, skipped - batch.num_rows), left - taken.num_rows
        if left == 0:
            return


# -- BEIR and TREC -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BeirRun:
    """The candidates of a run, each with its texts from corpus.jsonl and queries.jsonl (perhaps .gz) of a directory:
    `{_id, title?, text}`. The texts are put into a database first, so that neither is held in memory."""

    directory: Path
    run: Path
    database: Path = Path()

    def files(self) -> list[Path]:
        return [self.run, *(self._file(name) for name in ("corpus", "queries"))]

    def _file(self, name: str) -> Path:
        for path in (self.directory / f"{name}.jsonl{end}" for end in ("", ".gz")):
            if path.is_file():
                return path
        raise InputError(f"{self.directory}: there is no {name}.jsonl")

    def indexed(self, database: Path) -> tuple[BeirRun, int]:
        """With its database, made if it is not there; and how many lines were none of corpus or queries, so that what
        the run says of them is bad. Raises InputError."""
        n_bad = 0
        if not database.is_file():
            n_bad = _index({name: self._file(name) for name in ("corpus", "queries")}, database)
        return BeirRun(self.directory, self.run, database), n_bad

    def parts(self, part_rows: int) -> Iterator[Part]:
        return _line_parts([self.run], part_rows)

    def rows(self, part: Part) -> Iterator[Row | BadRow]:
        with contextlib.closing(sqlite3.connect(f"file:{self.database}?mode=ro&immutable=1", uri=True)) as texts:
            for number, line in _lines(part):
                try:
                    yield _candidate(number, line, texts)
                except BadRequestError as error:
                    yield BadRow(number, error.message, line.decode("utf-8", "replace").rstrip("\n"))


def _candidate(number: int, line: bytes, texts: sqlite3.Connection) -> Row:
    try:
        fields = line.decode().split()
    except UnicodeDecodeError:
        raise BadRequestError("not UTF-8") from None
    if len(fields) != len(TREC_FIELDS):
        raise BadRequestError(f"{len(fields)} fields, where a TREC run has {' '.join(TREC_FIELDS)}")
    query_id, passage_id = fields[0], fields[2]
    query, passage = _lookup(texts, "queries", query_id), _lookup(texts, "corpus", passage_id)
    return Row(number, query, passage, query_id, passage_id)


def _lookup(texts: sqlite3.Connection, name: str, key: str) -> str:
    found = texts.execute("SELECT text FROM texts WHERE name = ? AND id = ?", (name, key)).fetchone()
    if found is None:
        raise BadRequestError(f"{name}.jsonl has no text with the _id {key!r}")
    return str(found[0])


def _index(files: dict[str, Path], database: Path) -> int:
    """Returns how many lines it could not use."""
    unfinished = database.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)
    bad: list[int] = []
    with contextlib.closing(sqlite3.connect(unfinished)) as texts, texts:
        texts.execute("CREATE TABLE texts (name TEXT, id TEXT, text TEXT, PRIMARY KEY (name, id))")
        for name, path in files.items():
            rows = ((name, *item) for item in _texts_by_id(path, bad))
            texts.executemany("INSERT OR REPLACE INTO texts VALUES (?, ?, ?)", rows)
    unfinished.replace(database)
    return len(bad)


def _texts_by_id(path: Path, bad: list[int]) -> Iterable[tuple[str, str]]:
    """The title stands before the text, as in BEIR's own loader."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                values = rerank_server.parse_json_object(line)
                text = _text(values, "text")
                title = rerank_server.read_string(values.get("title") or "", "title")
                yield str(values["_id"]), f"{title} {text}".strip()
            except (BadRequestError, KeyError):
                bad.append(number)


_ENDINGS: dict[type[JsonLines] | type[Parquet], tuple[str, ...]] = {
    JsonLines: (".jsonl", ".ndjson"), Parquet: (".parquet", ".pq"),
}  # fmt: skip
