"""python -m bench: this server and what people would pick instead, on this machine, on the same pairs, over HTTP.

For each model (m3 and gemma at their true size with random weights, the real mini) all engines are started, and then
asked in turn: every list of passages goes to each engine before the next list is drawn, so that a machine that gets
slower or busier does so for all. Writes bench/results/MODEL.md, .json and .png; the speed figures are medians over
--runs rounds. An engine that cannot run is listed with the reason.
"""

from __future__ import annotations

import argparse
import bisect
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

import rerank_server
from bench import checkpoints, report
from bench.engines import MAX_LENGTH_TOKENS, PEERS, Engine, MissingError, Running, Setup, engines_of
from bench.machine import describe_machine
from bench.texts import Request, Texts, read_texts
from convert.models import MODELS, NAMED

CACHE = checkpoints.ROOT / "build" / "bench"
ALSO_OURS = {"m3": ["IQ4_XS"], "gemma": [], "mini": []}  # served besides the default, to show what the type costs
CLIENT_PASSAGES = 10  # in each request of the scenario with several clients
REQUESTS_OF_ONE = 5  # single pairs in a round: one alone says little about latency
SPARE_TOKENS = 8  # below the longest pair: engines differ in the specials that they add, and words are cut whole
PAUSE_S = 0.2  # between engines: threads of the one that has just answered may still spin

T = TypeVar("T")
Save = Callable[[dict[str, Any]], object]


@dataclass(frozen=True)
class Scenario:
    """One round's requests: `clients` at a time, `requests` in all, of n_passages each."""

    n_passages: int
    clients: int = 1
    requests: int = 1

    @property
    def name(self) -> str:
        return f"{self.n_passages}" if self.clients == 1 else f"{self.clients} clients x {self.n_passages}"


@dataclass
class Samples:
    """What one engine did in one scenario: for each round pairs/s and tokens/s, and for each request its seconds."""

    pairs_per_second: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        speeds = self.tokens_per_second
        return {
            "pairs_per_second": statistics.median(self.pairs_per_second),
            "tokens_per_second": statistics.median(speeds),
            "tokens_per_second_min": min(speeds),
            "tokens_per_second_max": max(speeds),
            "p50_ms": 1000 * statistics.median(self.latencies_s),
            "p95_ms": 1000 * percentile(self.latencies_s, 95),
        }


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of all do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


@dataclass(frozen=True)
class Round:
    """Requests that every engine is asked with before the next round begins. n_tokens: of all their pairs."""

    scenario: Scenario
    requests: list[Request]
    n_tokens: int


def scenarios_of(sizes: Sequence[int], clients: int) -> list[Scenario]:
    scenarios = [Scenario(size, requests=REQUESTS_OF_ONE if size == 1 else 1) for size in sizes]
    return scenarios + ([Scenario(CLIENT_PASSAGES, clients, clients)] if clients > 1 else [])


def draw_rounds(file: Path, texts: Texts, scenarios: Sequence[Scenario], n_runs: int) -> list[Round]:
    """All rounds of a measurement, no passage twice; their tokens counted by the model's own tokenizer."""
    engine = rerank_server.load_engine(file, rerank_server.Settings(max_length=MAX_LENGTH_TOKENS, ubatch=32))
    try:
        rounds = []
        for scenario in [scenario for _ in range(n_runs) for scenario in scenarios]:
            requests = [shortened(texts.request(scenario.n_passages), engine) for _ in range(scenario.requests)]
            pairs = [pair for request in requests for pair in engine.pairs.make(request.query, request.passages)]
            rounds.append(Round(scenario, requests, sum(len(pair.ids) for pair in pairs)))
        return rounds
    finally:
        engine.close()


def shortened(request: Request, engine: rerank_server.Engine) -> Request:
    """With passages cut to what fits a pair: llama-server answers 500 to a longer one, the others cut it themselves."""
    cut = rerank_server.Cut(MAX_LENGTH_TOKENS - SPARE_TOKENS)

    def is_too_long(text: str) -> bool:
        (pair,) = engine.pairs.make(request.query, [text], cut)
        return pair.truncated

    def fitting(passage: str) -> str:
        lengths = range(len(passage) + 1)
        n_too_long = bisect.bisect_left(lengths, True, key=lambda n: is_too_long(passage[:n]))
        return passage[: max(0, n_too_long - 1)]

    passages = (fitting(passage) if is_too_long(passage) else passage for passage in request.passages)
    return Request(request.query, tuple(passages))


def measure(running: Running, round_: Round, samples: Samples) -> None:
    """Sends a round's requests, `clients` of them at a time. Raises MissingError when one is not answered well."""
    started = time.perf_counter()
    with ThreadPoolExecutor(round_.scenario.clients) as clients:
        latencies = list(clients.map(lambda request: running.rerank(request.query, request.passages), round_.requests))
    seconds = time.perf_counter() - started
    samples.latencies_s += latencies
    samples.pairs_per_second.append(sum(len(request.passages) for request in round_.requests) / seconds)
    samples.tokens_per_second.append(round_.n_tokens / seconds)


def start_all(engines: Sequence[Engine], setup: Setup, missing: dict[str, str]) -> list[Running]:
    """Starts one engine after the other and asks it for one score; those that cannot run are noted in `missing`."""
    running = []
    for engine in tqdm(engines, desc="starting", leave=False):
        try:
            running.append(Running(engine, setup))
            running[-1].rerank("warm up", ("a passage",))
        except MissingError as reason:
            missing[engine.name] = str(reason)
            if running and running[-1].engine is engine:
                running.pop().close()
    return running


def compare(engines: Sequence[Engine], setup: Setup, rounds: Sequence[Round], save: Save) -> dict[str, Any]:
    """Asks all engines in turn. Returns {"rows": one for each engine and scenario, "missing": name -> reason}.

    save: is given what is known so far after each of the rounds, as a whole run takes long and may be cut short.
    """
    missing: dict[str, str] = {}
    running = start_all(engines, setup, missing)
    samples: dict[tuple[str, str], Samples] = {}
    try:
        for number, round_ in enumerate(tqdm(rounds, desc=f"rounds of {setup.role}")):
            for one in rotated(running, number):
                if one.engine.name in missing:
                    continue
                try:
                    key = (one.engine.name, round_.scenario.name)
                    measure(one, round_, samples.setdefault(key, Samples()))
                except MissingError as reason:
                    missing[one.engine.name] = str(reason)
                time.sleep(PAUSE_S)
            save(_result(running, samples, missing))
        return _result(running, samples, missing)
    finally:
        for one in running:
            one.close()


def _result(
    running: Sequence[Running], samples: dict[tuple[str, str], Samples], missing: dict[str, str]
) -> dict[str, Any]:
    good = [one for one in running if one.engine.name not in missing]
    return {"rows": [row for one in good for row in _rows(one, samples)], "missing": missing}


def rotated(running: list[T], by: int) -> list[T]:
    """None is always first, nor always behind the same other one."""
    first = by % max(1, len(running))
    return running[first:] + running[:first]


def _rows(one: Running, samples: dict[tuple[str, str], Samples]) -> list[dict[str, Any]]:
    memory = {
        "seconds_to_ready": one.seconds_to_ready,
        "resident_mb": one.memory_mb("VmRSS"),
        "peak_resident_mb": one.memory_mb("VmHWM"),
    }
    return [
        {"engine": name, "scenario": scenario, **found.figures(), **memory}
        for (name, scenario), found in samples.items()
        if name == one.engine.name
    ]


def make_setup(model: str, arguments: argparse.Namespace) -> tuple[Setup, list[str]]:
    """The files of a model, made where they are not there yet, and the quantisations that we serve of it."""
    peers_python, flags = arguments.peers_python.absolute(), tuple(arguments.server_flags)
    default = NAMED[model].quantization
    if model == "mini":
        file = MODELS / f"mini-{default}.gguf"
        if not file.is_file():
            raise SystemExit("bench: there is no mini model; `make mini` makes it")
        return Setup(model, {default: file}, None, peers_python, flags), [default]
    size = {name: value for name in ("hidden", "layers", "vocabulary") if (value := getattr(arguments, name))}
    directory = arguments.cache / "-".join(["random", model, *(str(value) for value in size.values())])
    checkpoint = checkpoints.make_checkpoint(model, directory, arguments.tokenizer, **size)
    ours = arguments.quant or [default, *ALSO_OURS[model]]
    files = checkpoints.quantized(checkpoint, [*ours, "Q8_0"])
    return Setup(model, files, checkpoint, peers_python, flags), ours


def bench(model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    machine = describe_machine(arguments.peers_python)
    setup, ours = make_setup(model, arguments)
    scenarios = scenarios_of(arguments.sizes, arguments.clients)
    rounds = draw_rounds(setup.files[ours[0]], read_texts(arguments.data), scenarios, arguments.runs)
    n_pairs = sum(len(request.passages) for round_ in rounds for request in round_.requests)
    head = {
        "model": model,
        "machine": machine,
        "files_mb": {name: path.stat().st_size / 1e6 for name, path in setup.files.items()},
        "texts": arguments.data.name if arguments.data else "made",
        "mean_tokens_per_pair": sum(round_.n_tokens for round_ in rounds) / n_pairs,
        "runs": arguments.runs,
    }
    engines = engines_of(model, ours, arguments.peers)
    return head | compare(engines, setup, rounds, lambda so_far: report.write(head | so_far, arguments.out))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measure this server beside its peers.",
        epilog="Flags after -- go to rerank_server.py. The first run makes the models: m3 4 GB of disk, gemma 16 GB.",
    )  # fmt: skip
    parser.add_argument("--models", nargs="+", choices=["m3", "gemma", "mini"], default=["m3", "gemma", "mini"])
    parser.add_argument("--quant", nargs="+", help="types that we serve (default: the model's default, m3 also IQ4_XS)")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS), help="default: all")
    parser.add_argument("--peers-python", type=Path, default=Path(sys.executable), metavar="FILE",
                        help="interpreter that has the peers (default: this one)")  # fmt: skip
    parser.add_argument("--data", type=Path, metavar="DIR", help="texts: a BEIR directory with a bm25*.tsv run")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR",
                        help="has sentencepiece.bpe.model or tokenizer.model (default: tiny ones)")  # fmt: skip
    parser.add_argument("--runs", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 10, 100], help="passages in a request")
    parser.add_argument("--clients", type=int, default=4, help="clients at once (default 4; 1: leave that out)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where models are kept (default: build/bench)")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="where results go (default: bench/results)")
    for name in ("hidden", "layers", "vocabulary"):
        parser.add_argument(f"--{name}", type=int, help="a smaller model than the true one")
    parser.add_argument("server_flags", nargs="*", metavar="FLAG", help="flags of rerank_server.py")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: stopped"))  # so that the engines are stopped as well
    for model in arguments.models:
        result = bench(model, arguments)
        print(report.write(result, arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
