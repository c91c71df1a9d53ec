"""Which type to make when nobody said: the fastest on this CPU among those whose drift is small.

The order of the types differs from CPU to CPU, up to sixfold (an instruction set has tiled kernels for some and none
for others), so it is measured: each candidate scores a few of the built-in pairs, in turn, and its best round counts.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .quantize import SIX_BIT, Quantization
from .samples import SAMPLES
from .verify import CLEAR_MARGIN, Report, markdown, score_samples

# A type that nobody asked for may drift no more than six bits are allowed to, whatever its own family's limit.
DRIFT_LIMIT = SIX_BIT
ROUNDS = 3
TIMED = SAMPLES[:8]
# Speeds of one machine differ by this much between two measurements; within it the more exact type is taken.
SAME_SPEED = 0.05


@dataclass(frozen=True)
class Candidate:
    quantization: Quantization
    report: Report
    tokens_per_second: float

    @property
    def drift(self) -> float:
        return self.report.comparison.drift if self.report.comparison else 0.0

    @property
    def verdict(self) -> str:
        """Why it cannot be chosen; "" when it can."""
        return self.report.problem or (f"drift over {DRIFT_LIMIT}" if self.drift > DRIFT_LIMIT else "")


def measure(parts: Mapping[Quantization, Path], reports: Mapping[Quantization, Report]) -> list[Candidate]:
    """Scores with each file ROUNDS times, in turn. Raises ConvertError when the server refuses one."""
    best = dict.fromkeys(parts, 0.0)
    for number in range(ROUNDS):
        for quantization in list(parts)[:: -1 if number % 2 else 1]:
            scored = score_samples(parts[quantization], TIMED, accel="auto")  # as it will be served
            best[quantization] = max(best[quantization], scored.n_tokens / max(scored.seconds, 1e-9))
    return [Candidate(quantization, reports[quantization], best[quantization]) for quantization in parts]


def choose(candidates: Sequence[Candidate], default: Quantization) -> Candidate:
    """The fastest within the limit, or a more exact one that is as fast.

    Where the logits are noise (an untrained model) drift says nothing, and `default` is taken; where no type is within
    the limit, the one that drifts least.
    """
    usable = [candidate for candidate in candidates if not candidate.report.problem] or list(candidates)
    if any(candidate.report.comparison and candidate.report.comparison.margin < CLEAR_MARGIN for candidate in usable):
        return next((candidate for candidate in usable if candidate.quantization is default), usable[0])
    within = [candidate for candidate in usable if not candidate.verdict]
    if not within:
        return min(usable, key=lambda candidate: candidate.drift)
    fast = (1 - SAME_SPEED) * max(candidate.tokens_per_second for candidate in within)
    return min((candidate for candidate in within if candidate.tokens_per_second >= fast), key=lambda one: one.drift)


def table(candidates: Sequence[Candidate], chosen: Candidate) -> str:
    """Markdown: what it was chosen from."""
    rows = [
        (one.quantization.name, f"{one.report.file_bytes / 1e6:,.1f}", f"{one.tokens_per_second:,.0f}",
         f"{one.drift:.4f}", "chosen" if one is chosen else one.verdict)
        for one in candidates
    ]  # fmt: skip
    return markdown(("quantisation", "MB", "tokens/s here", f"drift (limit {DRIFT_LIMIT})", ""), rows)


def record(path: Path, candidates: Sequence[Candidate], chosen: Candidate) -> None:
    """JSON beside the file, not in it: two runs make the same GGUF, but never the same speeds."""
    rows: list[dict[str, Any]] = [
        {"quantization": one.quantization.name, "file_bytes": one.report.file_bytes, "drift": round(one.drift, 4),
         "tokens_per_second": round(one.tokens_per_second, 1), "verdict": one.verdict}
        for one in candidates
    ]  # fmt: skip
    content = {"chosen": chosen.quantization.name, "drift_limit": DRIFT_LIMIT, "cpu": cpu_name(), "candidates": rows}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
