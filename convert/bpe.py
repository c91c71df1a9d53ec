"""Byte-level BPE of a tokenizer.json (Qwen2, Qwen3, ModernBERT), as llama.cpp reads it from a GGUF
file.

llama.cpp knows a pre-tokenizer (the regular expression that cuts a text before the merges) by a
name, and normalises nothing: what tokenizer.json asks for is compared with what is known, and
anything else is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .errors import ConvertError

# tokenizers' Split of Qwen2Tokenizer and Qwen3's; llama.cpp's name for it is qwen2
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp makes several of these CONTROL itself, whatever their type says
CONTROL_LIKE = re.compile(r"<\|.*\|>")


def bpe_tokens(checkpoint: Checkpoint) -> tuple[list[str], list[bool], dict[str, bool], list[str]]:
    """(tokens by id, whether each is an added token, added token -> whether no text may become it,
    merges "a b"). Raises ConvertError."""
    path = checkpoint.directory / "tokenizer.json"
    content = checkpoint.json("tokenizer.json")
    if not content:
        architecture = checkpoint.config.architecture
        raise ConvertError(f"{path}: missing; the vocabulary of {architecture} is read from it")
    model = content["model"]
    added = {entry["content"]: entry for entry in content.get("added_tokens") or []}
    ids = dict(model["vocab"]) | {text: entry["id"] for text, entry in added.items()}
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    _check_model(path, model)
    if sorted(ids.values()) != list(range(len(ids))):
        raise ConvertError(f"{path}: the ids of its tokens are not 0 to {len(ids) - 1}")
    control = {text: is_control(entry) for text, entry in added.items()}
    tokens = sorted(ids, key=lambda text: ids[text])
    _check_merges(path, merges, set(tokens), {text for text, never in control.items() if never})
    return tokens, [text in added for text in tokens], control, merges


def is_control(added: dict[str, Any]) -> bool:
    """Whether no text may become this entry of added_tokens."""
    return added.get("special") is True or bool(CONTROL_LIKE.fullmatch(added["content"]))


def _check_model(path: Path, model: dict[str, Any]) -> None:
    if model.get("type") != "BPE":
        raise ConvertError(f"{path}: its model is {model.get('type')!r}, expected 'BPE'")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ConvertError(f"{path}: model.{key} is set, but only none can be converted")
    for key in ("byte_fallback", "ignore_merges"):
        if model.get(key):
            raise ConvertError(f"{path}: model.{key} is true, but only false can be converted")


def _check_merges(path: Path, merges: list[str], tokens: set[str], control: set[str]) -> None:
    """A merge whose result is no token: a truncated vocabulary. One that makes a control token
    would let a text do so."""
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not space or left + right not in tokens or left + right in control:
            raise ConvertError(f"{path}: the merge {merge!r:.80} makes no ordinary token")


def pre_tokenizer(checkpoint: Checkpoint) -> str:
    """llama.cpp's name of it: qwen2, or modern-bert (GPT-2's). Raises ConvertError for any
    other."""
    path = checkpoint.directory / "tokenizer.json"
    found = checkpoint.json("tokenizer.json").get("pre_tokenizer") or {}
    steps: list[dict[str, Any]] = found.get("pretokenizers") or [found]
    kinds = [step.get("type") for step in steps]
    if kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        has_expression = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and has_expression:
            return "modern-bert"
        if kinds == ["Split", "ByteLevel"] and _is_qwen_split(steps[0]) and not has_expression:
            return "qwen2"
    raise ConvertError(
        f"{path}: its pre-tokenizer is neither Qwen's nor GPT-2's, and only these can be converted"
    )


def _is_qwen_split(step: dict[str, Any]) -> bool:
    is_isolated = step.get("behavior") == "Isolated" and not step.get("invert")
    return is_isolated and step.get("pattern") == {"Regex": QWEN_SPLIT}


def normalization(checkpoint: Checkpoint) -> str:
    """NFC or "" (none). Raises ConvertError for any other."""
    normalizer = checkpoint.json("tokenizer.json").get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise ConvertError(
            f"{checkpoint.directory}/tokenizer.json: its normalizer is {normalizer.get('type')!r}, "
            "but only NFC can be converted"
        )
    return "NFC" if normalizer else ""
