"""Ranking quality on judged data: `python -m bench.quality --data DIR [SYSTEM ...]`.

DIR is a collection in BEIR's layout (bench/beir.py says what is in it), or a folder of such; SYSTEM is what reranks its
candidates, and any number of them are compared in one table:

    models/NAME-Q6_K.gguf   a file that this server can serve
    mini, m3, gemma         the file that the server would take for the role, from --models
    two-stage               m3 for all candidates, then gemma for the best --llm-top-n
    http://HOST:PORT        a running server that answers Cohere's and Jina's clients, on /v1/rerank or the path that is
                            given; what stands after a ? goes into the body: http://HOST:PORT/v2/rerank?use_llm=true;
                            a key in the environment variable RERANK_API_KEY goes along as a bearer token
    int8:SYSTEM             a file or a role with the int8 engine (`make accel`); bf16:SYSTEM in bfloat16
    cascade-20:SYSTEM       mini for all candidates, then SYSTEM for its best 20, which rank before the rest
    NAME=SYSTEM             any of these, with a name of its own in the table

Without a SYSTEM: the mini model in F16, Q8_0 and Q5_0, made in build/quality. The candidates are --run (TREC's format,
or query, document, score in columns), else the bm25*.tsv that lies in DIR, else what bm25s finds; the best --top-k are
reranked and the rest stay behind them. Each system is compared with the candidates as they came and with the first
system, over the same queries: differences with their 95 % confidence intervals and p (bench/metrics.py says how).
Results so far are written after each collection, so a long run may be cut short.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import random
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rerank_server
from bench import beir, metrics
from bench.machine import describe_machine
from bench.report import table

ROOT = Path(__file__).resolve().parent.parent
MINI_QUANTIZATIONS = ("F16", "Q8_0", "Q5_0")
REQUEST_TIMEOUT_S = 3600
SEED = 20260101
# Before a system: the same with an engine of `make accel`, which is off otherwise.
ACCEL_MODES: dict[str, dict[str, Any]] = {"int8": {"accel": "int8"}, "bf16": {"accel": "bf16"}}


class UnusableError(Exception):
    """A system that cannot be asked, or did not answer as it should; the message names it."""


class Scorer(Protocol):
    """n_computed: pairs that a model has scored so far. What a bi-encoder has a vector of already is not computed."""

    about: dict[str, Any]

    @property
    def n_computed(self) -> int: ...

    def order(self, query: str, passages: list[str]) -> list[int]:
        """Indices of the passages, best first; equal ones as they came. Raises UnusableError."""

    def close(self) -> None: ...


class FileScorer:
    """A GGUF file, scored in this process by the server's own code. Raises rerank_server.ModelError when made."""

    def __init__(self, path: Path, settings: rerank_server.Settings) -> None:
        self.engine = rerank_server.load_engine(path, settings)
        model = self.engine.description
        self.n_computed = 0
        self._vectors: dict[tuple[int, ...], Any] = {}
        self.about: dict[str, Any] = {"file": path.name, "kind": model.kind, "quantization": model.quantization,
                                      "file_mb": model.file_bytes / 1e6}  # fmt: skip

    def logits(self, query: str, passages: list[str]) -> list[float]:
        """Raises UnusableError where one is not a number."""
        pairs = self.engine.pairs.make(query, passages)
        if isinstance(self.engine, rerank_server.EmbeddingEngine):
            found = self._bi_encoder_logits(self.engine, pairs)
        else:
            self.n_computed += len(pairs)
            found = rerank_server.score_all(self.engine, pairs)
        if not np.isfinite(found).all():
            raise UnusableError(f"{self.about['file']} gave something that is not a number for {query[:60]!r}")
        return found

    def _bi_encoder_logits(
        self, engine: rerank_server.EmbeddingEngine, pairs: Sequence[rerank_server.Pair]
    ) -> list[float]:
        """The engine's own computation, but a passage that many queries have as a candidate is embedded once."""
        keys = [(tuple(pair.query_ids), tuple(pair.ids)) for pair in pairs]
        missing = [ids for ids in dict.fromkeys(itertools.chain.from_iterable(keys)) if ids not in self._vectors]
        self.n_computed += len(missing)
        while missing:
            batch = rerank_server.take_batch(missing, len, engine.max_batch_tokens, engine.max_sequences)
            self._vectors.update(zip(batch, engine.embed(batch), strict=True))
        return [
            engine.logit(pair, self._vectors[query], self._vectors[passage])
            for pair, (query, passage) in zip(pairs, keys, strict=True)
        ]

    def order(self, query: str, passages: list[str]) -> list[int]:
        return best_first(self.logits(query, passages))

    def close(self) -> None:
        self.engine.close()


class TwoStageScorer:
    """As the server's llm_top_n: the first scores all, the second the first's best, which then rank before the rest."""

    def __init__(self, first: Scorer, second: Scorer, n_second: int) -> None:
        self._first, self._second, self._n_second = first, second, n_second
        stages = (first.about, second.about)
        self.about = {"files": [about["file"] for about in stages], "kind": "two-stage", "llm_top_n": n_second,
                      "file_mb": sum(about["file_mb"] for about in stages)}  # fmt: skip

    @property
    def n_computed(self) -> int:
        return self._first.n_computed

    def order(self, query: str, passages: list[str]) -> list[int]:
        rows = self._first.order(query, passages)
        best, rest = rows[: self._n_second], rows[self._n_second :]
        return [best[row] for row in self._second.order(query, [passages[row] for row in best])] + rest

    def close(self) -> None:
        self._first.close()
        self._second.close()


class ServerScorer:
    """A running server that answers {query, documents} with results that have index and relevance_score."""

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        path = parts.path if parts.path.strip("/") else "/v1/rerank"
        self._url = urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, "", ""))
        self._fields = {name: _json_value(value) for name, value in urllib.parse.parse_qsl(parts.query)}
        self.n_computed = 0
        self.about: dict[str, Any] = {"kind": "server", "fields": self._fields}

    def order(self, query: str, passages: list[str]) -> list[int]:
        results = self._ask({"query": query, "documents": passages, **self._fields})
        try:
            found = [(int(row["index"]), float(row["relevance_score"])) for row in results["results"]]
        except (KeyError, TypeError, ValueError):
            raise UnusableError(f"{self._url}: the answer has no results with index and relevance_score") from None
        if sorted(index for index, _ in found) != list(range(len(passages))):
            raise UnusableError(f"{self._url}: {len(passages)} documents were sent and {len(found)} results came back")
        if not np.isfinite([score for _, score in found]).all():
            raise UnusableError(f"{self._url}: a relevance_score is not a number")
        self.n_computed += len(found)
        # the answer's own order decides between scores that were rounded to the same
        return [found[row][0] for row in best_first([score for _, score in found])]

    def _ask(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("RERANK_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = error.read()[:200].decode("utf-8", "replace")
            raise UnusableError(f"{self._url} answered {error.code}: {said}") from None
        except (OSError, ValueError) as error:
            raise UnusableError(f"{self._url}: {error}") from None

    def close(self) -> None:
        pass


def _json_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def best_first(scores: Sequence[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda row: (-scores[row], row))


# --- systems by name ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class System:
    name: str
    open: Callable[[], Scorer]


def find_systems(words: Sequence[str], settings: rerank_server.Settings, llm_top_n: int) -> list[System]:
    """Raises UnusableError for a word that is none, and rerank_server.ModelError for a role without a file."""
    systems = [find_system(word, settings, llm_top_n) for word in words]
    names = [system.name for system in systems]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise UnusableError(f"two systems are called {double!r}: name them, NAME=SYSTEM")
    return systems


def find_system(word: str, settings: rerank_server.Settings, llm_top_n: int) -> System:
    name, separator, what = word.partition("=")
    if not separator or "/" in name or "?" in name:  # a URL or a path may hold a = of its own
        name, what = "", word
    if what.startswith(("http://", "https://")):
        return System(name or what, lambda: ServerScorer(what))
    if what in ("mini", "m3", "gemma", "two-stage"):
        return _role(name, what, settings, llm_top_n)
    mode, _, rest = what.partition(":")
    if mode.startswith("cascade-") and mode[8:].isdigit():
        first, second = find_system("mini", settings, llm_top_n), find_system(rest, settings, llm_top_n)
        count = int(mode[8:])
        return System(name or f"{second.name}, cascade {count}",
                      lambda: TwoStageScorer(first.open(), second.open(), count))  # fmt: skip
    if mode in ACCEL_MODES:
        changes = ACCEL_MODES[mode]
        inner = find_system(rest, dataclasses.replace(settings, **changes), llm_top_n)
        return System(name or f"{inner.name}, {mode}", inner.open)
    path = Path(what)
    if not path.is_file():
        raise UnusableError(f"{what!r} is neither a file, nor a URL, nor one of mini, m3, gemma, two-stage")
    return System(name or path.stem, lambda: FileScorer(path, settings))


def _role(name: str, role: str, settings: rerank_server.Settings, llm_top_n: int) -> System:
    """The file that the server would take, found as it finds them."""
    kinds = {"mini": rerank_server.BI_ENCODER, "m3": rerank_server.CROSS_ENCODER, "gemma": rerank_server.YES_LOGIT}
    found = rerank_server.servable_files(settings.model_folders)
    paths = []
    for needed in ("m3", "gemma") if role == "two-stage" else (role,):
        description = next((model for model in found if model.kind == kinds[needed]), None)
        if description is None:
            command = "make mini" if needed == "mini" else f"make convert MODEL={needed}"
            raise UnusableError(f"{role}: there is no {needed} file in {settings.models}; {command} makes one")
        paths.append(description.path)
    if role != "two-stage":
        return System(name or paths[0].stem, lambda: FileScorer(paths[0], settings))
    first, second = paths
    return System(name or f"two-stage ({llm_top_n})", lambda: TwoStageScorer(
        FileScorer(first, settings), FileScorer(second, settings), llm_top_n))  # fmt: skip


def mini_files(folder: Path) -> list[str]:
    """The mini model in each of MINI_QUANTIZATIONS, made where it is not there yet."""
    missing = [name for name in MINI_QUANTIZATIONS if not (folder / f"mini-{name}.gguf").is_file()]
    if missing:
        from convert.__main__ import main as convert

        if convert(["mini", "--quant", *missing, "--out", str(folder)]):
            raise UnusableError("the mini model could not be made")
    return [str(folder / f"mini-{name}.gguf") for name in MINI_QUANTIZATIONS]


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A collection, the queries of it that are asked, and their candidates."""

    collection: beir.Collection
    queries: list[str]
    candidates: beir.Run
    source: str  # of the candidates
    top_k: int

    @property
    def name(self) -> str:
        return self.collection.name

    def about(self) -> dict[str, Any]:
        judgements = self.collection.judgements
        found = [metrics.recall(self.candidates.get(key, []), judgements[key], self.top_k) for key in self.queries]
        return {"name": self.name, "documents": len(self.collection.corpus), "queries": len(self.queries),
                "candidates": self.source, "top_k": self.top_k, "recall_at_top_k": float(np.mean(found))}  # fmt: skip


def make_task(directory: Path, arguments: argparse.Namespace) -> Task:
    """Raises beir.DataError."""
    collection = beir.read_collection(directory)
    run = arguments.run or (None if arguments.bm25s else beir.find_run(directory))
    candidates = beir.read_run(run) if run else beir.bm25_run(collection, max(arguments.top_k, 100))
    known = {query: [key for key in keys if key in collection.corpus] for query, keys in candidates.items()}
    queries = [query for query in collection.queries if known.get(query)]
    if not queries:
        raise beir.DataError(f"{run}: holds no judged query of {directory} with a document of its corpus")
    if arguments.queries and arguments.queries < len(queries):
        queries = sorted(random.Random(SEED).sample(queries, arguments.queries))
    return Task(collection, queries, known, run.name if run else "bm25s", arguments.top_k)


@dataclass
class Row:
    """A system's results. values: collection -> measure -> one value for each query."""

    name: str
    about: dict[str, Any] = field(default_factory=dict)
    values: dict[str, dict[str, metrics.FloatArray]] = field(default_factory=dict)
    n_computed: int = 0
    seconds: float = 0.0

    def means(self, collection: str) -> dict[str, float]:
        return {name: float(values.mean()) for name, values in self.values[collection].items()}


def rerank(scorer: Scorer, task: Task, row: Row, label: str) -> beir.Run:
    """The task's candidates in the scorer's order, and in `row` what they are worth and what they cost."""
    run: beir.Run = {}
    before, started = scorer.n_computed, time.perf_counter()
    for query in tqdm(task.queries, desc=f"{label}, {task.name}", unit="query", leave=False):
        candidates = task.candidates[query]
        best = candidates[: task.top_k]
        texts = [task.collection.corpus[key] for key in best]
        rows = scorer.order(task.collection.queries[query], texts)
        run[query] = [best[index] for index in rows] + candidates[task.top_k :]
    row.seconds += time.perf_counter() - started
    row.n_computed += scorer.n_computed - before
    row.values[task.name] = metrics.measure(run, task.collection.judgements, task.queries)
    return run


def measure_all(
    systems: Sequence[System], tasks: Sequence[Task], runs: Path | None, save: Callable[[list[Row]], None]
) -> list[Row]:
    """The candidates as they came first, then a row for each system. save: given the rows after each collection."""
    first = Row("BM25" if all("bm25" in task.source.lower() for task in tasks) else "candidates")
    for task in tasks:
        first.values[task.name] = metrics.measure(task.candidates, task.collection.judgements, task.queries)
    rows = [first]
    for system in systems:
        scorer = system.open()
        try:
            rows.append(Row(system.name, scorer.about))
            for task in tasks:
                run = rerank(scorer, task, rows[-1], system.name)
                if runs is not None:
                    tag = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in system.name)
                    beir.write_run(run, runs / f"{task.name}.{tag}.trec", tag)
                save(rows)
        finally:
            scorer.close()
    return rows


# --- the report -----------------------------------------------------------------------------------------------------


def result_of(machine: dict[str, Any], tasks: Sequence[Task], rows: Sequence[Row]) -> dict[str, Any]:
    """What is written as JSON. Rows of a run that was cut short hold the collections that they have."""
    return {
        "machine": machine,
        "collections": [task.about() for task in tasks],
        "systems": [
            {"name": row.name, **row.about, "seconds": row.seconds, "pairs_computed": row.n_computed,
             "pairs_per_second": row.n_computed / row.seconds if row.seconds else None,
             "collections": {name: row.means(name) for name in row.values},
             "mean": mean_of(row, list(row.values)),
             "against": {other.name: {name: asdict(difference) for name, difference in differences(row, other)}
                         for other in rows[: min(2, place)]},
             "ndcg_at_10_by_query": {name: [round(value, 4) for value in values["ndcg_at_10"].tolist()]
                                     for name, values in row.values.items()}}
            for place, row in enumerate(rows)
        ],
    }  # fmt: skip


def mean_of(row: Row, names: Sequence[str]) -> dict[str, float]:
    """Of the collections' means: every collection weighs the same."""
    return {measure: float(np.mean([row.means(name)[measure] for name in names])) for measure in metrics.MEASURES}


def differences(row: Row, other: Row) -> Iterable[tuple[str, metrics.Difference]]:
    """In nDCG@10: for each collection, and for the mean over those that both have."""
    names = [name for name in row.values if name in other.values]
    values = [(row.values[name]["ndcg_at_10"], other.values[name]["ndcg_at_10"]) for name in names]
    for name, (ours, theirs) in zip(names, values, strict=True):
        yield name, metrics.compare([ours], [theirs])
    yield "mean", metrics.compare([ours for ours, _ in values], [theirs for _, theirs in values])


def markdown(result: dict[str, Any]) -> str:
    machine, systems = result["machine"], result["systems"]
    lines = ["# Ranking quality", "", f"`{machine['command']}`, {machine['date']}, commit {machine['commit']}", "",
             f"- {machine['cpus']} x {machine['cpu']}, load at the start {machine['load_at_start']}"]  # fmt: skip
    for one in result["collections"]:
        lines.append(
            f"- {one['name']}: {one['queries']:,} queries, {one['documents']:,} documents; candidates: "
            f"{one['candidates']}, of which the best {one['top_k']} are reranked (they hold "
            f"{one['recall_at_top_k']:.1%} of what is relevant)"
        )
    names = [one["name"] for one in result["collections"]]
    for name in ["mean", *names] if len(names) > 1 else names:
        lines += ["", f"## {name if name != 'mean' else f'Mean of {len(names)} collections'}", ""]
        lines += table([_cells(system, name) for system in systems if _has(system, name, names)], _columns(systems))
    lines += ["", (
        "Differences are in nDCG@10, with their 95 % confidence intervals (bootstrap over queries); p: paired "
        "randomisation test, two-sided, not corrected for many comparisons. pairs/s: pairs that the model computed; a "
        "bi-encoder embeds a passage once, however many queries have it as a candidate."
    )]  # fmt: skip
    return "\n".join(lines) + "\n"


def _has(system: dict[str, Any], name: str, names: Sequence[str]) -> bool:
    return all(one in system["collections"] for one in (names if name == "mean" else [name]))


def _columns(systems: Sequence[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    columns = {"name": ("system", "{}"), "ndcg_at_10": ("nDCG@10", "{:.4f}"), "mrr_at_10": ("MRR@10", "{:.4f}"),
               "recall_at_10": ("recall@10", "{:.4f}")}  # fmt: skip
    for other in systems[: min(2, len(systems) - 1)]:
        columns |= {f"- {other['name']}": (f"− {other['name']}", "{}"), f"p {other['name']}": ("p", "{}")}
    return columns | {"pairs_per_second": ("pairs/s", "{}"), "file_mb": ("MB", "{}")}


def _cells(system: dict[str, Any], name: str) -> dict[str, Any]:
    cells = {"name": system["name"], **(system["mean"] if name == "mean" else system["collections"][name])}
    speed, size = system["pairs_per_second"], system.get("file_mb")
    cells |= {"pairs_per_second": f"{speed:.1f}" if speed else "", "file_mb": f"{size:,.1f}" if size else ""}
    for other, found in system["against"].items():
        one = found[name]
        cells[f"- {other}"] = f"{one['mean']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}]"
        cells[f"p {other}"] = f"{one['p']:.4f}" if one["p"] >= 0.0001 else "< 0.0001"
    return _Cells(cells)


class _Cells(dict[str, Any]):
    """A row's comparison with itself, and with what came after it, is an empty cell."""

    def __missing__(self, key: str) -> str:
        return ""


def write(result: dict[str, Any], out: Path) -> str:
    """Writes OUT.json and OUT.md; returns the Markdown."""
    out.parent.mkdir(parents=True, exist_ok=True)
    text = markdown(result)
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def parser() -> argparse.ArgumentParser:
    assert __doc__
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("systems", nargs="*", metavar="SYSTEM", help="see above")
    add_data_arguments(parser)
    parser.add_argument("--llm-top-n", type=int, default=10, help="of two-stage (default 10)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "quality" / "quality", metavar="FILE",
                        help="FILE.json and FILE.md are written (default: build/quality/quality)")  # fmt: skip
    parser.add_argument("--write-runs", type=Path, metavar="DIR", help="also each ranking, in TREC's format")
    return parser


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """What bench.calibrate takes, too."""
    parser.add_argument("--data", type=Path, action="append", required=True, metavar="DIR",
                        help="a collection, or a folder of them; may be given more than once")  # fmt: skip
    parser.add_argument("--run", type=Path, metavar="FILE", help="candidates; for one collection")
    parser.add_argument("--bm25s", action="store_true", help="make the candidates, even if some lie in DIR")
    parser.add_argument("--top-k", type=int, default=50, help="candidates that are reranked (default 50)")
    parser.add_argument("--queries", type=int, metavar="N", help="only so many of each collection (default: all)")
    parser.add_argument("--models", default=rerank_server.Settings.models, help="where roles are looked for")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of the longest pair (default 1024)")
    parser.add_argument("--threads", type=int, default=0, help="default: one for each core")


def settings_of(arguments: argparse.Namespace) -> rerank_server.Settings:
    return rerank_server.Settings(
        models=arguments.models, max_length=arguments.max_length, threads=arguments.threads, accel="off"
    )


def make_tasks(arguments: argparse.Namespace) -> list[Task]:
    """Raises beir.DataError."""
    directories = beir.find_collections(arguments.data)
    if arguments.run and len(directories) > 1:
        raise beir.DataError(f"--run is for one collection, and --data names {len(directories)}")
    return [make_task(directory, arguments) for directory in directories]


USER_ERRORS = (
    beir.DataError, UnusableError, OSError,
    rerank_server.ModelError, rerank_server.EngineError, rerank_server.SettingsError,
)  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Raises what USER_ERRORS lists."""
    words = arguments.systems or mini_files(ROOT / "build" / "quality")
    systems = find_systems(words, settings_of(arguments), arguments.llm_top_n)
    tasks = make_tasks(arguments)
    machine = describe_machine(Path(sys.executable), "bench.quality")

    def save(rows: list[Row]) -> None:
        write(result_of(machine, tasks, rows), arguments.out)

    rows = measure_all(systems, tasks, arguments.write_runs, save)
    print(write(result_of(machine, tasks, rows), arguments.out))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured, 1 a file or a system could not be used, 130 stopped (what was measured is written)."""
    arguments = parser().parse_args(argv)
    try:
        run(arguments)
        return 0
    except USER_ERRORS as error:
        print(f"bench.quality: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nbench.quality: stopped; what was measured is in {arguments.out.with_suffix('.md')}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
