"""A minute, in all, of many badly behaved clients; `make soak ARGS="--minutes 10"` is the long form."""

from __future__ import annotations

from conftest import FUZZED, Gguf
from soak import CLIENTS, KINDS, Soak

SECONDS = 45


def test_a_minute_of_load_and_faults_loses_nothing(gguf_of: Gguf) -> None:
    soak = Soak({"m3": gguf_of("xlmr"), "gemma": gguf_of("gemma")}, SECONDS).run()
    counts = FUZZED[f"a server with {CLIENTS} clients"]
    for (_, result), n in soak.outcomes.items():
        counts[result if result == "closed" else f"answered {result}"] += n
    counts["scores compared"] = soak.n_scores
    assert not soak.failures, "\n".join([*soak.failures[:10], *soak.notes])
    assert {name for name, _ in soak.outcomes} == {kind.name for kind in KINDS}
    assert soak.n_scores > 500
