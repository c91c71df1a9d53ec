"""python -m bench.gpu: scores, speed and memory on an NVIDIA GPU.

bench/gpu.sh builds llama-cpp-python with CUDA and starts this. Every step is a process of its own
with a time limit; its rows are printed and kept as they come, and the result is written after every
step, so that a run that is cut off still says something. --cpu: the same steps without a GPU, on
small models. Writes OUT/gpu-CARD.json and .md.

Steps: models (tiny checkpoints of each architecture, m3 at its true size, all with random weights),
parity (logits against tests/golden), peer (transformers on the same card, bench/gpu_peer.py), speed
(lists, sizes of a decode, memory), agreement (m3 against transformers in float32), server (over
HTTP), profile (where a list's time goes), parity and agreement without TF32 or GPU, gemma.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
import numpy.typing as npt

import rerank_server
from bench import checkpoints, report
from bench.engines import MAX_LENGTH_TOKENS, Running, Setup, engines_of
from bench.machine import describe_machine
from bench.profile import Cost, Profiler, rows_of
from bench.texts import Request, Texts, made_lists

ROOT = checkpoints.ROOT
sys.path.append(str(ROOT / "tests"))

import checkpoints as tiny_checkpoints  # noqa: E402
from golden.inputs import SCORED_PAIRS  # noqa: E402

Row = dict[str, Any]
Logits = npt.NDArray[np.float64]

ARCHITECTURES = ("xlmr", "bert", "bi", "gemma")
TINY_TYPES = ("F32", "F16", "Q8_0")
# Largest difference of a logit from the reference's, as a part of the range of the reference's
# logits: the tolerance of tests/test_parity.py, which the CPU keeps with F32 files. On a GPU cuBLAS
# multiplies float32 in TF32, whose step is float16's (2^-11), so the same tolerance is asked for.
# F16 and Q8_0 files have other weights: no limit, but a row of the CPU's to compare with.
TOLERANCE = 1 / 400
PARITY_UBATCHES = (64, 512, 2048)
ALONE = "alone"
NO_GPU = {"CUDA_VISIBLE_DEVICES": "-1"}
LISTS = 9  # of each length, all different; medians count
WARM_UPS = 2
COMPARED_ON_CPU = 20  # pairs; a CPU needs seconds for them
SMALL = {"hidden": 256, "layers": 2, "vocabulary": 4000}  # --cpu
# Environment variables of llama.cpp, read at every product and every allocation.
IN_TF32 = (
    "products in TF32",
    {"GGML_CUDA_CUBLAS_COMPUTE_TYPE": "f32"},
)  # F16 files: float16, sums too
NOT_PINNED = ("host memory not pinned", {"GGML_CUDA_NO_PINNED": "1"})


@dataclass(frozen=True)
class Run:
    """What the steps are told. Models and the rows of finished steps are kept in `cache`."""

    cpu: bool
    cache: Path
    out: Path
    peer_python: Path
    with_gemma: bool

    def checkpoint(self, model: str) -> Path:
        """Of "m3" or "gemma", made where it is not there yet."""
        size: dict[str, Any] = SMALL if self.cpu else {}
        name = "-".join(["random", model, *map(str, size.values())])
        return checkpoints.make_checkpoint(model, self.cache / name, **size)

    def file(self, model: str, quantization: str) -> Path:
        return checkpoints.quantized(self.checkpoint(model), [quantization])[quantization]

    @property
    def types(self) -> tuple[str, ...]:
        """Of m3: not quantised, what most people download, and this project's default."""
        return ("F16", "Q8_0", "Q6_K")

    @property
    def ubatches(self) -> tuple[int, ...]:
        return (256, 512) if self.cpu else (512, 1024, 2048, 4096, 8192)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Passages in a list."""
        return (1, 3, 10) if self.cpu else (1, 10, 100)

    @property
    def lists_file(self) -> Path:
        return self.cache / ("lists-small.json" if self.cpu else "lists.json")

    def lists(self, size: int) -> list[Row]:
        lists = json.loads(self.lists_file.read_text(encoding="utf-8"))
        return [one for one in lists if one["size"] == size]

    def longest(self) -> Row:
        return self.lists(max(self.sizes))[0]

    def settings(self, on_gpu: bool = True, **others: Any) -> rerank_server.Settings:
        given: dict[str, Any] = {"max_length": MAX_LENGTH_TOKENS, "accel": "off"}
        given["gpu_layers"] = self.gpu_layers if on_gpu else 0
        return rerank_server.Settings(**given | others)

    @property
    def gpu_layers(self) -> int:
        return 0 if self.cpu else -1

    @property
    def place(self) -> str:
        return "CPU" if self.cpu else "GPU"


@contextlib.contextmanager
def opened(file: Path, settings: rerank_server.Settings) -> Iterator[rerank_server.Engine]:
    engine = rerank_server.load_engine(file, settings)
    try:
        yield engine
    finally:
        engine.close()


# -- Models ----------------------------------------------------------------------------------------


def make_models(run: Run) -> Iterator[Row]:
    """All at once: a conversion is many small steps of one thread."""
    started = time.perf_counter()
    with ThreadPoolExecutor() as pool:
        m3 = pool.submit(lambda: checkpoints.quantized(run.checkpoint("m3"), run.types))
        for name, files in pool.map(lambda name: (name, make_tiny(run, name)), ARCHITECTURES):
            yield model_row(f"tiny {name}", files, started)
        yield model_row("m3", m3.result(), started)
    write_lists(run)


def make_tiny(run: Run, architecture: str) -> dict[str, Path]:
    directory = run.cache / f"tiny-{architecture}"
    if not (directory / "config.json").is_file():
        getattr(tiny_checkpoints, f"make_{architecture}")(directory)
    return checkpoints.quantized(directory, TINY_TYPES)


def model_row(name: str, files: dict[str, Path], started: float) -> Row:
    sizes = ", ".join(f"{kind} {file.stat().st_size / 1e6:,.0f} MB" for kind, file in files.items())
    return {"model": name, "files": sizes, "ready_s": time.perf_counter() - started}


def write_lists(run: Run) -> None:
    """The lists that both sides score, with m3's token ids."""
    texts, lists = Texts(made_lists()), []
    with opened(run.file("m3", "Q8_0"), run.settings(on_gpu=False, ubatch=32)) as engine:
        for size in run.sizes:
            for _ in range(LISTS):
                request = texts.request(size)
                ids = [
                    list(pair.ids) for pair in engine.pairs.make(request.query, request.passages)
                ]
                lists.append(
                    {"size": size, "query": request.query, "passages": request.passages, "ids": ids}
                )
    run.lists_file.write_text(json.dumps(lists), encoding="utf-8")


# -- Parity ----------------------------------------------------------------------------------------


def parity(run: Run) -> Iterator[Row]:
    """Every architecture and type, alone and packed, against the reference's float32 logits."""
    on_gpu = os.environ.get("CUDA_VISIBLE_DEVICES") != "-1" and not run.cpu
    where = (
        "CPU" if not on_gpu else "GPU, no TF32" if "NVIDIA_TF32_OVERRIDE" in os.environ else "GPU"
    )
    for architecture in ARCHITECTURES:
        for kind in TINY_TYPES:
            file = run.cache / f"tiny-{architecture}-{kind}.gguf"
            found = {
                how: compare(logits, reference)
                for how, logits, reference in tiny_logits(run, architecture, file, on_gpu)
            }
            row = {"where": where, "model": architecture, "type": kind}
            row |= {how: differences["largest"] for how, differences in found.items()}
            yield row | worst(found.values(), TOLERANCE if kind == "F32" else None)


def worst(found: Collection[Row], limit: float | None) -> Row:
    largest = max(row["largest"] for row in found)
    within = "" if limit is None else "yes" if largest <= limit else "NO"
    wrong = max(row["wrong_order"] for row in found)
    return {"largest": largest, "wrong_order": wrong, "within": within}


def tiny_logits(
    run: Run, architecture: str, file: Path, on_gpu: bool
) -> Iterator[tuple[str, Logits, Logits]]:
    """(how pairs were packed, logits, the reference's)."""
    longest = rerank_server.MAX_MAX_LENGTH_TOKENS
    for ubatch in PARITY_UBATCHES:
        with opened(file, run.settings(on_gpu, ubatch=ubatch, max_length=longest)) as engine:
            pairs = [
                engine.pairs.make(pair.query, [pair.passage], rerank_server.Cut(pair.max_length))[0]
                for pair in SCORED_PAIRS
            ]
            reference = golden_logits(architecture, engine)
            if ubatch == PARITY_UBATCHES[0]:
                yield ALONE, np.array([engine.score([pair])[0] for pair in pairs]), reference
            yield str(ubatch), np.array(rerank_server.score_all(engine, pairs)), reference


def golden_logits(architecture: str, engine: rerank_server.Engine) -> Logits:
    """For the bi-encoder, whose golden values are cosines, on the line of its file."""
    path = ROOT / "tests" / "golden" / f"{architecture}.json"
    values = np.array(json.loads(path.read_text(encoding="utf-8"))["logits"])
    if isinstance(engine, rerank_server.EmbeddingEngine):
        values = engine.cosine_scale * values + engine.cosine_bias
    return values


def compare(logits: Logits, reference: Logits) -> Row:
    """largest: difference, as a part of the reference's range; infinite where a logit is no number.
    wrong_order: pairs of pairs in another order, though the reference has them further apart than
    two differences at the tolerance could bring together."""
    limit = TOLERANCE * np.ptp(reference)
    apart = reference[:, None] - reference[None, :] > 2 * limit
    wrong = int((apart & ~(logits[:, None] > logits[None, :])).sum())
    largest = float(np.abs(logits - reference).max() / np.ptp(reference))
    return {"largest": largest if math.isfinite(largest) else math.inf, "wrong_order": wrong}


# -- m3 at its true size ---------------------------------------------------------------------------


def peer(run: Run) -> Iterator[Row]:
    """bench/gpu_peer.py in the interpreter that has torch."""
    yield from run_peer(run, "m3", run.lists_file)


def run_peer(run: Run, model: str, lists: Path) -> Iterator[Row]:
    out = run.cache / f"peer-{model}.json"
    out.unlink(missing_ok=True)
    device = "cpu" if run.cpu else "cuda"
    command = [
        run.peer_python,
        "-m",
        "bench.gpu_peer",
        model,
        run.checkpoint(model),
        lists,
        device,
        out,
    ]
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, check=False, env=os.environ | {"PYTHONPATH": peer_path()}
    )
    if out.is_file():
        yield from json.loads(out.read_text(encoding="utf-8"))["rows"]
    if done.returncode:
        raise SystemExit(f"bench.gpu: transformers ended with status {done.returncode}")


def peer_path() -> str:
    return os.environ.get("PYTHONPATH", "")


def agreement(run: Run) -> Iterator[Row]:
    """Our logits of the longest list, and transformers' own in float16, beside its float32 ones."""
    found = json.loads((run.cache / "peer-m3.json").read_text(encoding="utf-8"))
    exact, one = np.array(found["logits_float32"]), run.longest()
    yield {"engine": found["name"], **difference(np.array(found["logits"]), exact)}
    for kind in run.types:
        yield {
            "engine": f"rerank-server {kind}, {run.place}",
            **our_difference(run, kind, exact, one),
        }
    with environment(IN_TF32[1]):
        yield {
            "engine": f"rerank-server F16, {IN_TF32[0]}",
            **our_difference(run, "F16", exact, one),
        }


def our_difference(run: Run, kind: str, exact: Logits, one: Row, on_gpu: bool = True) -> Row:
    """Of as many pairs of the list as there are exact logits."""
    with opened(run.file("m3", kind), run.settings(on_gpu)) as engine:
        logits = np.array(
            rerank_server.score_all(engine, engine.pairs.make(one["query"], one["passages"][: len(exact)]))
        )
    return difference(logits, exact)


def agreement_on_cpu(run: Run) -> Iterator[Row]:
    """The same files with the GPU hidden: what the type costs, not the GPU."""
    found = json.loads((run.cache / "peer-m3.json").read_text(encoding="utf-8"))
    exact, one = np.array(found["logits_float32"])[:COMPARED_ON_CPU], run.longest()
    for kind in run.types:
        yield {
            "engine": f"rerank-server {kind}, CPU",
            **our_difference(run, kind, exact, one, on_gpu=False),
        }


def difference(logits: Logits, exact: Logits) -> Row:
    off = np.abs(logits - exact)
    return {
        "pairs": len(exact),
        "mean": float(off.mean()),
        "largest": float(off.max()),
        "spread": float(exact.std()),
        "correlation": float(np.corrcoef(logits, exact)[0, 1]),
    }


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]


def speed(run: Run) -> Iterator[Row]:
    """Every type with the server's own choice of ubatch, then every ubatch; and the memory."""
    for kind in run.types:
        yield from speed_of(run, f"rerank-server {kind}", kind, 0)
    for what, variables in (IN_TF32, NOT_PINNED):
        with environment(variables):
            yield from speed_of(run, f"rerank-server F16, {what}", "F16", 0)
    for kind in run.types[:2]:
        for ubatch in run.ubatches:
            yield from speed_of(run, f"rerank-server {kind}", kind, ubatch)


def speed_of(run: Run, name: str, kind: str, ubatch: int, model: str = "m3") -> Iterator[Row]:
    """ubatch: 0 for the server's choice."""
    settings, file = run.settings(ubatch=ubatch), run.file(model, kind)
    before, started = available_mb(), time.perf_counter()
    with opened(file, settings) as engine:
        load_s, chosen = time.perf_counter() - started, "" if ubatch else "by the server"
        for size in run.sizes:
            row = {"engine": name, "ubatch": settings.tuning.ubatch, "chosen": chosen, "size": size}
            row |= timed(engine, run.lists(size)) | {"load_s": load_s, "gpu_mb": gpu_used_mb(run)}
            resident_mb = rerank_server.resident_bytes() / 1e6
            yield row | {"host_mb": before - available_mb(), "resident_mb": resident_mb}


def timed(engine: rerank_server.Engine, lists: Sequence[Row]) -> Row:
    """Medians over the lists, longest pairs first, as the server sends them. ms: from texts to
    logits; ms_make of it until the token ids are there."""
    made, scored, n_tokens = [], [], []
    for one in [*lists[:WARM_UPS], *lists]:
        started = time.perf_counter()
        pairs = sorted(
            engine.pairs.make(one["query"], one["passages"]), key=lambda pair: -pair.n_new
        )
        ready = time.perf_counter()
        rerank_server.score_all(engine, pairs)
        made.append(ready - started)
        scored.append(time.perf_counter() - ready)
        n_tokens.append(sum(len(pair.ids) for pair in pairs))
    made, scored, n_tokens = made[-len(lists) :], scored[-len(lists) :], n_tokens[-len(lists) :]
    whole = [first + second for first, second in zip(made, scored, strict=True)]
    return {
        "ms": 1000 * statistics.median(whole), "ms_make": 1000 * statistics.median(made),
        "ms_score": 1000 * statistics.median(scored), "ms_score_min": 1000 * min(scored),
        "ms_score_max": 1000 * max(scored), "tokens": statistics.fmean(n_tokens),
        "tokens_per_second": statistics.median(n / s for n, s in zip(n_tokens, whole, strict=True)),
    }  # fmt: skip


def available_mb() -> float:
    """Of this machine's memory: what pinned pages take is in no process's resident size."""
    path = Path("/proc/meminfo")
    text = path.read_text(encoding="ascii") if path.is_file() else ""
    found = re.search(r"^MemAvailable:\s+(\d+)", text, re.MULTILINE)
    return int(found[1]) * 1024 / 1e6 if found else 0.0


def gpu_used_mb(run: Run) -> float:
    """On the whole card: cudaMemGetInfo, of the runtime that llama.cpp has loaded."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    if run.cpu or llama._lib.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)):
        return 0.0
    return (total.value - free.value) / 1e6


def ask_gpu(fields: str) -> str:
    """nvidia-smi's answer for the first card; "" without one."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=30
        ).stdout.strip()
    except OSError:
        return ""


def server(run: Run) -> Iterator[Row]:
    """The whole server over HTTP, as a user starts it."""
    for kind in run.types[:2]:
        flags = ("--gpu-layers", str(run.gpu_layers))
        setup = Setup("m3", {kind: run.file("m3", kind)}, None, Path(sys.executable), flags)
        running = Running(engines_of("m3", [kind], [])[0], setup)
        try:
            for size in run.sizes:
                yield {
                    "engine": f"{running.engine.name}, HTTP",
                    "size": size,
                    **asked(running, run.lists(size)),
                }
        finally:
            running.close()


def asked(running: Running, lists: Sequence[Row]) -> Row:
    requests = [Request(one["query"], tuple(one["passages"])) for one in lists]
    running.rerank(requests[0].query, requests[0].passages)
    times = [running.rerank(request.query, request.passages) for request in requests]
    n_tokens = [sum(map(len, one["ids"])) for one in lists]
    return {
        "ms": 1000 * statistics.median(times),
        "ms_min": 1000 * min(times),
        "ms_max": 1000 * max(times),
        "tokens_per_second": statistics.median(n / s for n, s in zip(n_tokens, times, strict=True)),
    }


def profile(run: Run) -> Iterator[Row]:
    """By operation, each waited for (no CUDA graph, nothing fused): the parts count, not the sum.
    In the last row the list as it is: what it takes beyond the operations is the host's work."""
    one = run.longest()
    for kind in run.types[:2]:
        for ubatch in (0, max(run.ubatches)):
            name, settings = f"rerank-server {kind}", run.settings(ubatch=ubatch)
            row = {"engine": name, "ubatch": settings.tuning.ubatch}
            costs = operations(run.file("m3", kind), settings, one)
            for operation in rows_of(costs, None, None)[:8]:
                yield row | operation
            total_ms = 1000 * sum(cost.seconds for cost in costs.values())
            yield row | {"operation": "all operations", "ms": total_ms}
            with opened(run.file("m3", kind), settings) as engine:
                yield row | {"operation": "the list", "ms": timed(engine, [one] * 5)["ms_score"]}


def operations(file: Path, settings: rerank_server.Settings, one: Row) -> dict[str, Cost]:
    profiler = Profiler(joins=False)
    with profiler.installed(), opened(file, settings) as engine:
        pairs = engine.pairs.make(one["query"], one["passages"])
        pairs.sort(key=lambda pair: -pair.n_new)
        for _ in range(3):
            profiler.take()
            rerank_server.score_all(engine, pairs)
        return profiler.take()


def twice(run: Run) -> Iterator[Row]:
    """Two engines, each in a thread with half of the list: does the card wait for the host?"""
    one = run.longest()
    halves = [one | {"passages": one["passages"][start::2]} for start in (0, 1)]
    for kind in run.types[:2]:
        with (
            opened(run.file("m3", kind), run.settings()) as first,
            opened(run.file("m3", kind), run.settings()) as second,
            ThreadPoolExecutor(2) as pool,
        ):
            alone = timed(first, [one] * LISTS)
            yield {"engine": f"rerank-server {kind}", "engines": 1, "ms": alone["ms"]}
            times = []
            for _ in range(LISTS):
                started = time.perf_counter()
                list(pool.map(score_half, (first, second), halves))
                times.append(1000 * (time.perf_counter() - started))
            yield {"engine": f"rerank-server {kind}", "engines": 2, "ms": statistics.median(times)}


def score_half(engine: rerank_server.Engine, one: Row) -> None:
    pairs = engine.pairs.make(one["query"], one["passages"])
    rerank_server.score_all(engine, sorted(pairs, key=lambda pair: -pair.n_new))


def mini(run: Run) -> Iterator[Row]:
    """A bi-encoder as wide and deep as all-MiniLM-L6, whose heads of 32 CUDA's flash attention
    lacks: as the server starts, without flash attention, and as llama.cpp itself decides."""
    directory = run.cache / "random-mini"
    if not (directory / "config.json").is_file():
        tiny_checkpoints.make_bi(directory, hidden_size=384, layers=6, max_seq_length=256)
    file = checkpoints.quantized(directory, ["Q8_0"])["Q8_0"]
    for name, forced_as in (
        ("on", llama.LLAMA_FLASH_ATTN_TYPE_ENABLED),
        ("off", llama.LLAMA_FLASH_ATTN_TYPE_DISABLED),
        ("as llama.cpp finds", llama.LLAMA_FLASH_ATTN_TYPE_AUTO),
    ):
        llama.LLAMA_FLASH_ATTN_TYPE_ENABLED = forced_as
        settings = run.settings()
        with opened(file, settings) as engine:
            for size in run.sizes:
                row = {"engine": f"flash attention {name}", "size": size}
                yield row | {"ubatch": settings.tuning.ubatch} | timed(engine, run.lists(size))


def gemma(run: Run) -> Iterator[Row]:
    """2.5 B parameters; only where --gemma asks for it."""
    if not run.with_gemma:
        return
    files = checkpoints.quantized(run.checkpoint("gemma"), ("Q8_0",))
    with opened(files["Q8_0"], run.settings(on_gpu=False, ubatch=32)) as engine:
        lists = [
            {
                **one,
                "ids": [
                    list(pair.ids) for pair in engine.pairs.make(one["query"], one["passages"])
                ],
            }
            for size in run.sizes
            for one in run.lists(size)
        ]
    lists_file = run.cache / "lists-gemma.json"
    lists_file.write_text(json.dumps(lists), encoding="utf-8")
    for ubatch in (0, *run.ubatches[:: len(run.ubatches) - 1]):
        yield from speed_of(run, "rerank-server Q8_0", "Q8_0", ubatch, "gemma")
    yield from run_peer(run, "gemma", lists_file)


# -- The steps and their report --------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """columns: key of a row -> (title, format); a key that a row lacks is left empty."""

    title: str
    work: Callable[[Run], Iterator[Row]]
    limit_s: int
    columns: dict[str, tuple[str, str]]
    environment: dict[str, str] = field(default_factory=dict)


PARITY = {
    "where": ("where", "{}"), "model": ("architecture", "{}"), "type": ("type", "{}"),
    **{how: (how, "{:.5f}") for how in (ALONE, *map(str, PARITY_UBATCHES))},
    "wrong_order": ("in a wrong order", "{}"), "within": ("within 1/400", "{}"),
}  # fmt: skip
SPEED = {
    "engine": ("engine", "{}"),
    "ubatch": ("ubatch", "{}"),
    "chosen": ("chosen", "{}"),
    "size": ("passages", "{}"),
    "ms": ("ms", "{:.1f}"),
    "ms_make": ("of it tokens", "{:.1f}"),
    "ms_score": ("of it scores", "{:.1f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "gpu_mb": ("GPU MB", "{:,.0f}"),
    "host_mb": ("host MB", "{:,.0f}"),
    "resident_mb": ("resident MB", "{:,.0f}"),
    "load_s": ("load s", "{:.1f}"),
}
AGREEMENT = {
    "engine": ("engine", "{}"), "pairs": ("pairs", "{}"), "mean": ("mean difference", "{:.5f}"),
    "largest": ("largest", "{:.5f}"), "spread": ("standard deviation of the logits", "{:.4f}"),
    "correlation": ("correlation", "{:.6f}"),
}  # fmt: skip
PEER = {
    "engine": ("engine", "{}"),
    "from": ("from", "{}"),
    "size": ("passages", "{}"),
    "batch": ("batch", "{}"),
    "ms": ("ms", "{:.1f}"),
    "ms_min": ("min", "{:.1f}"),
    "ms_max": ("max", "{:.1f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
}
TWICE = {"engine": ("engine", "{}"), "engines": ("engines", "{}"), "ms": ("ms", "{:.1f}")}
MODELS = {
    "model": ("model", "{}"),
    "files": ("files", "{}"),
    "ready_s": ("ready after s", "{:.1f}"),
}
SERVER = {
    key: PEER[key] for key in ("engine", "size", "ms", "ms_min", "ms_max", "tokens_per_second")
}
PROFILE = {
    "engine": ("engine", "{}"), "ubatch": ("ubatch", "{}"), "operation": ("operation", "{}"),
    "nodes": ("nodes", "{}"), "ms": ("ms", "{:.1f}"),
    "percent": ("%", "{:.1f}"), "gops": ("GOP/s", "{}"),
}  # fmt: skip
STEPS = {
    "models": Step("Models", make_models, 180, MODELS),
    "parity": Step(
        "Largest difference of a logit, as a part of their range, by tokens in a decode",
        parity,
        60,
        PARITY,
    ),
    "peer": Step("m3: transformers on the same card", peer, 90, PEER),
    "speed": Step("m3: this server's engine", speed, 180, SPEED),
    "agreement": Step("m3: logits against transformers in float32", agreement, 60, AGREEMENT),
    "server": Step("m3: over HTTP", server, 60, SERVER),
    "twice": Step("m3: two engines at once, a list of 100", twice, 60, TWICE),
    "mini": Step("A bi-encoder with heads of 32, Q8_0", mini, 60, SPEED),
    "profile": Step("m3: where a list of 100 spends its time", profile, 60, PROFILE),
    "parity-no-tf32": Step(
        "The same with float32 products in float32",
        parity,
        60,
        PARITY,
        {"NVIDIA_TF32_OVERRIDE": "0"},
    ),
    "parity-cpu": Step("The same with the GPU hidden", parity, 60, PARITY, NO_GPU),
    "agreement-cpu": Step(
        "m3: logits with the GPU hidden", agreement_on_cpu, 60, AGREEMENT, NO_GPU
    ),
    "gemma": Step("gemma", gemma, 240, {**PEER, **SPEED}),
}


BUILD = "RERANK_BENCH_BUILD"  # how bench/gpu.sh came by llama-cpp-python
CUT_OFF = "the whole run was cut off"


def run_step(name: str, arguments: Sequence[str], run: Run) -> Row:
    """In a process of its own. Returns {"seconds", "problem": "" or why it ended, "rows"}."""
    rows_file = run.cache / f"rows-{name}.json"
    rows_file.unlink(missing_ok=True)
    started = time.perf_counter()
    problem = end_of([sys.executable, "-m", "bench.gpu", *arguments, "--step", name], STEPS[name])
    rows = json.loads(rows_file.read_text(encoding="utf-8")) if rows_file.is_file() else []
    return {"seconds": time.perf_counter() - started, "problem": problem, "rows": rows}


def end_of(command: Sequence[str], step: Step) -> str:
    """Runs it; at the step's limit ends it with all that it has started. "" or what went wrong."""
    variables = os.environ | step.environment
    process = subprocess.Popen(command, cwd=ROOT, env=variables, start_new_session=True)
    try:
        status = process.wait(step.limit_s)
    except subprocess.TimeoutExpired:
        return f"it was stopped after {step.limit_s} s"
    except KeyboardInterrupt:
        return CUT_OFF
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"it ended with status {status}" if status else ""


def do_step(name: str, run: Run) -> int:
    """The child's part: prints and keeps every row as it comes."""
    rows: list[Row] = []
    for row in STEPS[name].work(run):
        rows.append(row)
        print(f"{name}: {json.dumps(row)}", flush=True)
        (run.cache / f"rows-{name}.json").write_text(json.dumps(rows) + "\n", encoding="utf-8")
    return 0


def describe(run: Run) -> Row:
    machine = describe_machine(run.peer_python, "bench.gpu")
    name, driver, total = (
        ("no GPU", "", "0") if run.cpu else split_card(ask_gpu("name,driver_version,memory.total"))
    )
    if not run.cpu and not llama.llama_supports_gpu_offload():
        folder = Path(llama.__file__).parent
        raise SystemExit(f"bench.gpu: the llama-cpp-python in {folder} was built without CUDA")
    return {
        **machine,
        "card": name,
        "driver": driver,
        "gpu_memory_mb": total,
        "build": os.environ.get(BUILD, ""),
    }


def split_card(answer: str) -> tuple[str, str, str]:
    """Raises SystemExit where nvidia-smi names no card."""
    fields = [field.strip() for field in answer.splitlines()[0].split(",")] if answer else []
    if len(fields) != 3:
        raise SystemExit(
            "bench.gpu: nvidia-smi names no card here; --cpu runs the same steps without one"
        )
    return fields[0], fields[1], fields[2]


def write(machine: Row, results: dict[str, Row], folder: Path) -> list[str]:
    lines = [f"# {machine['card']}", "", *head(machine), ""]
    lines += [f"- {line}" for line in verdicts(results)]
    for name, result in results.items():
        seconds = f", {result['seconds']:.0f} s" if result["seconds"] else ""
        lines += ["", f"## {STEPS[name].title}", "", f"{name}{seconds}", ""]
        lines += [f"Not complete: {result['problem']}.", ""] if result["problem"] else []
        lines += table(result["rows"], STEPS[name].columns)
    name = "gpu-" + re.sub(r"[^a-z0-9]+", "-", machine["card"].lower()).strip("-")
    return report.write_lines(folder, name, lines, {"machine": machine, "steps": results})


def head(machine: Row) -> list[str]:
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    memory = f"{float(machine['gpu_memory_mb']) / 1024:,.0f} GiB"
    card = f"driver {machine['driver']}, {memory}; " if machine["driver"] else ""
    build = f"; llama-cpp-python {machine['build']}" if machine["build"] else ""
    return [
        f"`{machine['command']}`, {machine['date']}, commit {machine['commit']}; {card}"
        f"{machine['cpus']} x {machine['cpu']}, {machine['system']}; Python {machine['python']}, "
        f"{packages}{build}",
    ]


def table(rows: Sequence[Row], columns: dict[str, tuple[str, str]]) -> list[str]:
    """As report.table, for rows of which some lack a key."""
    present = {key: column for key, column in columns.items() if any(key in row for row in rows)}
    cells = [
        {key: form.format(row[key]) if key in row else "" for key, (_, form) in present.items()}
        for row in rows
    ]
    titles = {key: (title, "{}") for key, (title, _) in present.items()}
    return report.table(cells, titles) if rows else []


def verdicts(results: dict[str, Row]) -> list[str]:
    """What the issue asked, in one line each; nothing about a step that is missing."""
    lines = []
    for name in ("parity", "parity-no-tf32", "parity-cpu"):
        rows = [row for row in results.get(name, {"rows": []})["rows"] if row["within"]]
        if rows:
            good = sum(row["within"] == "yes" for row in rows)
            most = max(row["largest"] for row in rows)
            lines.append(
                f"{name}: {good} of {len(rows)} architectures are within 1/400 of their logits' "
                f"range with F32 files (largest difference {most:.5f})"
            )
    return lines + ratios(results)


def ratios(results: dict[str, Row]) -> list[str]:
    """Ours, as the server starts, beside transformers from texts, for each length of list."""
    theirs = {
        row["size"]: row["ms"]
        for row in results.get("peer", {"rows": []})["rows"]
        if row["from"] == "texts"
    }
    ours = [
        row
        for row in results.get("speed", {"rows": []})["rows"]
        if row["chosen"] and row["size"] in theirs
    ]
    return [
        f"{row['engine']}, lists of {row['size']}: {row['ms']:.1f} ms, transformers "
        f"{theirs[row['size']]:.1f} ms: {theirs[row['size']] / row['ms']:.2f} times its speed"
        for row in ours
    ]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description="Scores, speed and memory on a GPU."
    )
    parser.add_argument(
        "--cpu", action="store_true", help="without a GPU, on small models: does the script work?"
    )
    parser.add_argument(
        "--steps",
        nargs="+",
        choices=list(STEPS),
        default=list(STEPS),
        help="default: all, in order",
    )
    parser.add_argument(
        "--gemma", action="store_true", help="also gemma at its true size (16 GB of disk)"
    )
    parser.add_argument(
        "--cache", type=Path, default=ROOT / "build" / "bench" / "gpu", help="where models are kept"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "build" / "gpu",
        help="where results go (default: build/gpu)",
    )
    parser.add_argument(
        "--peer-python",
        type=Path,
        default=Path(sys.executable),
        metavar="FILE",
        help="interpreter that has torch and transformers (default: this one)",
    )
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)  # the child's
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """1: a step failed or a logit is off."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(given)
    run = Run(
        arguments.cpu,
        arguments.cache.absolute(),
        arguments.out,
        arguments.peer_python,
        arguments.gemma,
    )
    run.cache.mkdir(parents=True, exist_ok=True)
    if arguments.step:
        return do_step(arguments.step, run)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is known is kept
    machine, results = describe(run), dict[str, Row]()
    for name in arguments.steps:
        results[name] = run_step(name, given, run)
        print(f"{name}: {results[name]['seconds']:.0f} s {results[name]['problem']}", flush=True)
        lines = write(machine, results, run.out)
        if results[name]["problem"] == CUT_OFF:
            break
    print("\n".join(lines))
    off = any(row.get("within") == "NO" for result in results.values() for row in result["rows"])
    return int(off or any(result["problem"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
