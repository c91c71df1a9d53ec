"""python -m convert.verify FILE.gguf [--against CHECKPOINT] [--reference]: is this file right, and how far from exact?

Reopens the file, checks its structure and values, has rerank_server.py --check score the built-in pairs (the very code
that serves them, in its own process), and compares token ids with the reference tokenizer's and logits with the F16
file's. `python -m convert` does the same before a file gets its name.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CannotStartError, ConvertError, check_names
from .gguf_file import GgufFile
from .job import Job
from .models import ROOT
from .quantize import QUANTIZATIONS
from .reference import PromptParts, ReferencePairs, transformers_logits
from .samples import SAMPLES, Sample
from .tensors import Tensor
from .write import disk_error

SERVER = ROOT / "rerank_server.py"
ACCEL_LIBRARY = ROOT / "accel" / "lib" / "librerank_accel.so"
# A trained reranker puts the built-in relevant passages more than this many logits above the irrelevant ones, on
# average (the two MiniLM models: 2.1 and 2.4; random weights: under 0.3). Below it the logits are noise, and no limit
# is applied to how quantising changes them.
CLEAR_MARGIN = 1.0
# Below this mean difference of logits a file passes whatever its drift: a score changes by less than 0.005 (a quarter
# of it, the sigmoid's steepest slope). It matters where all logits are nearly equal, as with random weights.
NEGLIGIBLE_DIFFERENCE = 0.02


@dataclass(frozen=True)
class Scored:
    """What the server's check made of the sample pairs. seconds: of scoring alone."""

    ids: list[list[int]]
    logits: list[float]
    n_tokens: int
    seconds: float
    rss_bytes: int


@dataclass(frozen=True)
class Comparison:
    """Differences of logits from the F16 file's, over the sample pairs.

    drift: mean difference divided by the standard deviation of the F16 logits, so that it means the same for every
    model; limit: what it may be for this quantisation. margin: logits by which the F16 file puts relevant passages
    above irrelevant ones, on average.
    """

    max_difference: float
    mean_difference: float
    drift: float
    limit: float
    kendall_tau: float
    margin: float

    @property
    def passed(self) -> bool:
        return (
            self.drift <= self.limit
            or self.mean_difference <= NEGLIGIBLE_DIFFERENCE
            or self.margin < CLEAR_MARGIN
        )


@dataclass(frozen=True)
class Report:
    """One file's line of the table. n_equal: sample pairs whose token ids are the reference's (None: not compared)."""

    name: str
    quantization: str
    file_bytes: int
    scored: Scored
    n_equal: int | None
    comparison: Comparison | None

    @property
    def problem(self) -> str:
        """Why the file must not be used; "" when it is good."""
        n_pairs = len(self.scored.logits)
        if self.n_equal is not None and self.n_equal < n_pairs:
            return f"{n_pairs - self.n_equal} of {n_pairs} pairs have other token ids than the reference"
        if self.comparison and not self.comparison.passed:
            limit = f"the limit of {self.comparison.limit} for {self.quantization}"
            return f"drift {self.comparison.drift:.3f} is over {limit}"
        return ""

    def verification(self) -> dict[str, Any]:
        """For rerank.verification: what does not change from run to run, so that files stay byte-identical."""
        result: dict[str, Any] = {"pairs": len(self.scored.logits), "token_ids_equal": self.n_equal}
        if self.comparison:
            values = vars(self.comparison).items()
            result |= {"against": "F16", **{key: round(value, 4) for key, value in values}}
        return result


def score_samples(path: Path, samples: Sequence[Sample] = SAMPLES, accel: str = "off") -> Scored:
    """Scores with `rerank_server.py --check`. Raises ConvertError with its one line when it refuses the file.

    accel: the server's --accel; a file is judged without the int8 engine.
    """
    if not SERVER.is_file():
        raise CannotStartError(f"{SERVER} is missing: files are verified by the server's own code")
    lines = "".join(json.dumps({"query": sample.query, "passage": sample.passage}) + "\n" for sample in samples)
    # a RERANK_ variable of the user's own server must not change what is measured here
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RERANK_")}
    environment["RERANK_ACCEL"] = accel
    command = [sys.executable, str(SERVER), "--check", str(path), "--pairs", "-"]
    done = subprocess.run(command, input=lines.encode(), capture_output=True, env=environment, check=False)
    if done.returncode:
        reason = done.stderr.decode("utf-8", "replace").strip().split("\n")[-1]
        raise ConvertError(f"{path.name}: the server refuses it: {reason or f'ended with {done.returncode}'}")
    return _parse_scores(path, done.stdout.decode(), len(samples))


def _parse_scores(path: Path, output: str, n_pairs: int) -> Scored:
    *pairs, last = [json.loads(line) for line in output.splitlines()]
    logits = [float(pair["logit"]) for pair in pairs]
    if len(logits) != n_pairs or not all(map(math.isfinite, logits)):
        raise ConvertError(f"{path.name}: {len(logits)} logits for {n_pairs} pairs, or one that is not finite")
    summary = last["summary"]
    ids = [list(pair["ids"]) for pair in pairs]
    return Scored(ids, logits, summary["n_tokens"], summary["seconds"], summary["rss_bytes"])


def compare(logits: Sequence[float], reference: Sequence[float], limit: float) -> Comparison:
    """logits, reference: of SAMPLES, in their order; those of further pairs are left out."""
    logits, reference = logits[: len(SAMPLES)], reference[: len(SAMPLES)]
    differences = [abs(left - right) for left, right in zip(logits, reference, strict=True)]
    mean = statistics.fmean(differences)
    spread = statistics.pstdev(reference)
    drift = mean / spread if spread else (math.inf if mean else 0.0)
    tau = kendall_tau(logits, reference)
    return Comparison(max(differences), mean, drift, limit, tau, relevance_margin(reference))


def relevance_margin(logits: Sequence[float], samples: Sequence[Sample] = SAMPLES) -> float:
    """Mean logit of the relevant passages minus that of the irrelevant ones. logits: of samples, and any others."""
    pairs = list(zip(logits[: len(samples)], samples, strict=True))
    relevant, irrelevant = (
        statistics.fmean(logit for logit, sample in pairs if sample.relevant is wanted)
        for wanted in (True, False)
    )
    return relevant - irrelevant


def kendall_tau(left: Sequence[float], right: Sequence[float]) -> float:
    """Kendall's tau-b: 1 for the same order, -1 for the reverse; 1 too when both are all ties."""
    concordant, left_ties, right_ties, n_pairs = 0, 0, 0, 0
    for (a, b), (c, d) in itertools.combinations(zip(left, right, strict=True), 2):
        concordant += _sign(a - c) * _sign(b - d)
        left_ties, right_ties, n_pairs = left_ties + (a == c), right_ties + (b == d), n_pairs + 1
    scale = math.sqrt((n_pairs - left_ties) * (n_pairs - right_ties))
    return concordant / scale if scale else float(left_ties == right_ties)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def check_structure(path: Path, tensors: Sequence[Tensor] = ()) -> GgufFile:
    """Reopens a file. Raises ConvertError: damaged, a tensor missing or of another shape, NaN, no rerank.* keys."""
    file = GgufFile.open(path)
    for key in ("general.architecture", "rerank.kind", "rerank.quantization", "rerank.check_ids"):
        if not file.metadata.get(key):
            raise ConvertError(f"{path.name}: its metadata has no {key}; make it with: python -m convert")
    for tensor in tensors:
        stored = file.tensors.get(tensor.name)
        if stored is None or _squeezed(stored.shape) != _squeezed(tensor.shape):
            raise ConvertError(f"{path.name}: tensor {tensor.name} is missing or has another shape")
    if tensors and len(file.tensors) != len(tensors):
        raise ConvertError(f"{path.name}: {len(file.tensors)} tensors in it, expected {len(tensors)}")
    file.check_values()
    return file


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """llama.cpp writes a matrix of one row as a vector."""
    return shape[1:] if len(shape) == 2 and shape[0] == 1 else shape


def examine(path: Path, name: str, file: GgufFile, expected_ids: Sequence[Sequence[int]] | None,
            reference: Sequence[float] | None, scored: Scored | None = None,
            samples: Sequence[Sample] = SAMPLES) -> Report:  # fmt: skip
    """Scores a file and compares. expected_ids: the reference's; reference: the F16 file's logits; None: unknown."""
    scored = scored or score_samples(path, samples)
    quantization = str(file.metadata["rerank.quantization"])
    limit = QUANTIZATIONS[quantization].drift_limit if quantization in QUANTIZATIONS else math.inf
    equal = None
    if expected_ids is not None:
        equal = sum(list(made) == list(expected) for made, expected in zip(scored.ids, expected_ids, strict=True))
    comparison = compare(scored.logits, reference, limit) if reference is not None else None
    return Report(name, quantization, path.stat().st_size, scored, equal, comparison)


def expected_ids(pairs: ReferencePairs, samples: Sequence[Sample] = SAMPLES) -> list[list[int]]:
    """The reference's ids of the sample pairs; 1,024 is the length at which the server cuts unless told otherwise."""
    return [pairs.ids(sample.query, sample.passage, 1024) for sample in samples]


# -- tables ---------------------------------------------------------------------------------------------------------


def summary_table(reports: Iterable[Report]) -> str:
    """Markdown: one line a file."""
    header = ("file", "quantisation", "MB", "token ids equal", "max diff", "mean diff", "drift (limit)", "Kendall tau",
              "tokens/s", "resident MB", "result")  # fmt: skip
    return markdown(header, [_summary_row(report) for report in reports])


def _summary_row(report: Report) -> tuple[str, ...]:
    scored, comparison = report.scored, report.comparison
    numbers: tuple[str, ...] = ("-",) * 4
    if comparison:
        is_free = comparison.margin < CLEAR_MARGIN or math.isinf(comparison.limit)
        limit = "no limit" if is_free else comparison.limit
        numbers = (f"{comparison.max_difference:.4f}", f"{comparison.mean_difference:.4f}",
                   f"{comparison.drift:.4f} ({limit})", f"{comparison.kendall_tau:.4f}")  # fmt: skip
    equal = "-" if report.n_equal is None else f"{report.n_equal}/{len(scored.logits)}"
    return (report.name, report.quantization, f"{report.file_bytes / 1e6:,.1f}", equal, *numbers,
            f"{scored.n_tokens / max(scored.seconds, 1e-9):,.0f}", f"{scored.rss_bytes / 1e6:,.0f}",
            report.problem or "good")  # fmt: skip


def logit_table(columns: dict[str, Sequence[float]], samples: Sequence[Sample] = SAMPLES) -> str:
    """Markdown: one line a pair, one column for each list of logits."""
    rows = []
    for index, sample in enumerate(samples):
        logits = (f"{column[index]:.4f}" for column in columns.values())
        rows.append((sample.language, "yes" if sample.relevant else "no", sample.query, *logits))
    return markdown(("language", "relevant", "query", *columns), rows)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# -- command --------------------------------------------------------------------------------------------------------


def sibling_f16(path: Path, quantization: str) -> Path | None:
    """models/NAME-F16.gguf beside models/NAME-Q6_K.gguf, if it is there."""
    stem = path.name.removesuffix(".gguf").removesuffix(f"-{quantization}")
    sibling = path.with_name(f"{stem}-F16.gguf")
    return sibling if sibling.is_file() else None


def f16_logits(path: Path, file: GgufFile, against: Job | None) -> tuple[list[float] | None, str]:
    """The F16 logits and where they are from: the file beside, else one made from the checkpoint and removed again."""
    sibling = sibling_f16(path, str(file.metadata["rerank.quantization"]))
    if sibling:
        return score_samples(sibling).logits, sibling.name
    if against is None:
        return None, ""
    with _scratch(path.parent) as folder:
        base = Path(folder) / "F16.gguf"
        against.write(base, half=True)
        return score_samples(base).logits, "F16, made from the checkpoint"


def _scratch(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """Beside the file, where there is room for another; in the system's own folder where that is read-only."""
    try:
        return tempfile.TemporaryDirectory(dir=folder, prefix=".verify-")
    except OSError:
        return tempfile.TemporaryDirectory(prefix="verify-")


def prompt_parts(file: GgufFile) -> PromptParts:
    """What the file says that its pairs are made with; a file without it is read with Gemma's."""
    stored = {field.name: file.metadata.get(f"rerank.{field.name}") for field in dataclasses.fields(PromptParts)}
    return PromptParts(**{name: value for name, value in stored.items() if isinstance(value, str)})


def run(path: Path, checkpoint: Path | None, with_transformers: bool) -> int:
    if with_transformers and not checkpoint:
        raise CannotStartError("--reference needs --against CHECKPOINT, the directory that the file was made from")
    file = check_structure(path)
    against = Job.open(checkpoint, parts=prompt_parts(file)) if checkpoint else None
    if against:
        file = check_structure(path, against.tensors)
    samples = against.samples if against else SAMPLES
    columns: dict[str, Sequence[float]] = {}
    if against and with_transformers:
        texts = [(sample.query, sample.passage) for sample in SAMPLES]
        columns["transformers, float32"] = transformers_logits(
            against.checkpoint, against.architecture, against.pairs, texts
        )
    reference, origin = f16_logits(path, file, against)
    if reference is not None:
        columns["F16"] = reference
    expected = expected_ids(against.pairs, samples) if against else None
    report = examine(path, path.name, file, expected, reference, samples=samples)
    columns[report.quantization if report.quantization != "F16" else "this file"] = report.scored.logits
    reports = [report]
    if ACCEL_LIBRARY.is_file():
        scored = score_samples(path, accel="on")
        columns["int8 engine"] = scored.logits
        comparison = compare(scored.logits, reference, math.inf) if reference is not None else None
        name = f"{path.name}, int8 engine"
        reports.append(Report(name, report.quantization, report.file_bytes, scored, None, comparison))
    print(logit_table(columns))
    print()
    print(summary_table(reports))
    _explain(file, report, origin, columns.get("transformers, float32"))
    return 1 if report.problem else 0


def _explain(file: GgufFile, report: Report, origin: str, exact: Sequence[float] | None) -> None:
    print()
    print("The server's check passed: the ids of the pair stored in the file are the reference's.")
    if origin:
        print(f"Differences are from {origin}.")
    else:
        print("No F16 file beside it: --against CHECKPOINT, or `python -m convert ... --keep-f16`, shows differences.")
    if file.verification:
        print(f"Recorded at conversion: {json.dumps(file.verification)}")
    if exact is not None:
        found = compare(report.scored.logits, exact, math.inf)
        print(f"From transformers in float32: max {found.max_difference:.4f}, mean {found.mean_difference:.4f}, "
              f"drift {found.drift:.4f}, Kendall tau {found.kendall_tau:.4f}.")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m convert.verify", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path, metavar="FILE.gguf")
    parser.add_argument("--against", type=Path, metavar="CHECKPOINT", help="the checkpoint directory it was made from")
    parser.add_argument("--reference", action="store_true", help="score with transformers too (needs torch)")
    arguments = parser.parse_args(argv)
    try:
        check_names(arguments.file, arguments.against)
        return run(arguments.file, arguments.against, arguments.reference)
    except ConvertError as exc:
        print(f"convert.verify: {exc}", file=sys.stderr)
        return exc.exit_status
    except OSError as exc:
        print(f"convert.verify: {disk_error(Path(exc.filename or arguments.file), exc)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
