"""Logits equal the reference's, and a pair's score does not depend on what is scored beside it.

Tiny checkpoints with visible spread (tests/checkpoints.py), float32 GGUF against transformers in float32.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import ARCHITECTURES, PROMPTED, EngineOf, Gguf, load_engine
from golden.inputs import SCORED_PAIRS

import rerank_server
from convert.job import Job
from convert.reference import overlap

Logits = npt.NDArray[np.float64]

# Largest difference of a logit, as a part of the range of the reference's logits (2.3 to 6 here). llama.cpp's flash
# attention keeps K and V in float16, and sums in float16 too where a decode has few tokens: a relative step of 5e-4.
# Measured against the reference: 1/1900 (XLM-R), 1/2150 (BERT), 1/2600 (bi-encoder), 1/590 (Gemma, a pair of 4,157
# tokens); alone against packed: 1/610 to 1/1250. What goes wrong (a token type, a mask, a head) shows in tenths.
TOLERANCE = 1 / 400
SAME_SUM = 1e-5  # two decodes of the same texts in the same batches, and float64 sums
UBATCHES = (64, 128, 512)
MINI = Path(__file__).resolve().parent.parent / "models" / "mini-Q8_0.gguf"
CHECKPOINT = MINI.parent / "all-MiniLM-L6-v2"


def pairs_of(engine: rerank_server.Engine) -> list[rerank_server.Pair]:
    cuts = [(pair, rerank_server.Cut(pair.max_length)) for pair in SCORED_PAIRS]
    return [engine.pairs.make(pair.query, [pair.passage], cut)[0] for pair, cut in cuts]


@pytest.fixture(scope="session")
def reference_of(golden: dict[str, Any], engine_of: EngineOf) -> Callable[[str], Logits]:
    """The golden logits; for the bi-encoder, whose golden values are cosines, on the line of its own file."""

    def logits(architecture: str) -> Logits:
        values = np.array(golden[architecture]["logits"])
        if architecture == "bi":
            engine = engine_of(architecture)
            assert isinstance(engine, rerank_server.EmbeddingEngine)
            values = engine.cosine_scale * values + engine.cosine_bias
        return values

    return logits


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def reference(architecture: str, reference_of: Callable[[str], Logits]) -> Logits:
    return reference_of(architecture)


@pytest.fixture(scope="module")
def logits(architecture: str, engine_of: EngineOf) -> Logits:
    engine = engine_of(architecture)
    return np.array(rerank_server.score_all(engine, pairs_of(engine)))


def test_the_references_logits_are_far_apart(reference: Logits) -> None:
    """Otherwise the tests below could not tell a right score from a wrong one."""
    assert np.ptp(reference) > 2
    assert np.std(reference) > 0.4


def test_logits_equal_the_reference(logits: Logits, reference: Logits) -> None:
    np.testing.assert_allclose(logits, reference, rtol=0, atol=TOLERANCE * np.ptp(reference))


def test_ranks_equal_the_reference(logits: Logits, reference: Logits) -> None:
    """Two pairs that the reference tells apart by more than rounding come out in its order."""
    apart = reference[:, None] - reference[None, :] > 2 * TOLERANCE * np.ptp(reference)
    assert apart.sum() > 550  # of 37 * 36 / 2 = 666 pairs of pairs
    assert np.all((logits[:, None] > logits[None, :])[apart])


@pytest.fixture(scope="module", params=UBATCHES)
def packing_engine(architecture: str, request: pytest.FixtureRequest, gguf_of: Gguf) -> Iterator[Any]:
    engine = load_engine(gguf_of(architecture), max_length=256, ubatch=request.param)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def logits_alone(architecture: str, gguf_of: Gguf) -> Logits:
    """Each pair in a decode of its own."""
    engine = load_engine(gguf_of(architecture), max_length=256)
    result = np.concatenate([engine.score([pair]) for pair in pairs_of(engine)])
    engine.close()
    return result


def test_a_score_does_not_depend_on_its_company(
    packing_engine: rerank_server.Engine, logits_alone: Logits, reference: Logits
) -> None:
    """Among others, in any order, repeated, at any ubatch: the score that a pair has alone."""
    order = [*range(len(SCORED_PAIRS)), *range(0, len(SCORED_PAIRS), 3)]
    random.Random(7).shuffle(order)
    pairs = pairs_of(packing_engine)
    packed = rerank_server.score_all(packing_engine, [pairs[n] for n in order])
    np.testing.assert_allclose(packed, logits_alone[order], rtol=0, atol=TOLERANCE * np.ptp(reference))


@pytest.mark.parametrize("prompted", PROMPTED)
@pytest.mark.parametrize("n_queries", [1, 3])
def test_a_prefix_that_is_computed_once_does_not_change_scores(
    n_queries: int, prompted: str, gguf_of: Gguf, reference_of: Callable[[str], Logits]
) -> None:
    """What comes before the passage is computed once; pairs of several requests may meet in one batch."""
    engine = load_engine(gguf_of(prompted), max_length=256, ubatch=128)
    passages = [pair.passage for pair in SCORED_PAIRS]
    queries = [f"query {number}: " + "which of these says it? " * (1 + 9 * number) for number in range(n_queries)]
    pairs = [pair for query in queries for pair in engine.pairs.make(query, passages)]
    random.Random(3).shuffle(pairs)
    shared = rerank_server.score_all(engine, pairs)
    whole = rerank_server.score_all(engine, [dataclasses.replace(pair, n_shared=0) for pair in pairs])
    engine.close()
    assert all(pair.n_shared > 5 for pair in pairs)
    np.testing.assert_allclose(shared, whole, rtol=0, atol=TOLERANCE * np.ptp(reference_of(prompted)))


def test_the_overlap_is_the_part_of_the_querys_pieces_that_the_passage_holds() -> None:
    """By hand. Piece 1010 has rank 10, so it counts ln 2; piece 1030 ln 4, twice as much; the first piece nothing."""
    assert rerank_server.overlap([1000, 1010, 1030], [1030, 5, 1030, 1000], 1000) == pytest.approx(2 / 3)
    assert rerank_server.overlap([1010, 1010, 1030], [1010], 1000) == pytest.approx(1 / 3), "twice asked counts once"
    assert rerank_server.overlap([1010], [1010, 7], 1000) == 1
    assert rerank_server.overlap([1010], [], 1000) == 0
    assert rerank_server.overlap([1000, 999], [1000, 999], 1000) == 0, "nothing but the most frequent pieces"
    assert rerank_server.overlap([], [1010], 1000) == 0


def test_minis_logit_is_its_cosine_and_the_overlap_as_the_reference_counts_it() -> None:
    """convert/reference.py, which was written apart from the server, must find the same words in the same texts."""
    if not MINI.is_file() or not CHECKPOINT.is_dir():
        pytest.skip(f"{MINI} or its checkpoint is not there: `make mini` makes both")
    job = Job.open(CHECKPOINT)
    assert job.metadata["rerank.first_piece_id"] == 1996, "BERT's id of 'the'"
    texts = [(pair.query, pair.passage) for pair in SCORED_PAIRS]
    engine = load_engine(MINI, max_length=256)
    try:
        assert isinstance(engine, rerank_server.EmbeddingEngine)
        scale = engine.overlap_scale
        pairs = [engine.pairs.make(query, [passage])[0] for query, passage in texts]
        whole = np.array(rerank_server.score_all(engine, pairs))
        engine.overlap_scale = 0.0
        added = whole - np.array(rerank_server.score_all(engine, pairs))
    finally:
        engine.close()
    if not scale:
        pytest.skip(f"{MINI} was made by an older version: `make mini` makes it again")
    expected = [scale * overlap(job.pairs, *text, engine.first_piece_id) for text in texts]
    assert max(expected) - min(expected) > 0.5 * scale
    np.testing.assert_allclose(added, expected, rtol=0, atol=SAME_SUM)


def test_a_vocabulary_in_another_order_adds_nothing(engine_of: EngineOf) -> None:
    """Ranks that are no ranks would weigh words by chance."""
    engine = engine_of("bi")
    assert isinstance(engine, rerank_server.EmbeddingEngine)
    assert engine.overlap_scale == 0
