"""python -m bench.profile FILE.gguf: where the time of one decode goes, by operation, and how far that is from the
machine's own peak.

llama.cpp's eval callback stops after every node of the graph, so that each can be timed; that costs a few microseconds
a node, and what the CPU backend would fuse is not fused. With the engine of accel/ (--accel) what it computes in the
same pass is timed together. Matrix products are compared with the fastest float32 and int8 products that PyTorch does
here, where --peers-python has it. Writes bench/results/profile-NAME.md and .json.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama

import rerank_server
from bench import report
from bench.engines import MAX_LENGTH_TOKENS
from bench.machine import describe_machine
from bench.texts import read_texts

COLUMNS = {
    "operation": ("operation", "{}"),
    "nodes": ("nodes", "{}"),
    "ms": ("ms", "{:.1f}"),
    "percent": ("% of the time", "{:.1f}"),
    "gops": ("GOP/s", "{}"),
    "of_float32": ("% of the float32 peak", "{}"),
    "of_int8": ("% of the int8 peak", "{}"),
}


class _Tensor(ctypes.Structure):
    """The head of struct ggml_tensor (ggml.h)."""

    _fields_ = (
        ("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int), ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10), ("view_src", ctypes.c_void_p), ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64),
    )  # fmt: skip


_describe_operation = rerank_server._native("ggml_op_desc", ctypes.c_char_p, ctypes.c_void_p)


@dataclass
class Cost:
    """Of one kind of operation in one decode."""

    nodes: int = 0
    seconds: float = 0.0
    operations: float = 0.0  # multiplications and additions of matrix products



class Profiler:
    """Times every node of the contexts that are opened while it is installed.

    joins: whether nodes that the engine of accel/ computes in one pass are timed together. What follows a node is only
    known when it was there once: from the second decode on.
    """

    def __init__(self, joins: bool) -> None:
        self.costs: dict[str, Cost] = defaultdict(Cost)
        self._joins, self._followed = joins, set[tuple[str, bytes, bytes]]()  # nodes not to stop after
        self._last: _Tensor | None = None
        self._group: list[_Tensor] = []
        self._started = 0.0
        self._callback = llama.ggml_backend_sched_eval_callback(self._on_node)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """The server opens its context itself; the only way in is through the defaults that it starts from."""
        make = llama.llama_context_default_params

        def with_callback() -> Any:
            parameters = make()
            parameters.cb_eval = self._callback
            return parameters

        llama.llama_context_default_params = with_callback
        try:
            yield
        finally:
            llama.llama_context_default_params = make

    def take(self) -> dict[str, Cost]:
        """What was counted since the last call."""
        costs, self.costs = dict(self.costs), defaultdict(Cost)
        return costs

    def _on_node(self, address: int, is_question: bool, user_data: Any) -> bool:
        return self._ask(address) if is_question else self._count()

    def _ask(self, address: int) -> bool:
        """Whether to stop after this node."""
        node = _Tensor.from_address(address)
        if self._joins and self._last is not None and _are_one_pass(self._last, node):
            self._followed.add(_key(self._last))
        if not self._group:
            self._started = time.perf_counter()
        self._group.append(node)
        self._last = node
        return _key(node) not in self._followed

    def _count(self) -> bool:
        operations = [_operation(node) for node in self._group]
        computed = [name for name in operations if name not in _VIEWS] if len(operations) > 1 else operations
        cost = self.costs[" + ".join(computed)]
        cost.nodes += 1
        cost.seconds += time.perf_counter() - self._started
        for node in self._group:
            if _operation(node) == "MUL_MAT":
                n_inner, n_rows, n_columns = _source(node, 0).ne[0], node.ne[0], node.ne[1]
                cost.operations += 2.0 * n_inner * n_rows * n_columns * node.ne[2] * node.ne[3]
        self._group.clear()
        return True


def _operation(node: _Tensor) -> str:
    described: bytes = _describe_operation(ctypes.addressof(node))
    return described.decode()


def _source(node: _Tensor, index: int) -> _Tensor:
    return _Tensor.from_address(node.src[index]) if node.src[index] else _Tensor()


def _key(node: _Tensor) -> tuple[str, bytes, bytes]:
    """The same for a node in every graph of a context."""
    return _operation(node), node.name, _source(node, 0).name


# What the engine computes in one pass, where the second reads the first's result.
_PAIRS = {
    ("MUL_MAT", "ADD"), ("MUL_MAT", "GEGLU"), ("ADD", "GELU"), ("ADD", "ADD"), ("NORM", "MUL"), ("RMS_NORM", "MUL"),
    ("MUL", "ADD"), ("PERMUTE", "CPY"),
}  # fmt: skip
# Attention reads what its half-precision keys and values are copies of; they stand before it, one after the other.
_NEIGHBOURS = {("CPY", "PERMUTE"), ("CPY", "FLASH_ATTN_EXT")}
_VIEWS = {"PERMUTE", "RESHAPE", "VIEW"}


def _are_one_pass(node: _Tensor, following: _Tensor) -> bool:
    """Whether the engine computes the two together: a layer's product, what is added to it, its activation; a
    normalisation; attention."""
    kinds = _operation(node), _operation(following)
    if following.src[0] != ctypes.addressof(node):
        return kinds in _NEIGHBOURS
    if node_of_layer := {"MUL_MAT": node, "ADD": _source(node, 0)}.get(kinds[0]):
        weights: bytes = _source(node_of_layer, 0).name
        return kinds in _PAIRS and weights.startswith(b"blk.")
    return kinds in _PAIRS


_PEAKS = """
import sys, time, torch
def peak(multiply):
    best, end = 9.0, time.perf_counter() + 2
    while time.perf_counter() < end:
        start = time.perf_counter(); multiply(); best = min(best, time.perf_counter() - start)
    return 2 * n * 1024 * 4096 / best / 1e9
n = int(sys.argv[1])
a, b = torch.ones(n, 1024), torch.ones(4096, 1024).t()
c, d = a.to(torch.int8), b.to(torch.int8)
print(peak(lambda: a @ b), peak(lambda: torch._int_mm(c, d)))
"""


def peaks(python: Path, n_tokens: int) -> tuple[float | None, float | None]:
    """GOP/s of PyTorch's float32 and int8 products [n_tokens, 1024] x [1024, 4096]; None without PyTorch."""
    command = [str(python), "-c", _PEAKS, str(n_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return None, None
    float32, int8 = map(float, done.stdout.split())
    return float32, int8


def profile(
    file: Path, data: Path | None, n_passages: int, n_runs: int, accel: str = "off"
) -> tuple[dict[str, Cost], int]:
    """The median-time run of a list's decodes, and the list's tokens."""
    profiler = Profiler(accel != "off")
    with profiler.installed():
        engine = rerank_server.load_engine(file, rerank_server.Settings(max_length=MAX_LENGTH_TOKENS, accel=accel))
    request = read_texts(data).request(n_passages)
    pairs = sorted(engine.pairs.make(request.query, request.passages), key=lambda pair: -pair.n_new)
    runs = []
    for _ in range(n_runs + 1):
        rerank_server.score_all(engine, pairs)
        runs.append(profiler.take())
    engine.close()
    ordered = sorted(runs[1:], key=lambda costs: sum(cost.seconds for cost in costs.values()))
    return ordered[len(ordered) // 2], sum(len(pair.ids) for pair in pairs)


def rows_of(costs: dict[str, Cost], float32: float | None, int8: float | None) -> list[dict[str, Any]]:
    total = sum(cost.seconds for cost in costs.values())
    rows = []
    for name, cost in sorted(costs.items(), key=lambda item: -item[1].seconds):
        speed = cost.operations / cost.seconds / 1e9
        rows.append({
            "operation": name, "nodes": cost.nodes, "ms": 1000 * cost.seconds, "percent": 100 * cost.seconds / total,
            "gops": f"{speed:,.0f}" if speed else "", "of_float32": _percent(speed, float32),
            "of_int8": _percent(speed, int8),
        })  # fmt: skip
    return rows


def _percent(speed: float, peak: float | None) -> str:
    return f"{100 * speed / peak:.0f}" if speed and peak else ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description="Where the time of a decode goes.")
    parser.add_argument("file", type=Path, help="GGUF file")
    parser.add_argument("--data", type=Path, metavar="DIR", help="texts: a BEIR directory with a bm25*.tsv run")
    parser.add_argument("--passages", type=int, default=10, help="in the list (default 10)")
    parser.add_argument("--runs", type=int, default=5, help="the median one counts (default 5)")
    parser.add_argument("--peers-python", type=Path, default=Path(sys.executable), metavar="FILE",
                        help="interpreter that has PyTorch, for the int8 peak (default: this one)")  # fmt: skip
    parser.add_argument("--accel", choices=["int8", "bf16"], default="off", help="with the engine of accel/")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="default: bench/results")
    arguments = parser.parse_args(argv)
    machine = describe_machine(arguments.peers_python, "bench.profile")
    float32, int8 = peaks(arguments.peers_python, rerank_server.Settings().tuning.ubatch)
    costs, n_tokens = profile(
        arguments.file, arguments.data, arguments.passages, arguments.runs, arguments.accel
    )
    engine = "" if arguments.accel == "off" else f"-{arguments.accel}-engine"
    rows, name = rows_of(costs, float32, int8), arguments.file.stem + engine
    print("\n".join(write(name, machine, rows, (float32, int8), n_tokens, arguments.out)))
    return 0


def write(
    name: str, machine: dict[str, Any], rows: list[dict[str, Any]], found: tuple[float | None, float | None],
    n_tokens: int, folder: Path,
) -> list[str]:  # fmt: skip
    float32, int8 = found
    peak = f"float32 {float32:,.0f}, int8 {int8:,.0f} GOP/s" if float32 and int8 else "not measured"
    seconds = sum(row["ms"] for row in rows) / 1000
    lines = [
        f"# profile of {name}", "", f"`{machine['command']}`, {machine['date']}, commit {machine['commit']}; "
        f"{machine['cpus']} x {machine['cpu']}", "",
        f"{n_tokens:,} tokens in {seconds:.2f} s ({n_tokens / seconds:,.0f} tokens/s while every node is timed). This "
        f"machine's peak: {peak}.", "",
        *report.table(rows, COLUMNS),
    ]  # fmt: skip
    content = {"machine": machine, "float32_gflops": float32, "int8_gops": int8, "tokens": n_tokens, "rows": rows}
    return report.write_lines(folder, f"profile-{name}", lines, content)


if __name__ == "__main__":
    sys.exit(main())
