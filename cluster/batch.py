"""Scores a list of pairs on all machines of a Ray cluster: python -m cluster.batch INPUT OUTPUT --model m3

INPUT is JSON lines or Parquet with query and passage (and perhaps query_id, passage_id), or a directory of such files,
or a BEIR directory with --run, a TREC run of candidates. OUTPUT.parquet holds row, query_id, passage_id, score, logit,
n_tokens and truncated, in the order of INPUT; any other OUTPUT is a TREC run. What cannot be scored stands with its
reason in OUTPUT.bad.jsonl. INPUT, OUTPUT and the models must be at the same path on every machine.

    driver    INPUT is cut into parts (inputs.py) -> those that OUTPUT.parts does not hold -> ray.data.map_batches
    actors    ScoreParts (parts.py): read a part, score it with rerank_server's role, write it under its final name
    driver    parts -> OUTPUT, which is renamed when it is whole; OUTPUT.parts is removed

A job that was stopped goes on when the same command is given again: parts that are done are not scored again. Ray Data
distributes parts, starts actors again, and gives what a dead machine held to another.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cluster  # noqa: F401  first: it sets what Ray reads when it is imported

# isort: split
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError
from tqdm import tqdm

from cluster.inputs import BeirRun, InputError, Part, Source, open_source
from cluster.parts import Folder, ScoreParts, sha256_of
from cluster.settings import find_role, settings_of
from rerank_server import ModelError, SettingsError

MAX_BLOCKS = 10_000  # of parts, each scheduled alone
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


@dataclass(frozen=True)
class Job:
    source: Source
    output: Path
    model: str
    values: dict[str, str]
    sha256: str
    part_rows: int
    n_actors: int | None
    threads: int | None

    @property
    def folder(self) -> Folder:
        return Folder(self.output.with_name(self.output.name + ".parts"))

    @property
    def is_trec(self) -> bool:
        return _is_trec(self.output)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same when it is continued."""
        files = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in self.source.files()]
        return {"input": files, "model": self.model, "sha256": self.sha256, "settings": self.values,
                "part_rows": self.part_rows, "is_trec": self.is_trec}  # fmt: skip


def _is_trec(output: Path) -> bool:
    return output.suffix not in (".parquet", ".pq")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    try:
        job = read_job(_parser().parse_args(arguments))
        with _held(job):
            _run(job)
    except (InputError, SettingsError, ModelError) as error:
        return _end(str(error), EXIT_USAGE)
    except RayError as error:
        return _end(f"{_cause(error)}; what was scored is kept: run the same command to go on", EXIT_FAILED)
    except OSError as error:
        return _end(f"{error.filename or ''}: {error.strerror}; run the same command to go on", EXIT_FAILED)
    except KeyboardInterrupt:
        return _end("stopped; what was scored is kept: run the same command to go on", EXIT_INTERRUPTED)
    return 0


def _end(message: str, status: int) -> int:
    print(f"cluster.batch: {message}", file=sys.stderr)
    return status


def _cause(error: RayError) -> str:
    """The last line of a remote traceback is the exception's own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cluster.batch", description="Score a list of pairs on a Ray cluster.")
    parser.add_argument("input", type=Path, help="JSON lines or Parquet, a directory of them, or with --run BEIR's")
    parser.add_argument("output", type=Path, help="NAME.parquet, or another name for a TREC run")
    parser.add_argument("--model", choices=("m3", "gemma"), default="m3", help="the role that scores (default: m3)")
    parser.add_argument("--run", type=Path, help="TREC run: the candidates of each query of a BEIR directory")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="a setting of the server, as max_length=512 or m3=FILE; can be repeated")
    parser.add_argument("--part-rows", type=_positive, default=1000, help="rows of a part (default: 1000)")
    parser.add_argument("--threads", type=_positive, help="CPUs for each actor (default: all of the smallest machine)")
    parser.add_argument("--actors", type=_positive, help="at most so many (default: as many as there are CPUs for)")
    return parser


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


def read_job(given: argparse.Namespace) -> Job:
    """Raises InputError, SettingsError and ModelError: everything that can be wrong before a machine has work."""
    output = given.output.absolute()
    if output.exists():
        raise InputError(f"{output} is there already: remove it, or name another")
    if not output.parent.is_dir():
        raise InputError(f"{output.parent}: there is no such directory")
    values = dict(_setting(text) for text in given.set)
    role = find_role(given.model, settings_of(values))
    source = open_source(given.input.absolute(), given.run and given.run.absolute(), _is_trec(output))
    sha256 = sha256_of(role.description.path)
    return Job(source, output, given.model, values, sha256, given.part_rows, given.actors, given.threads)


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise SettingsError(f"--set {text}: it must look like max_length=512")
    return name.strip().replace("-", "_"), value


@contextlib.contextmanager
def _held(job: Job) -> Iterator[None]:
    """The job's folder, for this process alone. Raises InputError when another job began there."""
    folder = job.folder.path
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{folder}: another process is at work on this job") from None
        _check_identity(job, folder / "job.json")
        yield


def _check_identity(job: Job, path: Path) -> None:
    if not path.is_file():
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(job.identity, indent=1))
        unfinished.replace(path)
        return
    begun = json.loads(path.read_text())
    if changed := [name for name, value in job.identity.items() if begun[name] != value]:
        raise InputError(
            f"{path.parent} holds a job that was begun with another {', '.join(changed)}: give the same, or remove it"
        )


def _run(job: Job) -> None:
    source = job.source
    if isinstance(source, BeirRun):
        source, n_bad = source.indexed(job.folder.path / "texts.sqlite")
        if n_bad:
            print(f"{n_bad} lines of corpus and queries are no {{_id, text}}", file=sys.stderr)
    parts, done = list(source.parts(job.part_rows)), job.folder.done()
    if done:
        print(f"{len(done)} of {len(parts)} parts are done already", file=sys.stderr)
    if left := [part for part in parts if part.number not in done]:
        _score(dataclasses.replace(job, source=source), left, sum(part.n_rows for part in parts))
    n_bad = job.folder.merge_bad(bad_file(job.output))
    n_pairs = job.folder.merge(job.output, job.is_trec)
    shutil.rmtree(job.folder.path)
    print(f"{n_pairs} pairs scored: {job.output}", file=sys.stderr)
    if n_bad:
        print(f"{n_bad} bad rows set aside: {bad_file(job.output)}", file=sys.stderr)


def bad_file(output: Path) -> Path:
    return output.with_name(output.name + ".bad.jsonl")


def _score(job: Job, parts: Sequence[Part], n_rows: int) -> None:
    """Everything that is left, on all machines. Raises RayError."""
    _connect()
    threads = job.threads or _smallest_machine()
    n_actors = job.n_actors or max(1, int(ray.available_resources().get("CPU", 0)) // threads)
    # It may shrink to one, so that the CPUs of an idle actor can be given to one that lost its machine.
    pool = ActorPoolStrategy(min_size=1, max_size=n_actors, initial_size=n_actors, max_tasks_in_flight_per_actor=1)
    items = ray.data.from_items([dataclasses.asdict(part) for part in parts],
                                override_num_blocks=min(len(parts), MAX_BLOCKS))  # fmt: skip
    scored = items.map_batches(
        ScoreParts, batch_size=1, compute=pool, num_cpus=threads,
        fn_constructor_args=(job.model, job.values, job.sha256, job.source, job.folder),
    )  # fmt: skip
    with tqdm(total=n_rows, initial=n_rows - sum(part.n_rows for part in parts), unit="row", smoothing=0.1) as bar:
        for part in scored.iter_rows():
            bar.update(part["n_rows"])


def _connect() -> None:
    """To the cluster of RAY_ADDRESS or of this machine; without one, this machine is one."""
    ray.init(ignore_reinit_error=True, logging_level=logging.ERROR, log_to_driver=False)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False


def _smallest_machine() -> int:
    """CPUs that Ray may use on it."""
    return int(min(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"]) or 1)


if __name__ == "__main__":
    sys.exit(main())
