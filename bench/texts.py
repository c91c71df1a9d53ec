"""The texts that are scored: a BEIR directory's, or made from the words below with the same spread of lengths."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import beir

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
    try:
        corpus, queries = beir.read_texts_by_id(directory, "corpus"), beir.read_texts_by_id(directory, "queries")
        found = beir.find_run(directory)
        run = beir.read_run(found) if found else {}
    except beir.DataError as error:
        raise SystemExit(f"bench: --data {error}") from None
    if not run:
        raise SystemExit(f"bench: --data {directory}: there is no bm25*.tsv with candidates")
    order = [query for query in run if query in queries]
    random.Random(SEED).shuffle(order)
    for query in itertools.cycle(order):
        yield queries[query], [corpus[document] for document in run[query] if document in corpus]

