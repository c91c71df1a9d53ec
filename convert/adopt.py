"""A GGUF file of llama.cpp's own converter, checked, set right where that is possible, and given what the server asks
of a file: `python -m convert FILE.gguf`. Its weights are copied as they are.

Such files are wrong in known ways, each of which gives scores that look right: RULES has them, by architecture. What a
file cannot tell (whether its tokenizer is the checkpoint's) is not proven here, as it is for a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf

from .errors import CannotStartError, ConvertError
from .gguf_file import GgufFile
from .models import CROSS_ENCODER, YES_LOGIT
from .progress import Progress
from .recipe import split_template
from .reference import GEMMA_PARTS
from .samples import SAMPLES
from .verify import score_samples

TEMPLATE = "tokenizer.chat_template.rerank"  # of a Qwen3-Reranker
RANK_HEAD = ("cls.output.weight", "cls.output.bias")
Values = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """values: metadata that is written, in place of what is there. drop: metadata and tensors that are left out."""

    kind: str
    values: Values = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    first: str = ""  # the piece that every pair begins with


@dataclass(frozen=True)
class Foreign:
    path: Path
    reader: gguf.GGUFReader

    @staticmethod
    def open(path: Path) -> Foreign:
        GgufFile.open(path)  # with bounds: what is no GGUF file is refused in one line
        try:
            return Foreign(path, gguf.GGUFReader(path))
        except (ValueError, KeyError, IndexError, OverflowError) as exc:
            raise ConvertError(f"{path}: not a readable GGUF file ({exc})") from None

    def get(self, key: str, default: Any = None) -> Any:
        found = self.reader.fields.get(key)
        return default if found is None else found.contents()

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Rows first."""
        found = [tensor for tensor in self.reader.tensors if tensor.name == name]
        return tuple(reversed(found[0].shape.tolist())) if found else None

    def token_id(self, word: str) -> int:
        tokens = self.get("tokenizer.ggml.tokens", [])
        if word not in tokens:
            raise self.refusal(f"its vocabulary has no {word!r}, whose logit would be the score")
        return int(tokens.index(word))

    def refusal(self, what: str) -> ConvertError:
        return ConvertError(f"{self.path}: {what}; convert the checkpoint itself: python -m convert DIRECTORY")


def _cross_encoder(file: Foreign) -> Change:
    head, tokenizer = file.shape("cls.output.weight"), file.get("tokenizer.ggml.model")
    if head is None:
        raise file.refusal("an embedding model, not a reranker: it has no classification head")
    if len(head) > 1 and head[0] != 1:
        raise file.refusal(f"its classification head has {head[0]} outputs; a reranker has one")
    if file.shape("cls.weight") is None:  # llama.cpp's converter drops BERT's pooler.dense
        raise file.refusal("the head's first layer (cls.weight) is missing: scores would be wrong")
    if tokenizer == "t5":
        positions = file.shape("position_embd.weight")
        # A table of 8,194 or 514 rows was not cut: a power of two, and XLM-R's two unused rows.
        if positions is None or (positions[0] - 2).bit_count() == 1:
            raise file.refusal("its position table still holds XLM-R's two unused rows")
        if file.get("tokenizer.ggml.precompiled_charsmap") is None:
            raise file.refusal("no normalisation table (precompiled_charsmap) in it")
        return Change(CROSS_ENCODER, {"tokenizer.ggml.remove_extra_whitespaces": True}, first="<s>")
    if tokenizer == "bert":
        return Change(CROSS_ENCODER, first="[CLS]")
    raise file.refusal(f"tokenizer {tokenizer!r} is not known for a cross-encoder")


def _modern_bert(file: Foreign) -> Change:
    if file.get("modern-bert.classifier.pooling_type") is None:
        raise file.refusal("it does not say which states its head sees")
    if file.shape("cls.output.weight") is None or file.shape("cls.weight") is None:
        raise file.refusal("no whole classification head (cls.weight, cls.output.weight)")
    return Change(CROSS_ENCODER, first="[CLS]")


def _gemma(file: Foreign) -> Change:
    if file.get("tokenizer.chat_template") is not None:
        raise file.refusal("a chat model, not a reranker")
    parts = {f"rerank.{name}": text for name, text in vars(GEMMA_PARTS).items()}
    word = {"rerank.yes_token_id": file.token_id("Yes")}
    # llama.cpp's default is true, and Gemma has no space before a text
    return Change(YES_LOGIT, {**parts, **word, "tokenizer.ggml.add_space_prefix": False}, first="<bos>")


def _qwen3(file: Foreign) -> Change:
    """llama.cpp's rank head holds the rows of "yes" and "no", and gives their softmax. The output matrix is there, too,
    and the server reads both words' logits from it."""
    template, labels = file.get(TEMPLATE), file.get("qwen3.classifier.output_labels")
    found = re.fullmatch(r"(.*)\{query\}(.*)\{document\}(.*)", template or "", re.DOTALL)
    if not found or labels != ["yes", "no"] or "{" in "".join(found.groups()):
        raise file.refusal("not a Qwen3-Reranker as llama.cpp's converter makes it")
    try:
        before, between, after = found.groups()
        recipe = split_template(before, between, after, "yes", "no")
    except ConvertError as exc:
        raise file.refusal(str(exc)) from None
    if recipe.separator or not recipe.head:
        raise file.refusal("not a Qwen3-Reranker as llama.cpp's converter makes it")
    names = ("head", "query_prefix", "query_suffix", "passage_prefix", "tail", "truncation")
    values = {f"rerank.{name}": getattr(recipe, name) for name in names if getattr(recipe, name)}
    values |= {"rerank.yes_token_id": file.token_id("yes"), "rerank.no_token_id": file.token_id("no")}
    return Change(YES_LOGIT, values, ("qwen3.pooling_type", "qwen3.classifier.output_labels", *RANK_HEAD))


RULES: dict[str, Callable[[Foreign], Change]] = {
    "bert": _cross_encoder, "modern-bert": _modern_bert, "gemma": _gemma, "qwen3": _qwen3,
}  # fmt: skip


def adopt(source: Path, folder: Path, name: str | None, is_reranker: bool) -> Path:
    """Writes folder/NAME-adopted.gguf (through a .part) and returns it. is_reranker: the user says so."""
    file = Foreign.open(source)
    if file.get("rerank.kind") is not None:
        raise CannotStartError(f"{source} is a GGUF file already: serve it with --m3 {source} (or --gemma)")
    architecture = file.get("general.architecture")
    if architecture not in RULES:
        raise file.refusal(f"architecture {architecture!r} is not a reranker that is served here")
    change = RULES[architecture](file)
    named = f"{file.get('general.name', '')} {file.get('general.basename', '')}".lower()
    if not (is_reranker or "rerank" in named or file.get(TEMPLATE) is not None):
        raise CannotStartError(f"{source}: nothing in it says that it is a reranker: --reranker, if you know that")
    path = folder / f"{name or source.stem}-adopted.gguf"
    part = path.with_suffix(".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _copy(file, part, _metadata(file, change), change.drop)
        GgufFile.open(part).seal()
        first = score_samples(part, SAMPLES[:2]).ids[0][0]
        piece = file.get("tokenizer.ggml.tokens")[first]
        if change.first and not piece.startswith(change.first):
            raise file.refusal(f"its pairs begin with {piece!r}, not with {change.first!r}")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _metadata(file: Foreign, change: Change) -> Values:
    file_type = file.get("general.file_type")
    types = {int(one): one.name.removeprefix("MOSTLY_").removeprefix("ALL_") for one in gguf.LlamaFileType}
    return {
        **change.values, "rerank.kind": change.kind, "rerank.quantization": types.get(file_type, "unknown type"),
        "rerank.source": str(file.get("general.name", "")), "rerank.header_sha256": "0" * 64,
    }  # fmt: skip


def _copy(file: Foreign, target: Path, values: Values, drop: tuple[str, ...]) -> None:
    writer = gguf.GGUFWriter(target, file.get("general.architecture"))
    for key, entry in file.reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")) and key not in values and key not in drop:
            inner = entry.types[-1] if entry.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, entry.contents(), entry.types[0], sub_type=inner)
    kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, str: gguf.GGUFValueType.STRING}
    for key, value in values.items():
        writer.add_key_value(key, value, kinds[type(value)])
    tensors = [tensor for tensor in file.reader.tensors if tensor.name not in drop]
    for tensor in tensors:
        shape, dtype, n_bytes = tensor.data.shape, tensor.data.dtype, tensor.data.nbytes
        writer.add_tensor_info(tensor.name, shape, dtype, n_bytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with Progress("copying", len(tensors), unit=" tensors") as done:
        for tensor in tensors:
            writer.write_tensor_data(tensor.data)
            done(1)
    writer.close()
