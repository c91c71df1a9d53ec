"""Opens checkpoints whose JSON files were changed, as a child process of tests/test_convert_hostile.py.

`python fuzz_convert.py CHECKPOINT SECONDS N_TRIES SEED`: changes types, drops keys, nests wrongly, and
puts huge values into config.json, tokenizer.json and tokenizer_config.json (in place: give it a copy),
and opens each as `python -m convert` does. ConvertError in one line is the right answer; what is still
good is written. Prints a JSON line with the counts; any other exception ends it, with the change.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from convert.errors import ConvertError
from convert.job import Job

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
VALUES: list[Any] = [
    None, True, False, 0, 1, 2, -1, 7, 0.5, -0.0, 1e308, float("nan"), float("inf"), 2**24, 2**31, 2**64, 10**400,
    "", "x", "▁", "\0", "\ud800", "é", "0", "x" * 100_000, [], [[]], ["a"], [None], {}, {"a": 1}, {"type": "Sequence"},
    {"type": 7}, [["a", 0.0]], {"content": 7}, [{"id": -1, "content": "x"}],
]  # fmt: skip
MOST_PLACES = 400  # of one list or object: a vocabulary must not draw every change to itself


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys that lead to each value inside."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    found = [path]
    for key in keys[:MOST_PLACES] if len(keys) < MOST_PLACES else [*keys[:5], *keys[-5:]]:
        found += places(value[key], (*path, key))
    return found


def change(content: Any, generator: random.Random) -> tuple[Any, str]:
    """A changed copy, and what was done."""
    content = copy.deepcopy(content)
    path = generator.choice(places(content))
    if not path:
        return (value := generator.choice(VALUES)), f"all = {value!r:.60}"
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    kind = generator.choice(["value", "value", "value", "drop", "wrap", "twin"])
    if kind == "drop":
        del parent[path[-1]]
    elif kind == "wrap":
        parent[path[-1]] = generator.choice([[parent[path[-1]]], {"x": parent[path[-1]]}])
    elif kind == "twin" and isinstance(parent, dict):
        parent[generator.choice(list(parent))] = parent[path[-1]]
    else:
        parent[path[-1]] = generator.choice(VALUES)
    return content, f"{kind} at {path!r:.100}: {parent!r:.60}"


def attempt(directory: Path) -> str:
    try:
        job = Job.open(directory)
        job.write(directory / "out.gguf", half=True)
        job.checkpoint.close()
    except ConvertError as error:
        return "refused" if "\n" not in str(error) else "refused in several lines"
    return "converted"


def main(directory: Path, seconds: float, n_tries: int, seed: int) -> int:
    generator, counts = random.Random(seed), Counter[str]()
    originals = {name: (directory / name).read_bytes() for name in FILES if (directory / name).is_file()}
    assert attempt(directory) == "converted", "the checkpoint must be good before it is changed"
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and counts.total() < n_tries:
        name = generator.choice(list(originals))
        content, done = json.loads(originals[name]), []
        for _ in range(generator.choice([1, 1, 1, 3])):
            content, what = change(content, generator)
            done.append(what)
        (directory / name).write_text(json.dumps(content), encoding="utf-8")
        (directory / "damage.txt").write_text(f"{name}: {'; '.join(done)}", "utf-8", "backslashreplace")
        counts[attempt(directory)] += 1
        (directory / name).write_bytes(originals[name])
    print(json.dumps({"tried": counts.total(), **counts}))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
