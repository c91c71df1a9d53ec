"""What a batch job has done: a folder with a file for each part that is scored. An actor writes a part at once, under
its final name, so a part is either done or not there; what dies meanwhile leaves nothing that a later one must undo.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.inputs import BadRow, InputError, Part, Row, Source
from cluster.settings import Values, actor_settings, find_role
from rerank_server import (
    EngineError,
    ModelError,
    Pair,
    RerankRequest,
    Scored,
    Settings,
    load_engine,
    pairs_of,
    score_all,
    score_of,
)

# logit: exact where scores saturate at 1.0. row: its number in the input, from 0.
SCHEMA = pa.schema([
    ("row", pa.int64()), ("query_id", pa.string()), ("passage_id", pa.string()), ("score", pa.float64()),
    ("logit", pa.float64()), ("n_tokens", pa.int32()), ("truncated", pa.bool_()),
])  # fmt: skip
HASH_BYTES = 1 << 20


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Folder:
    """The scored parts of a job, in a directory that every machine sees."""

    path: Path

    def scored(self, number: int) -> Path:
        return self.path / f"{number:08d}.parquet"

    def bad(self, number: int) -> Path:
        return self.path / f"{number:08d}.bad.jsonl"

    def done(self) -> set[int]:
        return {int(path.stem) for path in self.path.glob("*.parquet")}

    def write(self, part: Part, scored: list[dict[str, Any]], bad: Sequence[BadRow]) -> None:
        """The bad rows first: the part is done when its scores are there."""
        if bad:
            lines = (json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in bad)
            with _renamed(self.bad(part.number)) as path:
                path.write_text("".join(lines), encoding="utf-8")
        with _renamed(self.scored(part.number)) as path:
            pq.write_table(pa.Table.from_pylist(scored, SCHEMA), path)

    def tables(self) -> Iterator[pa.Table]:
        """In the order of the input."""
        for number in sorted(self.done()):
            yield pq.ParquetFile(self.scored(number)).read()

    def merge_bad(self, output: Path) -> int:
        """Into one file of JSON lines, if there are any. Returns how many."""
        count = 0
        with _renamed(output) as path, path.open("wb") as merged:
            for number in sorted(self.done()):
                if (own := self.bad(number)).is_file():
                    lines = own.read_bytes()
                    count += merged.write(lines) and lines.count(b"\n")
        if not count:
            output.unlink()
        return count

    def merge(self, output: Path, is_trec: bool) -> int:
        """Into one file. Returns how many pairs."""
        with _renamed(output) as path:
            return self._write_trec(path) if is_trec else self._write_parquet(path)

    def _write_parquet(self, path: Path) -> int:
        count = 0
        with pq.ParquetWriter(path, SCHEMA) as writer:
            for table in self.tables():
                writer.write_table(table)
                count += table.num_rows
        return count

    def _write_trec(self, path: Path) -> int:
        """Best first for each query, as the server orders a ranking; sorted on disk. TREC's tools sort by the score
        again, so it is the logit, which does not saturate."""
        database, count = self.path / "sorted.sqlite", 0
        database.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(database)) as rows, path.open("w", encoding="utf-8") as run:
            rows.execute("CREATE TABLE scores (query_id TEXT, passage_id TEXT, logit REAL, number INTEGER)")
            for table in self.tables():
                columns = (table[name].to_pylist() for name in ("query_id", "passage_id", "logit", "row"))
                rows.executemany("INSERT INTO scores VALUES (?, ?, ?, ?)", zip(*columns, strict=True))
            query, rank = None, 0
            best_first = "SELECT query_id, passage_id, logit FROM scores ORDER BY query_id, logit DESC, number"
            for query_id, passage_id, logit in rows.execute(best_first):
                count, query, rank = count + 1, query_id, rank + 1 if query_id == query else 1
                run.write(f"{query_id} Q0 {passage_id} {rank} {logit!r} rerank-server\n")
        return count


@contextlib.contextmanager
def _renamed(path: Path) -> Iterator[Path]:
    """A file that appears when it is whole. Two actors may write the same one."""
    unfinished = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.unfinished")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


class Scorer:
    """One engine, asked directly: what is packed together into a decode then depends on nothing but the list, so the
    same part gives the same bits wherever and whenever it is scored. (A server's queue packs what arrives together.)"""

    def __init__(self, name: str, settings: Settings) -> None:
        """Raises ModelError."""
        role = find_role(name, settings)
        self.path, self._model = role.description.path, role.description
        self._engine = load_engine(self.path, settings)

    def results(self, rows: Sequence[Row]) -> list[Scored | EngineError]:
        """All together; when that fails, one by one, so that a pair which the model cannot score costs no other."""
        request = RerankRequest(tuple(row.query for row in rows), tuple(row.passage for row in rows))
        pairs = [pair for (pair,) in pairs_of(request, self._engine.pairs, range(len(rows)))]
        try:
            logits: list[float | EngineError] = list(self._logits(pairs))
        except EngineError:
            logits = [self._logit(pair) for pair in pairs]
        return [self._result(*item) for item in zip(range(len(rows)), pairs, logits, strict=True)]

    def _logits(self, pairs: Sequence[Pair]) -> list[float]:
        """Equal pairs are scored once; the longest first, so that short ones fill the batches. Raises EngineError."""
        unique = sorted({pair.key: pair for pair in pairs}.values(), key=lambda pair: -pair.n_new)
        logits = dict(zip((pair.key for pair in unique), score_all(self._engine, unique), strict=True))
        return [logits[pair.key] for pair in pairs]

    def _logit(self, pair: Pair) -> float | EngineError:
        try:
            return score_all(self._engine, [pair])[0]
        except EngineError as error:
            return error

    def _result(self, index: int, pair: Pair, logit: float | EngineError) -> Scored | EngineError:
        if isinstance(logit, EngineError):
            return logit
        try:
            score = score_of(self._model, logit)
        except EngineError as error:
            return error
        return Scored(index, logit, score, self._model.name, len(pair.ids) + len(pair.query_ids), pair.truncated)

    def close(self) -> None:
        self._engine.close()


class ScoreParts:
    """An actor of Ray Data's pool: reads, scores and writes parts."""

    def __init__(self, name: str, values: Values, sha256: str, source: Source, folder: Folder) -> None:
        """sha256: of the model file, which must be the same on every machine. Raises SettingsError, ModelError and
        InputError."""
        if not folder.path.is_dir():
            raise InputError(f"{folder.path} is not there: input and output must be at one path on every machine")
        self._scorer, self._source, self._folder = Scorer(name, actor_settings(values)), source, folder
        if sha256_of(self._scorer.path) != sha256:
            raise ModelError(f"{self._scorer.path} is another file here than where the job was started")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """batch: columns with the fields of Part. Gives them back when the parts are done."""
        names = [field.name for field in dataclasses.fields(Part)]
        for values in zip(*(batch[name].tolist() for name in names), strict=True):
            part = Part(**dict(zip(names, values, strict=True)))
            if not self._folder.scored(part.number).is_file():  # an actor that died had done it
                score_part(part, self._scorer, self._source, self._folder)
        return batch


def score_part(part: Part, scorer: Scorer, source: Source, folder: Folder) -> None:
    read = list(source.rows(part))
    rows, bad = [row for row in read if isinstance(row, Row)], [row for row in read if isinstance(row, BadRow)]
    scored = []
    for row, result in zip(rows, scorer.results(rows), strict=True):
        if isinstance(result, Scored):
            scored.append({**dataclasses.asdict(row), **dataclasses.asdict(result)})
        else:
            bad.append(BadRow(row.row, result.message, json.dumps(dataclasses.asdict(row), ensure_ascii=False)))
    folder.write(part, scored, sorted(bad, key=lambda row: row.row))
