"""Asks an engine for batches that it was not made for, as a child process of tests/test_load.py: llama.cpp ends the
process for some of what it is given wrongly, so nothing of it may reach llama.cpp.

`python fuzz_engine.py FILE N_TRIES SEED`: pairs without tokens, with ids that the vocabulary does not have, longer than
the context, and hundreds at once, between good ones. Each batch must give a number for each pair or raise (the server
then answers 500), and after each a known pair must have the score that it had. Prints a JSON line with the counts.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rerank_server as server

QUERY, PASSAGE = "which bridge is old?", "the old stone bridge"
WRONG_IDS = (-1, -(2**31), 2**31 - 1, 10**6)
TOLERANCE = 2e-3  # of a logit: pairs packed with others and pairs alone differ by rounding


def bad_pair(good: server.Pair, longest: int, generator: random.Random) -> server.Pair:
    kind = generator.choice(["empty", "one", "wrong id", "long", "all shared", "other prefix"])
    ids = list(good.ids)
    if kind == "empty":
        return replace(good, ids=(), n_shared=0)
    if kind == "one":
        return replace(good, ids=good.ids[:1], n_shared=0)
    if kind == "wrong id":
        ids[generator.randrange(len(ids))] = generator.choice(WRONG_IDS)
    elif kind == "long":
        ids += [ids[-1]] * generator.choice([longest, longest + 1, 3 * longest])
    elif kind == "all shared":
        return replace(good, n_shared=len(ids))
    else:
        return replace(good, n_shared=generator.randrange(len(ids)))
    return replace(good, ids=tuple(ids))


def batch_of(engine: server.Engine, generator: random.Random) -> list[server.Pair]:
    n = generator.choice([0, 1, 2, 7, 70, 300])
    passages = [PASSAGE * generator.choice([0, 1, 2, 5, 40]) for _ in range(n)]
    pairs = engine.pairs.make(QUERY * generator.choice([0, 1, 3, 50]), passages)
    part = generator.choice([0, 0, 0.01, 0.5])
    for index in range(n):
        if generator.random() < part:
            pairs[index] = bad_pair(pairs[index], engine.pairs.longest, generator)
    return pairs


def main(file: Path, n_tries: int, seed: int) -> int:
    generator, counts = random.Random(seed), Counter[str]()
    for max_length, ubatch in ((32, 32), (64, 256), (256, 64)):
        engine = server.load_engine(file, server.Settings(max_length=max_length, ubatch=ubatch, threads=1))
        known = engine.pairs.make(QUERY, [PASSAGE])
        (expected,) = engine.score(known)
        for _ in range(n_tries // 3):
            batch = batch_of(engine, generator)
            try:
                logits = server.score_all(engine, batch)
                assert len(logits) == len(batch)
                counts["batches scored"] += 1
                counts["pairs scored"] += len(logits)
            except Exception:
                counts["batches refused"] += 1
            (logit,) = engine.score(known)
            assert abs(logit - expected) < TOLERANCE, (logit, expected)
        engine.close()
    print(json.dumps(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
