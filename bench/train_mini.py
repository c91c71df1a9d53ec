"""Trains a small cross-encoder: `python -m bench.train_mini --data DIR --out DIR` (extras convert, bench and train).

From a BERT checkpoint (all-MiniLM-L6-v2 unless --base says otherwise) and a folder with pairs of files
NAME.passages.jsonl.gz `{id, text}` and NAME.questions.jsonl.gz `{query, positives: [id], answers: [str]}` to a GGUF.

The student reads query and passage together and learns what two teachers say who cannot: the cosine of a bi-encoder
(--teacher) and BM25, added after scaling, with LABEL_BONUS for the passage that the data calls right. Each example is a
list of one query and LIST_SIZE windows of passages: the right one, some of BM25's and of the bi-encoder's best, and
random ones. Half of the queries are sentences of passages, since claims and topics are asked for, too. Loss: the
listwise divergence from the teachers' softmax, and a little squared error, which gives the logits their level. What is
kept is an exponential average of the weights. BEIR directories named with --exclude are never trained on: whatever
query or passage stands there is dropped, and counted.

In --out: config.json, lists.jsonl.gz (the examples), state.pt (to go on from after a stop), training.json
(configuration, data, loss and held-out results), checkpoint/ and the GGUF. The same seed, base and data give the same
examples in the same order. A second round starts from the first's: --base OUT/checkpoint with another --out and --seed.
A GPU is used where torch finds one.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

try:
    import bm25s
    import torch
    from tqdm import tqdm
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
except ModuleNotFoundError as error:
    sys.exit(f"bench.train_mini: {error.name} is missing: pip install -e '.[convert,bench,train]'")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from convert.models import MODELS

LIST_SIZE = 6
HARD_POOL = 20  # of BM25's, and of the bi-encoder's, best this many the hard negatives are drawn
COSINE_SCALE, COSINE_BIAS = 8.078, -2.834  # to logits: fitted on questions and BM25's candidates for all-MiniLM-L6-v2
BM25_SCALE = 0.8  # logits for one standard deviation of BM25: as much as one of the cosine among a query's best
LABEL_BONUS = 1.0  # logits
LEVEL_WEIGHT = 0.05  # of the squared error, beside the listwise loss
HELD_OUT = 200  # lists that are only measured
WINDOW_WORDS = (16, 96)  # a passage is read through a window of so many words, drawn log-uniformly
SENTENCE_WORDS = (6, 30)  # of a passage's sentence that serves as a query
GROUPS = 4  # a batch is computed in so many parts of like length, so that little of it is padding
CHECKPOINT_STEPS = 25
AVERAGE_DECAY = 0.99
MAX_TOKENS = 160
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class UnusableError(Exception):
    """What was given cannot be trained on or gone on with; the message names it."""


@dataclass(frozen=True)
class Config:
    """What a run depends on; a run that is continued must have the same."""

    base: str
    teacher: str
    seed: int
    steps: int
    lists_per_step: int
    learning_rate: float
    queries_per_set: int
    passages_per_set: int


@dataclass(frozen=True)
class Example:
    """A query and its passages. targets: the teachers' logits, one for each. is_right: the data calls the first so."""

    query: str
    passages: list[str]
    targets: list[float]
    is_right: bool


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def texts_of(directories: Sequence[Path]) -> set[str]:
    """All queries and passages of BEIR directories, normalised."""
    files = [path for directory in directories for path in directory.glob("*.jsonl*")]
    return {
        normal(text)
        for path in files
        for row in (read_jsonl(path) if path.suffix == ".gz" else map(json.loads, path.read_text("utf-8").splitlines()))
        for text in (row["text"], f"{row.get('title', '')} {row['text']}")
    }


# --- examples -------------------------------------------------------------------------------------------------------


def window_of(sentences: list[str], answers: list[str], generator: random.Random) -> str:
    """Some whole sentences in a row, from one that holds an answer where there is one."""
    n_words = math.exp(generator.uniform(*map(math.log, WINDOW_WORDS)))
    holding = [row for row, text in enumerate(sentences) if any(answer and answer in text for answer in answers)]
    start = generator.choice(holding) - generator.randrange(2) if holding else generator.randrange(len(sentences))
    start = max(0, start)
    end = start + 1
    while end < len(sentences) and sum(len(text.split()) for text in sentences[start:end]) < n_words:
        end += 1
    return " ".join(sentences[start:end])


class Set:
    """One set's queries and windows: `queries` are (text, row of the window it belongs to, does the data say so)."""

    def __init__(self, path: Path, excluded: set[str], config: Config) -> None:
        generator = random.Random(f"{config.seed} {path.name}")
        passages = {row["id"]: row["text"] for row in read_jsonl(path)}
        questions = read_jsonl(path.with_name(path.name.replace(".passages.", ".questions.")))
        kept = {key for key, text in passages.items() if text.strip() and normal(text) not in excluded}
        allowed = [row for row in questions if normal(row["query"]) not in excluded]
        asked = [row for row in allowed if kept.intersection(row["positives"])]
        self.name = path.name.partition(".")[0]
        self.n_excluded = len(passages) - len(kept) + len(questions) - len(asked)
        asked = generator.sample(asked, min(config.queries_per_set // 2, len(asked)))
        answers: dict[Any, list[str]] = {}
        for row in asked:
            answers.setdefault(generator.choice([key for key in row["positives"] if key in kept]), row["answers"])
        others = sorted(kept - answers.keys())
        n_others = max(0, min(config.passages_per_set - len(answers), len(others)))
        keys = [*answers, *generator.sample(others, n_others)]
        sentences = {key: re.split(r"(?<=[.!?])\s+", passages[key].strip()) for key in keys}
        self.windows = [window_of(sentences[key], answers.get(key, []), generator) for key in keys]
        rows = {key: row for row, key in enumerate(keys)}
        self.queries = [
            (row["query"], rows[key], holds(self.windows[rows[key]], row["answers"]))
            for row in asked
            for key in row["positives"]
            if key in answers
        ][: len(asked)]
        self._add_sentences([sentences[key] for key in keys], config.queries_per_set - len(self.queries), generator)

    def _add_sentences(self, sentences: list[list[str]], n: int, generator: random.Random) -> None:
        fewest, most = SENTENCE_WORDS
        found = [
            (text.rstrip("."), row, False)
            for row, texts in enumerate(sentences)
            for text in texts
            if fewest <= len(text.split()) <= most and (text not in self.windows[row] or len(texts) < 3)
        ]
        self.queries += generator.sample(found, min(n, len(found)))


def holds(window: str, answers: list[str]) -> bool:
    return not answers or any(answer in window for answer in answers)


def examples_of(one: Set, encoder: Encoder, seed: int) -> Iterator[Example]:
    """One for each query, with the teachers' opinion of its passages."""
    generator = random.Random(f"{seed} lists {one.name}")
    index = bm25s.BM25()
    index.index(bm25s.tokenize(one.windows, show_progress=False), show_progress=False)
    vectors = encoder.encode(one.windows, f"{one.name}: passages")
    queries = encoder.encode([query for query, _, _ in one.queries], f"{one.name}: queries")
    cosines = queries @ vectors.T
    for (query, own, is_right), cosine in zip(one.queries, cosines, strict=True):
        [words] = bm25s.tokenize([query], return_ids=False, show_progress=False)
        bm25 = index.get_scores(words) if words else np.zeros(len(one.windows))
        best_bm25, best_cosine = np.argsort(-bm25)[:50], np.argsort(-cosine)[:50]
        seen = np.union1d(best_bm25, best_cosine)
        standard = (bm25 - bm25[seen].mean()) / (bm25[seen].std() + 1e-6)
        targets = COSINE_SCALE * cosine + COSINE_BIAS + BM25_SCALE * standard
        targets[own] += LABEL_BONUS * is_right
        rows = choose(own, best_bm25, best_cosine, len(one.windows), generator)
        yield Example(
            query, [one.windows[row] for row in rows], [round(float(targets[row]), 4) for row in rows], is_right
        )


def choose(own: int, bm25: Any, cosine: Any, n: int, generator: random.Random) -> list[int]:
    """The query's own window first, then hard ones by both teachers, then random ones."""
    hard = [*generator.sample(list(bm25[:HARD_POOL]), 3), *generator.sample(list(cosine[:HARD_POOL]), 3)]
    generator.shuffle(hard)
    rows = list(dict.fromkeys([own, *map(int, hard)]))[: LIST_SIZE - 1]
    while len(rows) < LIST_SIZE:
        row = generator.randrange(n)
        rows += [row] * (row not in rows)
    return rows


class Encoder:
    """The teacher: mean of the last layer's states, of length 1 (sentence-transformers, for all-MiniLM-L6-v2)."""

    def __init__(self, directory: str) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(directory)
        self._model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval().to(DEVICE)

    def encode(self, texts: list[str], what: str) -> Any:
        vectors = np.zeros((len(texts), self._model.config.hidden_size), np.float32)
        order = np.argsort([len(text) for text in texts])
        for rows in tqdm(np.array_split(order, max(1, len(texts) // 64)), desc=what, leave=False):
            batch = self._tokenizer([texts[row] for row in rows], padding=True, truncation=True, max_length=MAX_TOKENS,
                                    return_tensors="pt").to(DEVICE)  # fmt: skip
            with torch.inference_mode(), torch.autocast(DEVICE, dtype=torch.bfloat16):
                states = self._model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][:, :, None]
            mean = (states * mask).sum(1) / mask.sum(1)
            vectors[rows] = torch.nn.functional.normalize(mean, dim=1).cpu().numpy()
        return vectors


def make_examples(data: Path, exclude: Sequence[Path], config: Config, out: Path) -> tuple[list[Example], Any]:
    """Made once, then read from --out. Returns the examples, shuffled, and what is to be said about the data.

    Raises UnusableError: there is no data, or too little.
    """
    path, about = out / "lists.jsonl.gz", out / "data.json"
    if not about.is_file():
        files = sorted(data.glob("*.passages.jsonl.gz"))
        if not files:
            raise UnusableError(f"--data {data}: there is no NAME.passages.jsonl.gz")
        excluded = texts_of(exclude)
        sets = [Set(file, excluded, config) for file in files]
        encoder = Encoder(config.teacher)
        examples = [example for one in tqdm(sets, desc="sets") for example in examples_of(one, encoder, config.seed)]
        random.Random(config.seed).shuffle(examples)
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(example)) + "\n" for example in examples)
        rows = [{"set": one.name, "queries": len(one.queries), "passages": len(one.windows),
                 "rows_dropped_since_excluded": one.n_excluded} for one in sets]  # fmt: skip
        about.write_text(json.dumps(rows, indent=1))
    examples = [Example(**row) for row in read_jsonl(path)]
    if len(examples) < 2 * config.lists_per_step:
        raise UnusableError(f"--data {data}: {len(examples)} queries are too few for steps of {config.lists_per_step}")
    return examples, json.loads(about.read_text())


# --- training -------------------------------------------------------------------------------------------------------


class Trainer:
    """Model, its average, optimizer and step: what `state.pt` holds."""

    def __init__(self, config: Config, out: Path) -> None:
        torch.manual_seed(config.seed)
        self.config, self._state = config, out / "state.pt"
        self.tokenizer = AutoTokenizer.from_pretrained(config.base)
        self.model = AutoModelForSequenceClassification.from_pretrained(
            config.base, num_labels=1, dtype=torch.float32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        ).train().to(DEVICE)
        # Half of the weights, seldom seen each: they stay what the base's far longer training made them.
        self.model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
        self.trained = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        self.average = {name: value.detach().clone() for name, value in self.trained.items()}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=config.learning_rate, weight_decay=0.01, fused=True
        )
        self.step, self.losses = 0, list[float]()
        if self._state.is_file():
            self._load()

    def _load(self) -> None:
        state = torch.load(self._state, weights_only=True, map_location=DEVICE)
        self.model.load_state_dict(state["trained"], strict=False)
        self.average, self.step, self.losses = state["average"], state["step"], state["losses"]
        self.optimizer.load_state_dict(state["optimizer"])

    def save(self) -> None:
        part = self._state.with_suffix(".part")
        trained = {name: value.detach() for name, value in self.trained.items()}
        torch.save({"trained": trained, "average": self.average, "step": self.step, "losses": self.losses,
                    "optimizer": self.optimizer.state_dict()}, part)  # fmt: skip
        part.replace(self._state)

    def logits(self, examples: Sequence[Example]) -> Any:
        """(number of examples, LIST_SIZE), float32; pairs of like length are computed together."""
        pairs = [(example.query, text) for example in examples for text in example.passages]
        queries, passages = map(list, zip(*pairs, strict=True))
        encoded = self.tokenizer(queries, passages, truncation="longest_first", max_length=MAX_TOKENS)
        order = np.argsort([len(ids) for ids in encoded["input_ids"]])
        parts = []
        for rows in np.array_split(order, GROUPS):
            batch = self.tokenizer.pad({name: [values[row] for row in rows] for name, values in encoded.items()},
                                       return_tensors="pt").to(DEVICE)  # fmt: skip
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                parts.append(self.model(**batch).logits[:, 0].float())
        return torch.cat(parts)[torch.as_tensor(np.argsort(order), device=DEVICE)].view(len(examples), LIST_SIZE)

    def learn(self, examples: Sequence[Example]) -> float:
        targets = torch.tensor([example.targets for example in examples], device=DEVICE)
        found = self.logits(examples)
        listwise = torch.nn.functional.kl_div(found.log_softmax(1), targets.softmax(1), reduction="batchmean")
        loss = listwise + LEVEL_WEIGHT * torch.nn.functional.huber_loss(found, targets, delta=2.0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self._schedule()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        decay = min(AVERAGE_DECAY, self.step / (self.step + 10))
        for name, value in self.trained.items():
            self.average[name].lerp_(value.detach(), 1 - decay)
        return float(listwise.detach())

    def _schedule(self) -> float:
        """Up over 5 % of the steps, then down to nothing."""
        part = (self.step + 0.5) / self.config.steps
        return min(1.0, part / 0.05, max(0.0, (1 - part) / 0.95))

    def use_average(self) -> None:
        self.model.load_state_dict(self.average, strict=False)
        self.model.eval()


def train(trainer: Trainer, examples: list[Example]) -> None:
    """From the step where it is to the last one. The examples of a step follow from its number alone."""
    size = trainer.config.lists_per_step
    steps = trainer.config.steps
    bar = tqdm(range(trainer.step, steps), initial=trainer.step, total=steps, desc="steps")
    for step in bar:
        epoch, place = divmod(step * size, len(examples) - size)
        order = np.random.default_rng([trainer.config.seed, epoch]).permutation(len(examples))
        trainer.losses.append(round(trainer.learn([examples[row] for row in order[place : place + size]]), 4))
        bar.set_postfix(loss=f"{np.mean(trainer.losses[-50:]):.3f}")
        if trainer.step % CHECKPOINT_STEPS == 0 or trainer.step == steps:
            trainer.save()


def held_out(trainer: Trainer, examples: list[Example]) -> dict[str, float]:
    """How the average agrees with the teachers, and how often the passage that the data calls right comes first."""
    with torch.inference_mode():
        parts = [trainer.logits(examples[at : at + 8]).cpu().numpy() for at in range(0, len(examples), 8)]
    logits = np.concatenate(parts)
    targets = np.array([example.targets for example in examples])
    labelled = np.array([example.is_right for example in examples])
    first = logits.argmax(1)
    found = {
        "first_is_the_teachers_first": float((first == targets.argmax(1)).mean()),
        "correlation_with_the_teachers": float(np.corrcoef(logits.ravel(), targets.ravel())[0, 1]),
    }
    if labelled.any():
        found["first_is_right"] = float((first[labelled] == 0).mean())
        found["teachers_first_is_right"] = float((targets.argmax(1)[labelled] == 0).mean())
    return found


def write_checkpoint(trainer: Trainer, out: Path) -> Path:
    folder = out / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    trainer.model.half().save_pretrained(folder)
    trainer.tokenizer.save_pretrained(folder)
    return folder


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.train_mini", description="Train a small cross-encoder.")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="NAME.passages.jsonl.gz, .questions.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a run that lies there is continued")
    parser.add_argument("--exclude", type=Path, nargs="*", default=[], metavar="DIR", help="BEIR sets to keep out")
    parser.add_argument("--base", default=str(MODELS / "all-MiniLM-L6-v2"), help="BERT checkpoint to start from")
    parser.add_argument("--teacher", default=str(MODELS / "all-MiniLM-L6-v2"), help="bi-encoder")
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--lists-per-step", type=int, default=8, help=f"of {LIST_SIZE} pairs each")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--queries-per-set", type=int, default=20000, help="half of them sentences")
    parser.add_argument("--passages-per-set", type=int, default=20000)
    parser.add_argument("--threads", type=int, default=1, help="more is slower when others compute, too")
    parser.add_argument("--seed", type=int, default=1)
    return parser


def check_config(config: Config, out: Path) -> None:
    """Writes it beside a new run. Raises UnusableError where a run of another configuration lies there."""
    path = out / "config.json"
    if path.is_file():
        found = json.loads(path.read_text())
        for name, value in asdict(config).items():
            if found.get(name) != value:
                flag = f"--{name.replace('_', '-')}"
                raise UnusableError(f"--out {out} holds a run with {flag} {found.get(name)}, not {value}")
    else:
        path.write_text(json.dumps(asdict(config), indent=1) + "\n")


def run(arguments: argparse.Namespace) -> int:
    """Raises UnusableError."""
    out: Path = arguments.out
    config = Config(**{name: getattr(arguments, name) for name in Config.__dataclass_fields__})
    out.mkdir(parents=True, exist_ok=True)
    check_config(config, out)
    torch.set_num_threads(arguments.threads)
    examples, about = make_examples(arguments.data, arguments.exclude, config, out)
    n_held_out = min(HELD_OUT, len(examples) // 4)
    trainer = Trainer(config, out)
    train(trainer, examples[n_held_out:])
    trainer.use_average()
    result = {"config": asdict(config), "data": about, "held_out": held_out(trainer, examples[:n_held_out]),
              "loss_by_100_steps": [round(float(np.mean(trainer.losses[at : at + 100])), 4)
                                    for at in range(0, len(trainer.losses), 100)]}  # fmt: skip
    (out / "training.json").write_text(json.dumps(result, indent=1) + "\n")
    folder = write_checkpoint(trainer, out)
    from convert.__main__ import main as convert  # needs what training does not: gguf, llama-cpp-python

    return convert([str(folder), "--out", str(out), "--quant", "F16", "Q8_0"])


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 trained and converted, 1 what was given cannot be used, 130 stopped (the same command goes on)."""
    arguments = parser().parse_args(argv)
    try:
        return run(arguments)
    except (UnusableError, OSError) as error:
        print(f"bench.train_mini: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nbench.train_mini: stopped; the same command goes on where it was saved last", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
