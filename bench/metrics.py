"""Measures of a ranking, and whether two systems differ in them.

A document without a judgement counts as irrelevant, as in trec_eval and BEIR.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from bench.beir import Judgements, Run

FloatArray = npt.NDArray[np.float64]
DEPTH = 10
N_RESAMPLES = 9999
CONFIDENCE = 0.95
SEED = 20260101


def ndcg(documents: Sequence[str], grades: dict[str, int], depth: int = DEPTH) -> float:
    """Linear gains and log2 discounts, divided by the best possible (Järvelin and Kekäläinen 2002; as trec_eval)."""
    gains = [max(0, grades.get(document, 0)) for document in documents[:depth]]
    ideal = sorted((max(0, grade) for grade in grades.values()), reverse=True)[:depth]
    return _discounted(gains) / _discounted(ideal) if any(ideal) else 0.0


def _discounted(gains: Sequence[int]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))


def reciprocal_rank(documents: Sequence[str], grades: dict[str, int], depth: int = DEPTH) -> float:
    """1 / rank of the first relevant document, 0 where none is among the first `depth`."""
    ranks = (rank for rank, document in enumerate(documents[:depth], 1) if grades.get(document, 0) > 0)
    return next((1 / rank for rank in ranks), 0.0)


def recall(documents: Sequence[str], grades: dict[str, int], depth: int = DEPTH) -> float:
    """The part of the relevant documents that is among the first `depth`."""
    relevant = {document for document, grade in grades.items() if grade > 0}
    return len(relevant.intersection(documents[:depth])) / len(relevant) if relevant else 0.0


MEASURES: dict[str, Callable[[Sequence[str], dict[str, int]], float]] = {
    "ndcg_at_10": ndcg, "mrr_at_10": reciprocal_rank, "recall_at_10": recall,
}  # fmt: skip


def measure(run: Run, judgements: Judgements, queries: Sequence[str]) -> dict[str, FloatArray]:
    """Measure -> its value for each query, in their order; a query that the run lacks has 0."""
    return {
        name: np.array([function(run.get(query, []), judgements[query]) for query in queries])
        for name, function in MEASURES.items()
    }


@dataclass(frozen=True)
class Difference:
    """mean: of the sets' mean differences. low, high: the bounds of its 95 % confidence interval. p: two-sided."""

    mean: float
    low: float
    high: float
    p: float


def compare(ours: Sequence[FloatArray], theirs: Sequence[FloatArray]) -> Difference:
    """Two systems over the same queries; one array of values for each set, and every set weighs the same.

    p: the paired randomisation test (how often swapping the two systems' values query by query gives a difference as
    large), which assumes nothing of how they are distributed; nDCG's per-query differences are mostly zeros and far
    from normal, so a t-test is only nearly right, and a Wilcoxon test answers another question (Smucker, Allan and
    Carterette 2007). Interval: bootstrap over the queries within each set. p is not corrected for many comparisons.
    """
    differences = [mine - other for mine, other in zip(ours, theirs, strict=True)]
    mean = float(np.mean([values.mean() for values in differences]))
    generator = np.random.default_rng(SEED)
    resampled = [_resampled_means(values, generator) for values in differences]
    low, high = np.quantile(np.mean(resampled, axis=0), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Difference(mean, float(low), float(high), _randomisation_p(differences, generator))


def _resampled_means(values: FloatArray, generator: np.random.Generator) -> FloatArray:
    rows = generator.integers(len(values), size=(N_RESAMPLES, len(values)))
    return np.asarray(values[rows].mean(axis=1))


def _randomisation_p(differences: Sequence[FloatArray], generator: np.random.Generator) -> float:
    """1.0 where the systems differ in one query or in none: either sign of it is as likely."""
    weighted = np.concatenate([values / len(values) for values in differences])
    changed = weighted[weighted != 0]
    if len(changed) < 2:
        return 1.0
    # one sample and its negation: permuting the pairs is flipping signs
    test: Any = stats.permutation_test(
        (changed, np.zeros_like(changed)), lambda a, b, axis: np.sum(a - b, axis=axis), permutation_type="samples",
        vectorized=True, n_resamples=N_RESAMPLES, rng=generator,
    )  # fmt: skip
    return float(test.pvalue)
