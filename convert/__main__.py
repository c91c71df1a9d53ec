"""python -m convert SOURCE [--quant NAME ...] [--out DIR] [--revision SHA] [--keep-f16]

SOURCE is a name (m3, gemma, mini, qwen3-0.6b ...), a Hub id, or a checkpoint directory. Each file is
written as NAME.part, reopened, checked, scored by the server's own code beside the F16 file, and only
then gets its name. Exit status: 0 done, 1 a file failed, 2 nothing was tried (no checkpoint and no
network, an unsupported architecture, bad usage).
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from . import choose, download, models, verify
from .adopt import adopt
from .errors import CannotStartError, ConvertError, check_names
from .job import Job
from .quantize import QUANTIZATIONS, REFUSED, Quantization, find_quantization, quantize
from .reference import PromptParts
from .verify import Report, Scored
from .write import disk_error, file_bytes

DISK_MARGIN_BYTES = 64 << 20  # metadata, vocabularies, the file system's own needs
F16 = QUANTIZATIONS["F16"]


class Output:
    """Names of the files, and their `.part`s: whatever is not finished at the end of a run is removed."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name, self._parts = folder, name, folder

    def final(self, quantization: Quantization) -> Path:
        return self._folder / f"{self._name}-{quantization.name}.gguf"

    def part(self, quantization: Quantization) -> Path:
        return self._parts / f"{self._name}-{quantization.name}.gguf.part"

    @property
    def choice(self) -> Path:
        return self._folder / f"{self._name}.choice.json"

    def finish(self, quantization: Quantization) -> None:
        """The data is on the disk before the name is."""
        part = self.part(quantization)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(self.final(quantization))

    def _remove_abandoned(self) -> None:
        """Of runs that were killed. One that still works holds the lock of its folder."""
        for folder in self._folder.glob(".*.part"):
            with suppress(OSError), _locked(folder):
                shutil.rmtree(folder)
        for quantization in QUANTIZATIONS.values():  # of an older version
            (self._folder / f"{self._name}-{quantization.name}.gguf.part").unlink(missing_ok=True)

    @contextmanager
    def opened(self) -> Iterator[None]:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()
            self._parts = Path(tempfile.mkdtemp(prefix=f".{self._name}-", suffix=".part", dir=self._folder))
        except OSError as exc:
            raise CannotStartError(f"--out {self._folder}: cannot be written ({exc.strerror})") from exc
        try:
            with _locked(self._parts):
                yield
        finally:
            shutil.rmtree(self._parts, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises BlockingIOError where another process holds it; the kernel gives it back when that ends."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def convert(arguments: argparse.Namespace) -> int:
    """The steps, in order. Raises ConvertError."""
    check_names(Path(arguments.source), arguments.out)
    if arguments.source.endswith(".gguf") and Path(arguments.source).is_file():
        name = _name(arguments.name) if arguments.name else None
        path = adopt(Path(arguments.source), arguments.out, name, arguments.reranker)
        print(f"{os.path.relpath(path)}: good; the server takes it from now on")
        return 0
    source = models.find_source(arguments.source)
    name = _name(arguments.name) if arguments.name else source.name
    wanted = [find_quantization(name) for name in arguments.quant or source.candidates or [source.quantization]]
    quantizations, is_choosing = list(dict.fromkeys(wanted)), not arguments.quant and len(wanted) > 1
    if arguments.keep_f16 and F16 not in quantizations:
        quantizations.append(F16)
    fetched = download.fetch(source, arguments.revision)
    job = Job.open(fetched.directory, source.repo or name, fetched.revision, _parts(arguments))
    output = Output(arguments.out, name)
    with output.opened():
        _check_disk_space(arguments.out, job, quantizations)
        is_known = source in models.NAMED.values() and source.is_pinned
        base = write_base(job, output, is_known)
        # F16 comes last: its .part is what the others are made from, until it gets its name
        made: dict[Quantization, Report] = {}
        for quantization in sorted(quantizations, key=lambda quantization: quantization is F16):
            made[quantization] = convert_one(job, output, base, quantization)
            if not is_choosing and not made[quantization].problem:
                output.finish(quantization)
        if is_choosing:
            quantizations = choose_one(output, made, find_quantization(source.quantization))
    reports = [made[quantization] for quantization in quantizations]
    print(verify.summary_table(reports))
    good = [report.name for report in reports if not report.problem]
    print(f"\nIn {os.path.relpath(arguments.out)}: {', '.join(good) or 'nothing'}")
    for report in reports:
        if report.problem:
            print(f"convert: {report.name} was not written: {report.problem}", file=sys.stderr)
    return int(any(report.problem for report in reports))


def choose_one(output: Output, made: dict[Quantization, Report], default: Quantization) -> list[Quantization]:
    """Names the best of the candidates for this CPU (and F16, where it was to be kept); the others are removed."""
    parts = {quantization: output.part(quantization) for quantization in made if quantization is not F16}
    candidates = choose.measure(parts, made)
    chosen = choose.choose(candidates, default)
    print(f"{choose.table(candidates, chosen)}\n")
    kept = [chosen.quantization, *(quantization for quantization in made if quantization is F16)]
    for quantization in kept:
        if not made[quantization].problem:
            output.finish(quantization)
    if not chosen.report.problem:
        choose.record(output.choice, candidates, chosen)
    return kept


def write_base(job: Job, output: Output, named: bool) -> Scored:
    """The F16 file, from which all others are made and against which they are measured.

    named: weights that this project knows, which are known to tell relevant passages from irrelevant ones.
    """
    part = output.part(F16)
    job.write(part, half=True)
    verify.check_structure(part, job.tensors)
    scored = verify.score_samples(part, job.samples)
    margin = verify.relevance_margin(scored.logits)
    if margin < verify.CLEAR_MARGIN:
        problem = f"in float16, relevant passages score only {margin:.2f} logits above irrelevant ones on average"
        if named:
            raise ConvertError(f"{problem}: the checkpoint is damaged; download it again")
        print(f"convert: {problem}: is this a trained reranker? No drift limit is applied", file=sys.stderr)
    return scored


def convert_one(job: Job, output: Output, base: Scored, quantization: Quantization) -> Report:
    """Writes, checks and scores one .part; what came out is recorded in it."""
    part = output.part(quantization)
    if quantization.name == "F32":
        job.write(part, half=False)
    elif quantization is not F16:
        note = quantize(output.part(F16), part, quantization)
        if note:
            print(f"convert: {output.final(quantization).name}: {note}", file=sys.stderr)
    file = verify.check_structure(part, job.tensors)
    scored = base if quantization is F16 else None
    expected = verify.expected_ids(job.pairs, job.samples)
    name = output.final(quantization).name
    report = verify.examine(part, name, file, expected, base.logits, scored, job.samples)
    if not report.problem:
        file.record(report.verification())
    return report


def _check_disk_space(folder: Path, job: Job, quantizations: Sequence[Quantization]) -> None:
    n_weights = sum(file_bytes([tensor], half=False) // 4 for tensor in job.tensors)
    needed = file_bytes(job.tensors, half=True) + DISK_MARGIN_BYTES
    needed += sum(int(n_weights * quantization.bits / 8) for quantization in quantizations if quantization is not F16)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CannotStartError(
            f"{folder}: about {needed / 1e9:.1f} GB are needed there and {free / 1e9:.1f} GB are free; free some "
            "space, or choose another --out"
        )


def _name(text: str) -> str:
    if text.startswith(".") or not re.fullmatch(r"[\w.+-]{1,200}", text):
        raise CannotStartError(f"--name {text!r:.60}: expected letters, digits, and any of . _ + -")
    return text


def _parts(arguments: argparse.Namespace) -> PromptParts:
    given = {name: getattr(arguments, name) for name in ("prompt", "query_prefix", "passage_prefix")}
    parts = {name: text for name, text in given.items() if text is not None}
    for name, text in parts.items():
        if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            raise CannotStartError(f"--{name.replace('_', '-')}: not a text in UTF-8")
    return PromptParts(**parts)


def _parser() -> argparse.ArgumentParser:
    refused = ", ".join(REFUSED)
    parser = argparse.ArgumentParser(prog="python -m convert", description="Hugging Face checkpoint -> verified GGUF.")
    sources = f"{', '.join(models.NAMED)}, a Hub id, a checkpoint directory, or a GGUF file of llama.cpp's converter"
    parser.add_argument("source", metavar="SOURCE", help=sources)
    parser.add_argument(
        "--quant", nargs="+", metavar="NAME", action="extend",
        help=f"{' '.join(QUANTIZATIONS)} (without it: {_defaults()}; refused: {refused})",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=models.MODELS, metavar="DIR", help="default: models/")
    parser.add_argument("--revision", metavar="SHA", help="commit to download (default: the one this version pins)")
    parser.add_argument("--keep-f16", action="store_true", help="keep the F16 file too")
    parser.add_argument("--name", metavar="NAME", help="first part of the files' names (default: the directory's name)")
    parser.add_argument("--reranker", action="store_true",
                        help="of a GGUF file that does not say so itself: it is a reranker")  # fmt: skip
    gemma = parser.add_argument_group("for a Gemma reranker that was trained with other texts than the original's")
    gemma.add_argument("--prompt", metavar="TEXT", help="the question after query and passage")
    gemma.add_argument("--query-prefix", metavar="TEXT", help="before the query (default: 'A: ')")
    gemma.add_argument("--passage-prefix", metavar="TEXT", help="before the passage (default: 'B: ')")
    return parser


def _defaults() -> str:
    sources = {name: source.candidates for name, source in models.NAMED.items() if source.candidates}
    chosen = ", ".join(f"{name} from {' '.join(candidates)}" for name, candidates in sources.items())
    return f"the fastest on this CPU whose drift is small, {chosen}; otherwise Q8_0"


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _terminated)  # so that .parts are removed then as well
    try:
        return convert(arguments)
    except ConvertError as exc:
        print(f"convert: {exc}", file=sys.stderr)
        return exc.exit_status
    except OSError as exc:
        print(f"convert: {disk_error(Path(exc.filename or arguments.out), exc)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("convert: stopped; nothing is left of what was not finished", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
