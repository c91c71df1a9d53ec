"""Opens damaged copies of a GGUF file, as a child process of tests/test_gguf.py: a crash ends this process only.

`python fuzz_gguf.py FILE SCRATCH SECONDS N_TRIES SEED`: flips, overwrites, inserts and cuts bytes, mostly in the
header, and opens each copy as the server does. ModelError is the right answer; a copy that is still good must score a
number, or say that it cannot. Prints a JSON line with the counts. The damage of each try is in SCRATCH.txt before it is
opened, so that a crash can be repeated.
"""

from __future__ import annotations

import json
import random
import struct
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rerank_server

INTERESTING = [0, 1, 2, 3, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]


def damage(data: bytearray, header_bytes: int, generator: random.Random) -> str:
    """Changes data in place; returns what was done."""
    kind = generator.choice(["flip", "flip", "u32", "u64", "u64", "cut", "insert", "remove"])
    place = generator.randrange(header_bytes if generator.random() < 0.9 else len(data))
    if kind == "flip":
        data[place] ^= 1 << generator.randrange(8)
    elif kind in ("u32", "u64"):
        size = 4 if kind == "u32" else 8
        value = generator.choice(INTERESTING) % (1 << (8 * size))
        data[place : place + size] = struct.pack("<I" if size == 4 else "<Q", value)
    elif kind == "cut":
        del data[place:]
    elif kind == "insert":
        data[place:place] = bytes(generator.randrange(256) for _ in range(generator.randrange(1, 9)))
    else:
        del data[place : place + generator.randrange(1, 9)]
    return f"{kind} at {place}"


def main(file: Path, scratch: Path, seconds: float, n_tries: int, seed: int) -> int:
    original, generator, counts = file.read_bytes(), random.Random(seed), Counter[str]()
    first_tensor = min(tensor.offset for tensor in rerank_server.GgufFile.open(file).tensors.values())
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and counts.total() < n_tries:
        data = bytearray(original)
        done = [damage(data, min(first_tensor, len(data)), generator) for _ in range(generator.choice([1, 1, 1, 3]))]
        scratch.write_bytes(data)
        scratch.with_suffix(".txt").write_text("; ".join(done))
        try:
            engine = rerank_server.load_engine(scratch, rerank_server.Settings(max_length=64, ubatch=64, threads=1))
        except rerank_server.ModelError as error:
            counts["refused" if "\n" not in str(error) else "refused in several lines"] += 1
            continue
        try:
            (logit,) = engine.score(engine.pairs.make("query", ["passage"]))
            assert 0 <= rerank_server.score_of(engine.description, logit) <= 1, logit
            counts["scored"] += 1
        except rerank_server.EngineError:  # a NaN or an infinity, which never becomes a score
            counts["failed"] += 1
        finally:
            engine.close()
    print(json.dumps({"tried": counts.total(), **counts}))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])))
