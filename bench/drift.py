"""How far quantised engines are from float32, on real weights: `python -m bench.drift CHECKPOINT FILE.gguf ...`.

CHECKPOINT is the directory that the files were made from. The reference is transformers in float32; beside each file
with llama.cpp's own kernels, with the int8 engine and with the bf16 engine stand ONNX Runtime with dynamic int8 and
OpenVINO, in the interpreter that --peers-python names. Where CHECKPOINT is a float32 GGUF file, llama.cpp's float32
kernels on it are the reference, and there are no peers (mini is an embedding model: none has a recipe for it).
Writes bench/results/drift-NAME.md and .json.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

import rerank_server
from bench import report
from bench.engines import ACCEL_LIBRARY, MAX_LENGTH_TOKENS, ROOT
from bench.machine import describe_machine
from bench.texts import Request, read_texts

LIST = 6
MODES: dict[str, dict[str, Any]] = {
    "": {"accel": "off"},
    ", int8 engine": {"accel": "int8"},
    ", bf16 engine": {"accel": "bf16"},
}
PEERS = {
    "ONNX Runtime int8": "onnxruntime", "OpenVINO, int8 weights": "openvino",
    "OpenVINO, int8 weights, bf16": "openvino-bf16", "OpenVINO, int8 weights, float32": "openvino-f32",
}  # fmt: skip
COLUMNS = {
    "engine": ("engine", "{}"),
    "mean": ("mean difference", "{:.4f}"),
    "largest": ("largest", "{:.4f}"),
    "drift": ("drift", "{:.4f}"),
    "correlation": ("correlation", "{:.5f}"),
}
# Run by --peers-python: lists of [query, passages] in, lists of logits out.
PEER = """
import json, pathlib, sys
from bench.peers import RECIPES
score = RECIPES[sys.argv[1]]("m3", pathlib.Path(sys.argv[2]))
print("\\n" + json.dumps([score(query, passages) for query, passages in json.load(sys.stdin)]))
"""

Logits = npt.NDArray[np.float64]


class PeerError(Exception):
    """A peer could not score."""


def of_peer(python: Path, recipe: str, checkpoint: Path, requests: Sequence[Request]) -> Logits:
    """Raises PeerError."""
    texts = json.dumps([(request.query, list(request.passages)) for request in requests])
    command = [str(python), "-c", PEER, recipe, str(checkpoint)]
    done = subprocess.run(command, input=texts, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise PeerError(f"{recipe}: {done.stderr.strip().splitlines()[-1]}")
    return np.concatenate(json.loads(done.stdout.splitlines()[-1]))


def of_file(file: Path, requests: Sequence[Request], mode: dict[str, Any]) -> Logits:
    """Raises rerank_server.ModelError and EngineError."""
    engine = rerank_server.load_engine(file, rerank_server.Settings(max_length=MAX_LENGTH_TOKENS, **mode))
    made = (engine.pairs.make(request.query, request.passages) for request in requests)
    lists = [rerank_server.score_all(engine, pairs) for pairs in made]
    engine.close()
    return np.concatenate(lists)


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each engine, with the differences of its logits from the reference's. Raises PeerError."""
    texts = [read_texts(data) for data in arguments.data or [None]]
    requests = [one.request(LIST) for one in texts for _ in range(arguments.lists)]
    of_checkpoint = functools.partial(
        of_peer, arguments.peers_python, checkpoint=arguments.checkpoint, requests=requests
    )
    has_peers = arguments.checkpoint.is_dir()
    reference = (
        of_checkpoint("transformers") if has_peers else of_file(arguments.checkpoint, requests, MODES[""])
    )
    modes = MODES if ACCEL_LIBRARY.is_file() else {"": MODES[""]}
    for file in tqdm(arguments.files, desc="files", leave=False):
        for name, mode in modes.items():
            yield row_of(f"{file.stem}{name}", of_file(file, requests, mode), reference)
    for name, recipe in PEERS.items() if has_peers else ():
        yield row_of(name, of_checkpoint(recipe), reference)


def row_of(name: str, logits: Logits, reference: Logits) -> dict[str, Any]:
    """drift: the mean difference, as a part of the reference's standard deviation."""
    differences = np.abs(logits - reference)
    mean, correlation = float(differences.mean()), float(np.corrcoef(logits, reference)[0, 1])
    return {
        "engine": name, "mean": mean, "largest": float(differences.max()), "drift": mean / float(reference.std()),
        "correlation": correlation, "pairs": len(logits),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m bench.drift", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="directory with the float32 or float16 weights, or F32.gguf")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="GGUF files made from it")
    parser.add_argument("--data", type=Path, action="append", metavar="DIR", help="texts: BEIR directories")
    parser.add_argument("--lists", type=int, default=20, help=f"lists of {LIST} pairs from each (default 20)")
    parser.add_argument("--peers-python", type=Path, default=Path(sys.executable), metavar="FILE",
                        help="interpreter with transformers, onnxruntime, openvino (default: this one)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="default: bench/results")
    arguments = parser.parse_args(argv)
    arguments.peers_python = arguments.peers_python.absolute()
    arguments.checkpoint = arguments.checkpoint.absolute()
    try:
        rows = list(measure(arguments))
    except (PeerError, rerank_server.ModelError, rerank_server.EngineError) as error:
        print(f"bench.drift: {error}", file=sys.stderr)
        return 1
    machine = describe_machine(arguments.peers_python, "bench.drift")
    reference = "transformers" if arguments.checkpoint.is_dir() else "llama.cpp"
    lines = [
        f"# drift of {arguments.checkpoint.stem}", "",
        f"`{machine['command']}`, {machine['date']}, commit {machine['commit']}", "",
        f"Logits of {rows[0]['pairs']} pairs, against {reference} in float32.", "", *report.table(rows, COLUMNS),
    ]  # fmt: skip
    report.write_lines(arguments.out, f"drift-{arguments.checkpoint.stem}", lines, {"machine": machine, "rows": rows})
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
