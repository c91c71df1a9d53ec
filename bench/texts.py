"""The texts that are scored: a BEIR directory's, or made from the words below with the same spread of lengths."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

SEED = 20260101
# BEIR's paragraph collections have a median near 70 words and a long tail: log-normal, cut at both ends.
MEDIAN_WORDS, SIGMA, FEWEST_WORDS, MOST_WORDS = 70, 0.5, 10, 220
WORDS = (
    "the of and in a to was is for on as by with that from at his it an were are which this also be has had first one "
    "their its new after but who not they have city river species university music war film school station season team"
).split()


@dataclass(frozen=True)
class Request:
    """One list to rerank."""

    query: str
    passages: tuple[str, ...]


class Texts:
    """Lists of any length, each passage given once until all are used up, so that no engine can remember a score."""

    def __init__(self, lists: Iterator[tuple[str, list[str]]]) -> None:
        self._pairs = ((query, passage) for query, passages in lists for passage in passages)

    def request(self, n_passages: int) -> Request:
        """A query and n_passages: its own candidates first, then those of the queries after it."""
        pairs = list(itertools.islice(self._pairs, n_passages))
        return Request(pairs[0][0], tuple(passage for _, passage in pairs))


def read_texts(directory: Path | None) -> Texts:
    """Raises SystemExit that names the file which is missing from a --data directory."""
    return Texts(beir_lists(directory) if directory else made_lists())


def made_lists(query_words: int | None = None, passage_words: int | None = None) -> Iterator[tuple[str, list[str]]]:
    """Endless (query, passages), of drawn lengths unless they are given: the lengths matter to speed, not the words."""
    generator = random.Random(SEED)
    while True:
        query = " ".join(generator.choices(WORDS, k=query_words or generator.randint(5, 20))) + "?"
        yield query, [make_passage(generator, passage_words or draw_length(generator)) for _ in range(100)]


def draw_length(generator: random.Random) -> int:
    return min(MOST_WORDS, max(FEWEST_WORDS, round(MEDIAN_WORDS * generator.lognormvariate(0, SIGMA))))


def make_passage(generator: random.Random, n_words: int) -> str:
    return " ".join(generator.choices(WORDS, k=n_words)).capitalize() + "."


def beir_lists(directory: Path) -> Iterator[tuple[str, list[str]]]:
    """(query, its BM25 candidates in order) in a fixed random order of queries; starts again at the end."""
    corpus = {row["_id"]: f"{row.get('title', '')} {row['text']}".strip() for row in _jsonl(directory, "corpus")}
    queries = {row["_id"]: row["text"] for row in _jsonl(directory, "queries")}
    run: dict[str, list[str]] = {}
    with _open(next(iter(sorted(directory.glob("bm25*.tsv*"))), directory / "bm25.tsv")) as lines:
        for line in lines:
            query, document = line.split("\t")[:2]
            run.setdefault(query, []).append(document)
    order = [query for query in run if query in queries]
    random.Random(SEED).shuffle(order)
    for query in itertools.cycle(order):
        yield queries[query], [corpus[document] for document in run[query] if document in corpus]


def _jsonl(directory: Path, name: str) -> Iterator[dict[str, Any]]:
    path = directory / f"{name}.jsonl"
    with _open(path if path.is_file() else path.with_name(f"{path.name}.gz")) as lines:
        for line in lines:
            yield json.loads(line)


def _open(path: Path) -> TextIO:
    if not path.is_file():
        raise SystemExit(f"bench: --data {path.parent}: there is no {path.name}")
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
