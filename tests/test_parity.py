"""Logits equal the reference's, and a pair's score does not depend on what is scored beside it.

Tiny checkpoints with visible spread (tests/checkpoints.py), float32 GGUF against transformers in float32.
"""
from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import ARCHITECTURES, EngineOf, Gguf
from golden.inputs import SCORED_PAIRS, ScoredPair

import rerank_server

# Logits, in units of the logit. llama.cpp's flash attention keeps K and V in float16 (relative step 5e-4) and sums in
# another order than torch; facts measured on these checkpoints stay below half of this.
LOGIT_TOLERANCE = 0.01
# Cosines are between -1 and 1 and averaged over tokens, so the same rounding shows less.
COSINE_TOLERANCE = 0.001
# The same pair in another company: only the order of sums in matrix products of another size differs, and in attention
# the split of the keys into blocks. A mask that leaks from a neighbour changes logits by tenths.
BATCH_TOLERANCE = 0.005
UBATCHES = (64, 128, 512)


def reference_logits(engine: rerank_server.LlamaEngine, answers: dict[str, Any]) -> npt.NDArray[np.float64]:
    """The golden logits; for the bi-encoder, whose golden values are cosines, in the units of its own line."""
    values = np.array(answers["logits"])
    if engine.kind == "bi-encoder":
        values = engine.description.cosine_scale * values + engine.description.cosine_bias
    return values


def make_pairs(engine: rerank_server.LlamaEngine, scored: list[ScoredPair]) -> list[rerank_server.Pair]:
    return [engine.pairs.make(pair.query, [pair.passage], pair.max_length)[0] for pair in scored]


def tolerance_of(engine: rerank_server.LlamaEngine) -> float:
    if engine.kind == "bi-encoder":
        return COSINE_TOLERANCE * engine.description.cosine_scale
    return LOGIT_TOLERANCE


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_equal_the_reference(architecture: str, golden: dict[str, Any], engine_of: EngineOf) -> None:
    engine = engine_of(architecture)
    expected = reference_logits(engine, golden[architecture])
    logits = np.array(engine.score(make_pairs(engine, SCORED_PAIRS)))
    assert np.ptp(expected) > 100 * tolerance_of(engine), "the checkpoint's logits are too alike to tell anything"
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance_of(engine))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ranks_equal_the_reference(architecture: str, golden: dict[str, Any], engine_of: EngineOf) -> None:
    """Two pairs that the reference tells apart by more than the tolerance come out in its order."""
    engine = engine_of(architecture)
    expected = reference_logits(engine, golden[architecture])
    logits = np.array(engine.score(make_pairs(engine, SCORED_PAIRS)))
    apart = expected[:, None] - expected[None, :] > 2 * tolerance_of(engine)
    assert apart.sum() > 400  # of 37 * 36 / 2 = 666 pairs of pairs
    assert np.all((logits[:, None] > logits[None, :])[apart])


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=UBATCHES)
def packed_engine(architecture: str, request: pytest.FixtureRequest, gguf_of: Gguf) -> Iterator[Any]:
    settings = rerank_server.Settings(max_length=512, ubatch=request.param)
    engine = rerank_server.load_engine(gguf_of(architecture), settings)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def logits_alone(architecture: str, gguf_of: Gguf) -> list[float]:
    """Each pair in a decode of its own."""
    engine = rerank_server.load_engine(gguf_of(architecture), rerank_server.Settings(max_length=512))
    logits = [engine.score([pair])[0] for pair in make_pairs(engine, SCORED_PAIRS)]
    engine.close()
    return logits


def test_a_score_does_not_depend_on_its_company(packed_engine: Any, logits_alone: list[float]) -> None:
    """Among others, in any order, repeated, at any ubatch: the score that a pair has alone."""
    pairs = make_pairs(packed_engine, SCORED_PAIRS)
    order = [*range(len(pairs)), *range(0, len(pairs), 3)]
    random.Random(7).shuffle(order)
    logits = packed_engine.score([pairs[n] for n in order])
    scale = packed_engine.description.cosine_scale if packed_engine.kind == "bi-encoder" else 1.0
    np.testing.assert_allclose(logits, [logits_alone[n] for n in order], rtol=0, atol=BATCH_TOLERANCE * scale)
