"""Judged collections in BEIR's layout, and candidate runs.

A collection is a directory with corpus.jsonl `{_id, title?, text}`, queries.jsonl `{_id, text}` and judgements in
qrels/test.tsv (or qrels.tsv) `query-id, corpus-id, score` with a header line; each may be gzipped (NAME.gz).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

Run = dict[str, list[str]]  # query id -> document ids, best first
Judgements = dict[str, dict[str, int]]  # query id -> document id -> grade


class DataError(Exception):
    """A file that is missing or cannot be read; the message names it, and the line."""


@dataclass(frozen=True)
class Collection:
    """name: the directory's. queries: those with at least one document of grade 1 or more."""

    name: str
    corpus: dict[str, str]
    queries: dict[str, str]
    judgements: Judgements


def find_collections(directories: Sequence[Path]) -> list[Path]:
    """Each directory that is a collection, or those in it that are. Raises DataError where there is none."""
    found: list[Path] = []
    for directory in directories:
        inside = [directory] if _is_collection(directory) else sorted(filter(_is_collection, directory.glob("*/")))
        if not inside:
            raise DataError(f"{directory}: there is no corpus.jsonl, nor a directory with one")
        found += inside
    return found


def _is_collection(directory: Path) -> bool:
    return any((directory / f"corpus.jsonl{end}").is_file() for end in ("", ".gz"))


def read_collection(directory: Path) -> Collection:
    """Raises DataError."""
    corpus, queries = read_texts_by_id(directory, "corpus"), read_texts_by_id(directory, "queries")
    judgements = _read_judgements(_existing(directory, "qrels/test.tsv", "qrels.tsv"))
    judged = {query for query, grades in judgements.items() if max(grades.values()) > 0}
    kept = {key: text for key, text in queries.items() if key in judged}
    if not kept:
        raise DataError(f"{directory}: no query of queries.jsonl has a relevant document in the judgements")
    return Collection(directory.resolve().name, corpus, kept, judgements)


def read_texts_by_id(directory: Path, name: str) -> dict[str, str]:
    """corpus or queries: id -> text, the title before it where there is one. Raises DataError."""
    path = _existing(directory, f"{name}.jsonl")
    texts = {}
    for number, line in _lines(path):
        try:
            row = json.loads(line)
            texts[str(row["_id"])] = f"{row.get('title') or ''} {row['text']}".strip()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"{path}, line {number}: not a JSON object with _id and text") from None
    return texts


def _existing(directory: Path, *names: str) -> Path:
    for path in (directory / (name + end) for name in names for end in ("", ".gz")):
        if path.is_file():
            return path
    raise DataError(f"{directory}: there is no {' or '.join(names)}")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of a text file, gzipped or not, without empty ones."""
    with open_text(path) as lines:
        try:
            yield from ((number, line.rstrip("\n")) for number, line in enumerate(lines, 1) if line.strip())
        except (UnicodeDecodeError, EOFError, OSError) as error:
            raise DataError(f"{path}: cannot be read ({error})") from None


def open_text(path: Path) -> TextIO:
    """Raises DataError."""
    try:
        return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def _read_judgements(path: Path) -> Judgements:
    """BEIR's three columns, or TREC's four (query, 0, document, grade); a header line is left out."""
    judgements: Judgements = {}
    for number, line in _lines(path):
        columns = line.split("\t") if "\t" in line else line.split()
        try:
            grade = int(columns[-1])
            query, document = columns[0], columns[-2]
        except (ValueError, IndexError):
            if number == 1:
                continue
            raise DataError(f"{path}, line {number}: expected query, document and a whole number") from None
        judgements.setdefault(query, {})[document] = grade
    return judgements


def read_run(path: Path) -> Run:
    """TREC's six columns (query, Q0, document, rank, score, tag), or query, document, (rank,) score with tabs; may be
    gzipped. Ordered by score, equal ones as they stand. Raises DataError."""
    found: dict[str, dict[str, float]] = {}
    for number, line in _lines(path):
        columns = line.split("\t") if "\t" in line else line.split()
        at_document, at_score = (2, 4) if len(columns) == 6 else (1, len(columns) - 1)
        try:
            score = float(columns[at_score])
        except (ValueError, IndexError):
            if number == 1:
                continue
            raise DataError(f"{path}, line {number}: neither a TREC run nor query, document, score") from None
        if len(columns) < 3:
            raise DataError(f"{path}, line {number}: neither a TREC run nor query, document, score")
        found.setdefault(columns[0], {}).setdefault(columns[at_document], score)
    return {query: sorted(scores, key=lambda document: -scores[document]) for query, scores in found.items()}


def find_run(directory: Path) -> Path | None:
    """The candidates that lie beside a collection: bm25*.tsv, .trec or .run, gzipped or not."""
    endings = (".tsv", ".trec", ".run", ".tsv.gz", ".trec.gz", ".run.gz")
    return next((path for path in sorted(directory.glob("bm25*")) if path.name.endswith(endings)), None)


def bm25_run(collection: Collection, depth: int) -> Run:
    """Candidates by bm25s (Lucene's BM25, k1 1.5, b 0.75, English stopwords left out, no stemming)."""
    import bm25s  # only where it is needed: a run may be given

    ids = list(collection.corpus)
    index = bm25s.BM25(method="lucene")
    texts = [collection.corpus[key] for key in ids]
    index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    words = bm25s.tokenize(list(collection.queries.values()), stopwords="en", return_ids=False, show_progress=False)
    best = index.retrieve(words, k=min(depth, len(ids)), show_progress=False).documents
    return {query: [ids[row] for row in rows] for query, rows in zip(collection.queries, best, strict=True)}


def write_run(run: Run, path: Path, tag: str) -> None:
    """TREC's format; the scores fall with the rank, so that no tool breaks ties another way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (
        f"{query} Q0 {document} {rank} {len(documents) - rank + 1} {tag}\n"
        for query, documents in run.items()
        for rank, document in enumerate(documents, 1)
    )
    path.write_text("".join(lines), encoding="utf-8")
