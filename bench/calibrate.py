"""Makes a score a probability: `python -m bench.calibrate SYSTEM --data DIR --out FILE.gguf`.

SYSTEM is a GGUF file, or mini, m3 or gemma (the file that the server would take), DIR a collection in BEIR's layout
or a folder of such. The candidates of its queries are scored (bench.quality says where they come from), and a logistic
map, probability = 1 / (1 + exp(-(scale * logit + bias))), is fitted to the judgements by maximum likelihood. What is
not judged counts as irrelevant. FILE.gguf is a copy of SYSTEM's file that holds the map (rerank.calibration_scale and
rerank.calibration_bias): served in SYSTEM's place, a score of 0.5 means that half of the candidates with that score are
relevant, among candidates like those in DIR.

--negatives N scores only so many irrelevant candidates of each query, and weights them for those left out. --balanced
weighs relevant and irrelevant ones the same, whatever their share: 0.5 is then where both would be equally likely, were
both equally frequent. This is how mini's own curve was made (convert/models.py).

Expected calibration error (Guo et al. 2017; 15 bins of equal width): the mean distance between score and share of
relevant ones. "after" is measured on queries that were not fitted on (5 folds); what is written is fitted on all of
them. FILE.json has all of this, FILE.png is the reliability plot.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize, special
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rerank_server
from bench import beir, quality, report
from bench.metrics import FloatArray
from convert.errors import ConvertError
from convert.gguf_file import GgufFile

ROOT = Path(__file__).resolve().parent.parent
SCALE, BIAS = "rerank.calibration_scale", "rerank.calibration_bias"
N_BINS = 15
N_FOLDS = 5
SEED = 20260101


@dataclass(frozen=True)
class Judged:
    """Scored pairs. x: logits. y: 1 relevant, 0 not. weight: adds up to the number of pairs. query: its number."""

    x: FloatArray
    y: FloatArray
    weight: FloatArray
    query: FloatArray

    def where(self, rows: Any) -> Judged:
        return Judged(self.x[rows], self.y[rows], self.weight[rows], self.query[rows])


@dataclass(frozen=True)
class Bin:
    """Of the pairs with a score in one interval: the mean score, the share of relevant ones, the part of the weight."""

    score: float
    relevant: float
    part: float


# --- fitting --------------------------------------------------------------------------------------------------------


def fit(judged: Judged) -> tuple[float, float]:
    """(scale, bias) of the likeliest logistic curve. The targets are not 1 and 0 but what Platt (1999) takes, (n + 1) /
    (n + 2) and 1 / (n + 2), so that logits which part the two kinds perfectly have a finite answer."""
    n_relevant = float((judged.weight * judged.y).sum())
    n_others = float(judged.weight.sum()) - n_relevant
    target = np.where(judged.y == 1, (n_relevant + 1) / (n_relevant + 2), 1 / (n_others + 2))
    center, spread = float(judged.x.mean()), float(judged.x.std()) or 1.0
    z, weight = (judged.x - center) / spread, judged.weight / judged.weight.sum()

    def loss(parameters: FloatArray) -> tuple[float, FloatArray]:
        activation = parameters[0] * z + parameters[1]
        error = weight * (special.expit(activation) - target)
        value = float((weight * (np.logaddexp(0, activation) - target * activation)).sum())
        return value, np.array([(error * z).sum(), error.sum()])

    slope, level = optimize.minimize(loss, np.zeros(2), jac=True, method="BFGS").x
    return float(slope / spread), float(level - slope * center / spread)


def bins_of(scores: FloatArray, judged: Judged) -> list[Bin]:
    """Those that hold a pair."""
    place = np.minimum((scores * N_BINS).astype(int), N_BINS - 1)
    weights = [(rows, judged.weight[rows]) for rows in (place == number for number in range(N_BINS)) if rows.any()]
    return [
        Bin(float(np.average(scores[rows], weights=weight)), float(np.average(judged.y[rows], weights=weight)),
            float(weight.sum() / judged.weight.sum()))
        for rows, weight in weights
    ]  # fmt: skip


def calibration_error(bins: Sequence[Bin]) -> float:
    return sum(one.part * abs(one.score - one.relevant) for one in bins)


def unseen_scores(judged: Judged) -> FloatArray:
    """Each pair's score by a map that was fitted on other queries."""
    scores = np.empty_like(judged.x)
    for fold in range(N_FOLDS):
        rows = judged.query % N_FOLDS == fold
        if rows.any():
            scale, bias = fit(judged.where(~rows))
            scores[rows] = special.expit(scale * judged.x[rows] + bias)
    return scores


# --- pairs ----------------------------------------------------------------------------------------------------------


def judge(scorer: quality.FileScorer, tasks: Sequence[quality.Task], negatives: int | None, balanced: bool) -> Judged:
    """All tasks' pairs, each collection with the same weight. Raises DataError where one kind is missing."""
    rows: list[tuple[float, float, float, float]] = []
    n_queries = 0
    for task in tasks:
        own = [(logit, relevant, weight, number) for number, query in enumerate(tqdm(task.queries, desc=task.name))
               for logit, relevant, weight in pairs_of(scorer, task, query, negatives)]  # fmt: skip
        weights = np.array([weight for _, _, weight, _ in own])
        relevant = np.array([relevant for _, relevant, _, _ in own])
        if not 0 < relevant.sum() < len(relevant):
            raise beir.DataError(f"{task.name}: its candidates must hold relevant and irrelevant documents")
        if balanced:
            weights = np.where(relevant == 1, 0.5 / weights[relevant == 1].sum(), 0.5 / weights[relevant == 0].sum())
        weights /= weights.sum()
        rows += [(row[0], row[1], weight, row[3] + n_queries) for row, weight in zip(own, weights, strict=True)]
        n_queries += len(task.queries)
    table = np.array(rows)
    return Judged(table[:, 0], table[:, 1], table[:, 2] * len(table) / len(tasks), table[:, 3])


def pairs_of(
    scorer: quality.FileScorer, task: quality.Task, query: str, negatives: int | None
) -> Iterator[tuple[float, float, float]]:
    """(logit, relevant, weight) of the query's candidates."""
    grades = task.collection.judgements[query]
    candidates = task.candidates[query][: task.top_k]
    relevant = [key for key in candidates if grades.get(key, 0) > 0]
    others = [key for key in candidates if grades.get(key, 0) <= 0]
    n_others = len(others)
    if negatives is not None:
        others = random.Random(f"{SEED} {query}").sample(others, min(negatives, n_others))
    texts = [task.collection.corpus[key] for key in relevant + others]
    logits = scorer.logits(task.collection.queries[query], texts) if texts else []
    for place, logit in enumerate(logits):
        is_relevant = place < len(relevant)
        yield logit, float(is_relevant), 1.0 if is_relevant else n_others / len(others)


# --- the report -----------------------------------------------------------------------------------------------------


def result_of(scorer: quality.FileScorer, judged: Judged, about: dict[str, Any]) -> dict[str, Any]:
    """The JSON file. Raises UnusableError where logits do not rise with relevance."""
    scale, bias = fit(judged)
    if scale <= 0:
        raise quality.UnusableError("relevant candidates have no higher logits than others: nothing to calibrate")
    before, after = bins_of(special.expit(judged.x), judged), bins_of(unseen_scores(judged), judged)
    model = scorer.engine.description
    line = {}
    if isinstance(scorer.engine, rerank_server.EmbeddingEngine):  # what convert/models.py would hold
        own = scorer.engine
        line = {"cosine_scale": scale * own.cosine_scale, "overlap_scale": scale * own.overlap_scale,
                "cosine_bias": scale * own.cosine_bias + bias}  # fmt: skip
    return {
        "file": model.path.name, "kind": model.kind, "quantization": model.quantization,
        "file_bytes": model.file_bytes, "scale": scale, "bias": bias, **line,
        "pairs": len(judged.x), "queries": len(np.unique(judged.query)),
        "relevant_part": float(np.average(judged.y, weights=judged.weight)),
        "expected_calibration_error": {"before": calibration_error(before), "after": calibration_error(after)},
        "reliability": {"before": [vars(one) for one in before], "after": [vars(one) for one in after]}, **about,
    }  # fmt: skip


def text_of(result: dict[str, Any]) -> str:
    error = result["expected_calibration_error"]
    lines = [
        f"{result['file']}: {result['pairs']:,} pairs of {result['queries']:,} queries, {result['relevant_part']:.1%} "
        "of the weight on relevant ones",
        f"  probability = sigmoid({result['scale']:.4f} * logit {result['bias']:+.4f})",
        f"  expected calibration error: {error['before']:.4f} before, {error['after']:.4f} after (on unseen queries)",
    ]
    if "cosine_scale" in result:
        scale, overlap, bias = result["cosine_scale"], result["overlap_scale"], result["cosine_bias"]
        lines.append(f"  of what is below it: sigmoid({scale:.3f} * cosine {overlap:+.3f} * overlap {bias:+.3f})")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Reliability: share of relevant ones by score; the area of a point is the part of the pairs that it stands for."""
    pyplot = report.import_pyplot()
    if pyplot is None:
        return
    figure, axis = pyplot.subplots(figsize=(5, 5))
    axis.plot([0, 1], [0, 1], color="tab:gray", linewidth=1)
    for name, color in (("before", "tab:gray"), ("after", "tab:blue")):
        bins = result["reliability"][name]
        score, relevant, part = ([one[key] for one in bins] for key in ("score", "relevant", "part"))
        error = result["expected_calibration_error"][name]
        axis.plot(score, relevant, color=color, alpha=0.5)
        axis.scatter(score, relevant, s=[20 + 300 * value for value in part], color=color,
                     label=f"{name}: expected calibration error {error:.3f}")  # fmt: skip
    axis.set_xlabel("score")
    axis.set_ylabel("share of relevant candidates")
    axis.set_title(result["file"], fontsize=10)
    axis.legend(fontsize=8)
    report.save(figure, pyplot, path)


def check_out(out: Path, model: rerank_server.ModelDescription) -> None:
    """Before the long work. Raises UnusableError where --out names a file that this program did not make."""
    if out.suffix != ".gguf" or (out.exists() and out.samefile(model.path)):
        raise quality.UnusableError(f"--out {out}: a calibrated copy is another file, and its name ends in .gguf")
    if out.exists() and SCALE not in GgufFile.open(out).metadata:
        raise quality.UnusableError(f"--out {out}: there is a file already that is no calibrated copy")


def write(result: dict[str, Any], model: Path, out: Path) -> None:
    """The copy of the model's file with the map in it, and the report beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.part")
    try:
        GgufFile.open(model).copy_with(part, {SCALE: result["scale"], BIAS: result["bias"]})
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(result, out.with_suffix(".png"))


def parser() -> argparse.ArgumentParser:
    assert __doc__
    parser = argparse.ArgumentParser(
        prog="python -m bench.calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("system", metavar="SYSTEM", help="a GGUF file, or mini, m3 or gemma")
    quality.add_data_arguments(parser)
    parser.add_argument("--negatives", type=int, metavar="N", help="irrelevant candidates of each query (default: all)")
    parser.add_argument("--balanced", action="store_true", help="both kinds weigh the same")
    parser.add_argument("--out", type=Path, metavar="FILE.gguf", help="default: build/NAME-calibrated.gguf")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Raises ConvertError, and what bench.quality.USER_ERRORS lists."""
    settings = quality.settings_of(arguments)
    tasks = quality.make_tasks(arguments)
    scorer = quality.find_system(arguments.system, settings, 0).open()
    try:
        if not isinstance(scorer, quality.FileScorer):
            raise quality.UnusableError(f"{arguments.system!r}: a calibration is fitted for one GGUF file")
        model = scorer.engine.description
        out = arguments.out or ROOT / "build" / f"{model.name}-calibrated.gguf"
        check_out(out, model)
        judged = judge(scorer, tasks, arguments.negatives, arguments.balanced)
        about = {"collections": [task.about() for task in tasks], "balanced": arguments.balanced,
                 "negatives": arguments.negatives}  # fmt: skip
        result = result_of(scorer, judged, about)
        write(result, model.path, out)
        flag = "--gemma" if model.kind == rerank_server.YES_LOGIT else "--m3"
        print(f"{text_of(result)}\n  {out}: start the server with {flag} {out}")
    finally:
        scorer.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 fitted, 1 something given could not be used."""
    arguments = parser().parse_args(argv)
    try:
        run(arguments)
    except (*quality.USER_ERRORS, ConvertError) as error:
        print(f"bench.calibrate: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
