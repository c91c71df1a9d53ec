"""PyTorch's side of bench/gpu.py: a model's logits in float32, and its speed as people run it.

    python -m bench.gpu_peer m3|gemma CHECKPOINT LISTS DEVICE OUT

Runs in the interpreter that has torch and transformers, and imports nothing of this project. Timed
is transformers with sdpa attention, in float16 on a GPU and in float32 on a CPU, pairs sorted by
length and padded in batches of the size that proves fastest: once from token ids, and for m3 once
from texts with transformers' own tokenizer. OUT is written after every part.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

MAX_LENGTH_TOKENS = 512
BATCHES = (8, 16, 32, 64, 128)  # pairs
TRIES = 3  # of each batch size, to find the fastest
YES_ID = 3553  # of bge-reranker-v2-gemma; any other id costs the same

Ids = Sequence[Sequence[int]]
Logits = list[float]
Score = Callable[[dict[str, Any], int], Logits]  # a list, pairs in a batch


class Model:
    """A checkpoint on a device. Calls end with the logits in memory, so that times are whole."""

    def __init__(self, kind: str, checkpoint: Path, device: str, dtype: torch.dtype) -> None:
        self.device, self.is_encoder = device, kind == "m3"
        make = AutoModelForSequenceClassification if self.is_encoder else AutoModelForCausalLM
        model = make.from_pretrained(str(checkpoint), dtype=dtype, attn_implementation="sdpa")
        self.model = model.to(device).eval()
        self.pad_id = self.model.config.pad_token_id

    def logits(self, ids: Ids, batch: int) -> Logits:
        """Of each pair, in order."""
        order = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
        waiting = []
        with torch.inference_mode():
            for first in range(0, len(order), batch):
                indices = order[first : first + batch]
                waiting.append((indices, self._forward([ids[index] for index in indices])))
        found = [0.0] * len(ids)
        for (
            indices,
            values,
        ) in waiting:  # read last: a GPU computes one batch while the next one is padded
            for index, value in zip(indices, values.tolist(), strict=True):
                found[index] = value
        return found

    def _forward(self, ids: Ids) -> Any:
        """An encoder is padded at the end, a decoder at the beginning, whose last token counts."""
        longest = max(map(len, ids))
        fills = [[self.pad_id] * (longest - len(one)) for one in ids]
        rows = [
            [*one, *fill] if self.is_encoder else [*fill, *one]
            for one, fill in zip(ids, fills, strict=True)
        ]
        padded = torch.tensor(rows).to(self.device, non_blocking=True)
        mask = (padded != self.pad_id).long()
        if self.is_encoder:
            return self.model(input_ids=padded, attention_mask=mask).logits.view(-1).float()
        logits = self.model(
            input_ids=padded, attention_mask=mask, use_cache=False, logits_to_keep=1
        ).logits
        return logits[:, -1, min(YES_ID, logits.shape[-1] - 1)].float()


def seconds_of(score: Score, one: dict[str, Any], batch: int) -> float:
    started = time.perf_counter()
    score(one, batch)
    return time.perf_counter() - started


def speed_rows(
    name: str, score: Score, lists: list[dict[str, Any]], source: str
) -> list[dict[str, Any]]:
    """A row for each length of list: medians, with the batch that is fastest on the first list."""
    rows = []
    for size in sorted({one["size"] for one in lists}):
        same = [one for one in lists if one["size"] == size]
        tried = {
            batch: min(seconds_of(score, same[0], batch) for _ in range(TRIES))
            for batch in sorted({min(batch, size) for batch in BATCHES})
        }
        best = min(tried, key=tried.__getitem__)
        for one in same:  # every shape once: cuBLAS chooses its kernels at the first
            score(one, best)
        times = [seconds_of(score, one, best) for one in same]
        rows.append(
            speed_row(name, source, size, best, times, [sum(map(len, one["ids"])) for one in same])
        )
    return rows


def speed_row(
    name: str, source: str, size: int, batch: int, times: Sequence[float], n_tokens: Sequence[int]
) -> dict[str, Any]:
    return {
        "engine": name,
        "from": source,
        "size": size,
        "batch": batch,
        "ms": 1000 * statistics.median(times),
        "ms_min": 1000 * min(times),
        "ms_max": 1000 * max(times),
        "tokens": statistics.fmean(n_tokens),
        "tokens_per_second": statistics.median(n / s for n, s in zip(n_tokens, times, strict=True)),
    }


def main() -> int:
    kind, checkpoint, lists_file, device, out = (
        sys.argv[1],
        Path(sys.argv[2]),
        Path(sys.argv[3]),
        *sys.argv[4:],
    )
    lists = json.loads(lists_file.read_text(encoding="utf-8"))
    result: dict[str, Any] = {"torch": torch.__version__, "device": device, "rows": []}

    def save(**values: Any) -> None:
        result.update(values)
        Path(out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    torch.backends.cuda.matmul.allow_tf32 = False
    longest = next(one for one in lists if one["size"] == max(one["size"] for one in lists))["ids"]
    save(logits_float32=Model(kind, checkpoint, device, torch.float32).logits(longest, 16))
    dtype = torch.float16 if device == "cuda" else torch.float32
    model, name = (
        Model(kind, checkpoint, device, dtype),
        f"transformers, {str(dtype).removeprefix('torch.')}",
    )
    save(name=name, logits=model.logits(longest, 16))
    save(rows=speed_rows(name, lambda one, batch: model.logits(one["ids"], batch), lists, "ids"))
    save(gpu_peak_mb=torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else 0.0)
    if kind == "m3":
        score = from_texts(model, AutoTokenizer.from_pretrained(str(checkpoint)))
        save(rows=result["rows"] + speed_rows(name, score, lists, "texts"))
    return 0


def from_texts(model: Model, tokenizer: Any) -> Score:
    def score(one: dict[str, Any], batch: int) -> Logits:
        pairs = [(one["query"], passage) for passage in one["passages"]]
        ids = tokenizer(pairs, truncation="only_second", max_length=MAX_LENGTH_TOKENS)["input_ids"]
        return model.logits(ids, batch)

    return score


if __name__ == "__main__":
    sys.exit(main())
