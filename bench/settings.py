"""python -m bench.settings FILE.gguf ...: what each setting of the engine is worth on this machine.

Every variant of VARIANTS differs from the server's own choice in one setting, and is measured beside it on the same
lists. Writes bench/results/settings.md and .json.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import rerank_server
from bench import report
from bench.engines import MAX_LENGTH_TOKENS
from bench.machine import describe_machine
from bench.texts import Request, Texts, made_lists, read_texts

# name -> the one setting that differs from the server's choice
VARIANTS: dict[str, dict[str, Any]] = {
    "the server's choice": {},
    **{f"--ubatch {n}": {"ubatch": n} for n in (128, 192, 256, 384, 512, 1024)},
    "--threads 1": {"threads": 1},
    "--accel off": {"accel": "off"},
    "--accel bf16": {"accel": "bf16"},
}
# Not a setting: what gemma would do if it computed the query anew for each passage, as other servers do.
NO_SHARED_PREFIX = "the query anew for each passage"
COLUMNS = {
    "file": ("file", "{}"),
    "variant": ("variant", "{}"),
    "tokens_per_second": ("tokens/s", "{:.0f}"),
    "slowest": ("min", "{:.0f}"),
    "fastest": ("max", "{:.0f}"),
    "ratio": ("of the choice", "{:.2f}"),
    "ratio_low": ("lowest", "{:.2f}"),
    "ratio_high": ("highest", "{:.2f}"),
}


class Variant:
    """An engine with one setting changed, and its speed in each round."""

    def __init__(self, file: Path, name: str) -> None:
        self.file, self.name, self.speeds = file, name, list[float]()
        settings = rerank_server.Settings(max_length=MAX_LENGTH_TOKENS, **VARIANTS.get(name, {}))
        self._engine = rerank_server.load_engine(file, settings)

    def measure(self, request: Request) -> None:
        """Tokens per second over one list, longest first, as the server sends it."""
        pairs = sorted(self._engine.pairs.make(request.query, request.passages), key=lambda pair: -pair.n_new)
        if self.name == NO_SHARED_PREFIX:
            pairs = [dataclasses.replace(pair, n_shared=0) for pair in pairs]
        started = time.perf_counter()
        rerank_server.score_all(self._engine, pairs)
        self.speeds.append(sum(len(pair.ids) for pair in pairs) / (time.perf_counter() - started))

    def close(self) -> None:
        self._engine.close()


def compare(files: Sequence[Path], names: Sequence[str], requests: Sequence[Request]) -> list[dict[str, Any]]:
    """One row for each file and variant. Each variant is measured beside the first one of the same file, list by list,
    the order changing: on a shared machine only neighbours in time can be compared."""
    rows = []
    for file in files:
        choice = Variant(file, names[0])
        for name in tqdm(names[1:], desc=file.stem, leave=False):
            rows.append(_beside(choice, Variant(file, name), requests))
        rows.insert(len(rows) - len(names) + 1, _row(choice, [1.0]))
        choice.close()
    return rows


def _beside(choice: Variant, variant: Variant, requests: Sequence[Request]) -> dict[str, Any]:
    variant.measure(Request("warm up", requests[0].passages))
    variant.speeds.clear()
    ratios = []
    for number, request in enumerate(requests):
        for one in (choice, variant) if number % 2 else (variant, choice):
            one.measure(request)
        ratios.append(variant.speeds[-1] / choice.speeds[-1])
    variant.close()
    return _row(variant, ratios)


def _row(variant: Variant, ratios: Sequence[float]) -> dict[str, Any]:
    return {
        "file": variant.file.stem, "variant": variant.name, "tokens_per_second": statistics.median(variant.speeds),
        "slowest": min(variant.speeds), "fastest": max(variant.speeds), "ratio": statistics.median(ratios),
        "ratio_low": min(ratios), "ratio_high": max(ratios),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.settings", description="What each setting is worth here.")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="GGUF files")
    parser.add_argument(
        "--variants", nargs="+", choices=[*VARIANTS, NO_SHARED_PREFIX], default=list(VARIANTS), metavar="NAME",
        help=f"{', '.join(VARIANTS)}, {NO_SHARED_PREFIX}; the first one is what the others are compared with",
    )  # fmt: skip
    parser.add_argument("--data", type=Path, metavar="DIR", help="texts: a BEIR directory with a bm25*.tsv run")
    parser.add_argument("--words", type=int, nargs=2, metavar=("QUERY", "PASSAGE"), help="made texts of this length")
    parser.add_argument("--passages", type=int, default=10, help="in each list (default 10)")
    parser.add_argument("--runs", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--name", default="settings", help="of the files that are written (default: settings)")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="default: bench/results")
    arguments = parser.parse_args(argv)
    machine = describe_machine(Path(sys.executable), "bench.settings")
    texts = Texts(made_lists(*arguments.words)) if arguments.words else read_texts(arguments.data)
    requests = [texts.request(arguments.passages) for _ in range(arguments.runs)]
    rows = compare(arguments.files, arguments.variants, requests)
    print("\n".join(write(machine, rows, arguments.out, arguments.name)))
    return 0


def write(machine: dict[str, Any], rows: list[dict[str, Any]], folder: Path, name: str) -> list[str]:
    lines = [
        f"# {name}", "", f"`{machine['command']}`, {machine['date']}, commit {machine['commit']}; "
        f"{machine['cpus']} x {machine['cpu']}; medians; each variant beside the first, list by list", "",
        *report.table(rows, COLUMNS),
    ]  # fmt: skip
    return report.write_lines(folder, name, lines, {"machine": machine, "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
