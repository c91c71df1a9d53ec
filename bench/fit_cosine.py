"""Fits the two constants that turn the mini model's cosine into a score: `python -m bench.fit_cosine FILE.gguf DATA`.

DATA holds pairs of files NAME.passages.jsonl.gz `{id, text}` and NAME.questions.jsonl.gz `{query, positives: [id]}`.
From each set, QUESTIONS_PER_SET questions are drawn with a fixed seed. Their candidates are what a reranker would see:
the positives, and NEGATIVES others drawn from BM25's best CANDIDATES. A logistic curve
score = 1 / (1 + exp(-(scale * cosine + bias))) is fitted by maximum likelihood (Newton), with both classes weighted
equally and every set equally: 0.5 then is where a relevant and an irrelevant candidate are equally likely.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rerank_server

QUESTIONS_PER_SET = 120
CANDIDATES = 100
NEGATIVES = 4
SEED = 20260101
FloatArray = npt.NDArray[np.float64]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def candidates(passages: dict[Any, str], questions: list[dict[str, Any]]) -> Iterator[tuple[str, list[str], list[int]]]:
    """(query, texts, labels) for each question: its positives, then some of BM25's other candidates."""
    generator = random.Random(SEED)
    ids = list(passages)
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(passages.values()), show_progress=False), show_progress=False)
    for question in questions:
        positives = [passage for passage in question["positives"] if passage in passages][:2]
        tokens = bm25s.tokenize([question["query"]], show_progress=False)
        best = index.retrieve(tokens, k=min(CANDIDATES, len(ids)), show_progress=False).documents[0]
        others = [ids[row] for row in best if ids[row] not in question["positives"]]
        negatives = generator.sample(others, min(NEGATIVES, len(others)))
        chosen = positives + negatives
        yield question["query"], [passages[key] for key in chosen], [1] * len(positives) + [0] * len(negatives)


def cosines(engine: rerank_server.LlamaEngine, query: str, texts: list[str]) -> list[float]:
    description = engine.description
    logits = engine.score(engine.pairs.make(query, texts))
    return [(logit - description.cosine_bias) / description.cosine_scale for logit in logits]


def fit_logistic(x: FloatArray, y: FloatArray, weight: FloatArray) -> tuple[float, float]:
    """Scale and bias of the weighted maximum-likelihood logistic curve, by Newton's method."""
    design = np.stack([x, np.ones_like(x)], axis=1)
    parameters = np.zeros(2)
    for _ in range(50):
        probability = 1 / (1 + np.exp(-design @ parameters))
        gradient = design.T @ (weight * (y - probability))
        hessian = (design * (weight * probability * (1 - probability))[:, None]).T @ design
        parameters += np.linalg.solve(hessian, gradient)
    return float(parameters[0]), float(parameters[1])


def collect(engine: rerank_server.LlamaEngine, data: Path) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Cosines, labels and weights over all sets in the folder."""
    generator = random.Random(SEED)
    rows: list[tuple[float, int, float]] = []
    for path in tqdm(sorted(data.glob("*.passages.jsonl.gz"))):
        passages = {row["id"]: row["text"] for row in read_jsonl(path)}
        questions = read_jsonl(path.with_name(path.name.replace(".passages.", ".questions.")))
        chosen = generator.sample(questions, min(QUESTIONS_PER_SET, len(questions)))
        found = [
            (cosine, label)
            for query, texts, labels in candidates(passages, chosen)
            for cosine, label in zip(cosines(engine, query, texts), labels, strict=True)
        ]  # fmt: skip
        counts = [sum(label == kind for _, label in found) for kind in (0, 1)]
        rows += [(cosine, label, 1 / counts[label]) for cosine, label in found]
    table = np.array(rows)
    return table[:, 0], table[:, 1], table[:, 2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fit_cosine", description=__doc__)
    parser.add_argument("file", type=Path, help="GGUF of a bi-encoder")
    parser.add_argument("data", type=Path, help="folder with the training sets")
    arguments = parser.parse_args()
    engine = rerank_server.load_engine(arguments.file, rerank_server.Settings())
    cosine, label, weight = collect(engine, arguments.data)
    engine.close()
    scale, bias = fit_logistic(cosine, label, weight)
    right = np.average((scale * cosine + bias > 0) == (label == 1), weights=weight)
    print(f"{len(cosine):,} pairs: scale {scale:.3f}, bias {bias:.3f}; {right:.1%} on the right side of 0.5")
    print(f"mean cosine: relevant {np.average(cosine[label == 1], weights=weight[label == 1]):.3f}, "
          f"not {np.average(cosine[label == 0], weights=weight[label == 0]):.3f}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
