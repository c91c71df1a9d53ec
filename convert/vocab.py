"""The tokenizer of a checkpoint, in the form that llama.cpp reads from a GGUF file.

Token types decide what a text can become: a CONTROL token is never made from text (parse_special is false in the
server), so whatever looks special is CONTROL, and an untrusted passage cannot steer the model.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .added import append_added_tokens, entries
from .bpe import bpe_tokens, normalization, pre_tokenizer
from .checkpoint import MAX_NUMBER, Checkpoint, refuse_stub
from .errors import ConvertError
from .models import Architecture

# llama.h, enum llama_token_type; SentencePiece's ModelProto.SentencePiece.Type has the same numbers
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MAX_FILLERS = 511  # rows by which an embedding table may be padded (Qwen2: 271); more is a truncated vocabulary
SPACE = "▁"  # U+2581, SentencePiece's visible space


@dataclass
class Vocabulary:
    """One entry of tokens, scores and types for each id. special: llama.cpp's name (bos, eos ...) -> id."""

    model: str
    tokens: list[str]
    types: list[int]
    special: dict[str, int]
    scores: list[float] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)  # further tokenizer.ggml.* metadata
    normalization: str = ""  # what the server must do to a text first: NFC, or nothing


def read_vocabulary(checkpoint: Checkpoint, architecture: Architecture) -> Vocabulary:
    """Raises ConvertError naming the file and what is wrong in it."""
    vocabulary = _READERS[architecture.tokenizer](checkpoint)
    if architecture.tokenizer in ("t5", "bert", "llama"):
        append_added_tokens(checkpoint, vocabulary)
    _check(checkpoint, vocabulary)
    return vocabulary


def _check(checkpoint: Checkpoint, vocabulary: Vocabulary) -> None:
    """Fills up to config.json's vocab_size, and refuses what makes llama.cpp abort: empty and duplicate tokens."""
    size = checkpoint.config.integer("vocab_size")
    if not 0 <= size - len(vocabulary.tokens) <= MAX_FILLERS:
        raise ConvertError(
            f"{checkpoint.directory}: its tokenizer has {len(vocabulary.tokens)} tokens, config.json says {size}"
        )
    for token_id in range(len(vocabulary.tokens), size):  # CONTROL: no text can become one of these
        vocabulary.tokens.append(f"<filler {token_id}>")
        vocabulary.types.append(CONTROL)
        if vocabulary.scores:
            vocabulary.scores.append(0.0)
    seen: dict[str, int] = {}
    for token_id, token in enumerate(vocabulary.tokens):
        if any("\ud800" <= character <= "\udfff" for character in token):
            raise ConvertError(f"{checkpoint.directory}: token {token_id} {token!r:.80} is no text")
        if not token or "\0" in token or token in seen:
            problem = f"the same token as {seen[token]}" if token in seen else "an empty token or one with a NUL"
            raise ConvertError(f"{checkpoint.directory}: token {token_id} {token!r:.80} is {problem}")
        seen[token] = token_id
    for token, score in zip(vocabulary.tokens, vocabulary.scores, strict=bool(vocabulary.scores)):
        if not abs(score) < MAX_NUMBER:
            raise ConvertError(f"{checkpoint.directory}: the score of {token!r:.60} is {score!r}")
    for name, token_id in vocabulary.special.items():
        if not 0 <= token_id < size:
            raise ConvertError(f"{checkpoint.directory}: the {name} token's id {token_id} is outside the vocabulary")


# -- XLM-RoBERTa: unigram -------------------------------------------------------------------------------------------


def _read_unigram(checkpoint: Checkpoint) -> Vocabulary:
    if (checkpoint.directory / "sentencepiece.bpe.model").is_file():
        pieces, charsmap = _unigram_of_sentencepiece(checkpoint.directory / "sentencepiece.bpe.model")
    elif (checkpoint.directory / "tokenizer.json").is_file():
        pieces, charsmap = _unigram_of_tokenizer_json(checkpoint)
    else:
        raise ConvertError(f"{checkpoint.directory}: neither sentencepiece.bpe.model nor tokenizer.json there")
    special = {"bos": "<s>", "eos": "</s>", "unknown": "<unk>", "seperator": "</s>", "padding": "<pad>",
               "cls": "<s>", "mask": "<mask>"}  # fmt: skip
    tokens = [token for token, _ in pieces]
    ids = _ids_of(checkpoint, tokens, special)
    control = {token_id for name, token_id in ids.items() if name != "unknown"}
    types = [CONTROL if token_id in control else NORMAL for token_id in range(len(tokens))]
    types[ids["unknown"]] = UNKNOWN
    options: dict[str, Any] = {
        # What the reference does to white space: runs are one space, ends are trimmed. llama.cpp's default is false,
        # and then double spaces, tabs and line breaks give other tokens.
        "remove_extra_whitespaces": True,
        "add_space_prefix": True,
        "precompiled_charsmap": charsmap,
        "token_type_count": checkpoint.config.integer("type_vocab_size", 2),
        "add_bos_token": True,
        "add_eos_token": True,
    }
    return Vocabulary("t5", tokens, types, ids, [score for _, score in pieces], options)


def _unigram_of_sentencepiece(path: Path) -> tuple[list[tuple[str, float]], bytes]:
    """fairseq's order of ids, not SentencePiece's: <s> <pad> </s> <unk>, the pieces after the first three, <mask>."""
    model = read_sentencepiece(path)
    if model.trainer_spec.model_type != 1:
        raise ConvertError(f"{path}: not a unigram model")
    if [piece.piece for piece in model.pieces[:3]] != ["<unk>", "<s>", "</s>"]:
        raise ConvertError(f"{path}: its first pieces are not <unk> <s> </s>: not a vocabulary of XLM-RoBERTa")
    head = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [(piece.piece, piece.score) for piece in model.pieces[3:]]
    return [*head, *pieces, ("<mask>", 0.0)], model.normalizer_spec.precompiled_charsmap


def _unigram_of_tokenizer_json(checkpoint: Checkpoint) -> tuple[list[tuple[str, float]], bytes]:
    path = checkpoint.directory / "tokenizer.json"
    content = checkpoint.json("tokenizer.json")
    try:
        if content["model"]["type"] != "Unigram":
            raise ConvertError(f"{path}: its model is {content['model']['type']!r}, expected 'Unigram'")
        pieces = [(str(piece), float(score)) for piece, score in content["model"]["vocab"]]
        table = _find_charsmap(content.get("normalizer"))
        if not table:
            raise ConvertError(f"{path}: no normalisation table in it (early releases of transformers 5 saved such "
                               "files): copy sentencepiece.bpe.model of the base model beside it")  # fmt: skip
        charsmap = base64.b64decode(table, validate=True)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as exc:
        raise ConvertError(f"{path}: no usable unigram vocabulary in it ({exc!r:.100})") from exc
    return pieces, charsmap


def _find_charsmap(normalizer: Any) -> str:
    inner = normalizer.get("normalizers") if isinstance(normalizer, dict) else None
    for step in [normalizer, *(inner if isinstance(inner, list) else [])]:
        if isinstance(step, dict) and step.get("type") == "Precompiled":
            return str(step.get("precompiled_charsmap") or "")
    return ""


# -- BERT: WordPiece ------------------------------------------------------------------------------------------------


def _read_wordpiece(checkpoint: Checkpoint) -> Vocabulary:
    tokens = _wordpieces(checkpoint)
    if "" in tokens:
        raise ConvertError(f"{checkpoint.directory}: token {tokens.index('')} of its vocabulary is empty")
    lowercase, strip_accents = bert_normalization(checkpoint)
    names = {"unknown": "unk", "seperator": "sep", "padding": "pad", "cls": "cls", "mask": "mask"}
    special = _ids_of(checkpoint, tokens, {key: _special_text(checkpoint, name) for key, name in names.items()})
    control = set(special.values())
    special["bos"] = special["cls"]  # llama.cpp has no [CLS] of its own: what begins a sequence is its bos
    options: dict[str, Any] = {
        "token_type_count": checkpoint.config.integer("type_vocab_size", 2),
        "normalizer.lowercase": lowercase,
        "normalizer.strip_accents": strip_accents,
    }
    stored = [token if token_id in control else _phantom_space(token) for token_id, token in enumerate(tokens)]
    types = [CONTROL if token_id in control else NORMAL for token_id in range(len(tokens))]
    return Vocabulary("bert", stored, types, special, options=options)


def _phantom_space(token: str) -> str:
    """llama.cpp marks the pieces that begin a word, BERT those that do not."""
    return token[2:] if token.startswith("##") and len(token) > 2 else SPACE + token


def _special_text(checkpoint: Checkpoint, name: str) -> str:
    value = checkpoint.json("tokenizer_config.json").get(f"{name}_token", f"[{name.upper()}]")
    return str(value.get("content") if isinstance(value, dict) else value)


def _wordpieces(checkpoint: Checkpoint) -> list[str]:
    path = checkpoint.directory / "tokenizer.json"
    if not path.is_file():
        return _read_vocab_txt(checkpoint.directory / "vocab.txt")
    model = checkpoint.json("tokenizer.json").get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise ConvertError(f"{path}: no WordPiece vocabulary in it")
    expected = {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    for key, value in expected.items():
        if model.get(key, value) != value:
            raise ConvertError(f"{path}: model.{key} is {model[key]!r}, but only {value!r} can be converted")
    by_id = {token_id if type(token_id) is int else -1: token for token, token_id in model["vocab"].items()}
    if sorted(by_id) != list(range(len(model["vocab"]))):
        raise ConvertError(f"{path}: the ids of its vocabulary are not 0 to {len(model['vocab']) - 1}")
    return [by_id[token_id] for token_id in range(len(by_id))]


def _read_vocab_txt(path: Path) -> list[str]:
    """One piece a line. Lines end with \\n alone: U+2028 and its like are pieces themselves."""
    try:
        raw = path.read_bytes()
        refuse_stub(path, raw)
        lines = raw.decode("utf-8").split("\n")
    except (OSError, ValueError) as exc:
        raise ConvertError(f"{path}: cannot be read ({type(exc).__name__}); the checkpoint has no tokenizer") from exc
    return [line.rstrip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


def bert_normalization(checkpoint: Checkpoint) -> tuple[bool, bool]:
    """(lowercase, strip accents). Accents are stripped where text is lower-cased, unless it is said otherwise."""
    normalizer = checkpoint.json("tokenizer.json").get("normalizer")
    if normalizer is None:
        config = checkpoint.json("tokenizer_config.json")
        normalizer = {
            "type": "BertNormalizer", "lowercase": config.get("do_lower_case", True),
            "strip_accents": config.get("strip_accents"),
            "handle_chinese_chars": config.get("tokenize_chinese_chars", True),
        }  # fmt: skip
    if not isinstance(normalizer, dict) or normalizer.get("type") != "BertNormalizer":
        raise ConvertError(f"{checkpoint.directory}: its tokenizer does not normalise as BERT does")
    for key in ("clean_text", "handle_chinese_chars"):
        if normalizer.get(key, True) is not True:
            raise ConvertError(f"{checkpoint.directory}: its tokenizer has {key} {normalizer[key]!r}, expected true")
    lowercase, strip_accents = normalizer.get("lowercase", True), normalizer.get("strip_accents")
    return bool(lowercase), bool(lowercase if strip_accents is None else strip_accents)


# -- Gemma: SentencePiece BPE ---------------------------------------------------------------------------------------

# Markers that steer the model, whatever type tokenizer.model gives them.
_STEERING = {"<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"}


def _read_gemma(checkpoint: Checkpoint) -> Vocabulary:
    path = checkpoint.directory / "tokenizer.model"
    if not path.is_file():
        return _gemma_of_tokenizer_json(checkpoint)
    model = read_sentencepiece(path)
    if model.trainer_spec.model_type != 2:
        raise ConvertError(f"{path}: not a SentencePiece BPE model")
    if model.normalizer_spec.add_dummy_prefix:
        raise ConvertError(f"{path}: puts a space before each text; Gemma does not")
    added = _added_tokens(checkpoint)
    tokens, types = [], []
    for piece in model.pieces:
        kind = piece.type
        if kind == USER_DEFINED:
            # transformers (tokenizer.json) cuts a text at added tokens only; every other user-defined piece (<table>,
            # <unused5>, runs of newlines) is an ordinary entry there that merges find or do not find
            kind = USER_DEFINED if added.get(piece.piece) is False else NORMAL
        if kind in (NORMAL, USER_DEFINED, UNUSED) and (added.get(piece.piece) or piece.piece in _STEERING):
            kind = CONTROL
        # llama.cpp looks for user-defined pieces in the raw text, where a space is a space
        tokens.append(piece.piece.replace(SPACE, " ") if kind == USER_DEFINED else piece.piece)
        types.append(kind)
    return _gemma_vocabulary(checkpoint, tokens, types, [piece.score for piece in model.pieces])


def _gemma_vocabulary(
    checkpoint: Checkpoint, tokens: list[str], types: list[int], scores: list[float]
) -> Vocabulary:
    special = _ids_of(checkpoint, tokens, {"bos": "<bos>", "eos": "<eos>", "unknown": "<unk>", "padding": "<pad>"})
    options: dict[str, Any] = {"add_space_prefix": False, "add_bos_token": True, "add_eos_token": False}
    return Vocabulary("llama", _out_of_reach(tokens, types), types, special, scores, options)


def _gemma_of_tokenizer_json(checkpoint: Checkpoint) -> Vocabulary:
    """transformers 5 saves no tokenizer.model. llama.cpp merges the two symbols whose piece has the best score, so a
    piece's score is the rank of the merge that makes it; what no merge makes is kept out of reach."""
    path = checkpoint.directory / "tokenizer.json"
    if not path.is_file():
        raise ConvertError(f"{checkpoint.directory}: neither tokenizer.model nor tokenizer.json there: copy "
                           "tokenizer.model from the base model (google/gemma-2b)")  # fmt: skip
    model: Any = checkpoint.json("tokenizer.json").get("model")
    try:
        if model["type"] != "BPE" or model.get("byte_fallback") is not True:
            raise ValueError("its model is no BPE with byte_fallback")
        by_id = {int(token_id): str(token) for token, token_id in model["vocab"].items()}
        tokens = [by_id[token_id] for token_id in range(len(model["vocab"]))]
        ranks = _merge_ranks(model["merges"])
    except (AttributeError, KeyError, IndexError, OverflowError, TypeError, ValueError) as exc:
        raise ConvertError(f"{path}: no usable BPE vocabulary in it ({exc!r:.100}): copy tokenizer.model from the base "
                           "model (google/gemma-2b)") from exc  # fmt: skip
    added = _added_tokens(checkpoint)
    types = [_gemma_type(token, ranks, added) for token in tokens]
    return _gemma_vocabulary(checkpoint, tokens, types, [-float(ranks.get(token, 0)) for token in tokens])


def _gemma_type(token: str, ranks: dict[str, int], added: dict[str, bool]) -> int:
    if token == "<unk>":
        return UNKNOWN
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return BYTE
    if token in _STEERING or added.get(token):
        return CONTROL
    return NORMAL if len(token) == 1 or token in ranks or token in added else CONTROL


def _merge_ranks(merges: list[Any]) -> dict[str, int]:
    """Piece -> rank of the merges that make it. llama.cpp has one score for a piece: pieces whose merges lie among each
    other's had the same one in tokenizer.model (runs of newlines, tags), and get the same rank."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        first.setdefault(left + right, rank)
        last[left + right] = rank
    ranks: dict[str, int] = {}
    start, end = 0, -1
    for piece, rank in first.items():
        start, end = rank if rank > end else start, max(end, last[piece])
        ranks[piece] = start
    return ranks


def _added_tokens(checkpoint: Checkpoint) -> dict[str, bool]:
    """Text of each added token of tokenizer.json or tokenizer_config.json -> whether it is marked as special."""
    added = [*entries(checkpoint, "tokenizer.json", "added_tokens", list),
             *entries(checkpoint, "tokenizer_config.json", "added_tokens_decoder", dict).values()]  # fmt: skip
    return {str(token.get("content")): token.get("special") is True for token in added if isinstance(token, dict)}


def _out_of_reach(tokens: list[str], types: list[int]) -> list[str]:
    """llama.cpp merges two adjacent pieces into any token that spells them, CONTROL ones too: with the pieces "<b" and
    "os>" a passage could make <bos>. Such a control token gets a longer spelling, which no merge can end in."""
    result, known = list(tokens), set(tokens)
    for token_id, token in enumerate(tokens):
        if types[token_id] in (CONTROL, UNKNOWN) and _can_be_merged(token, known):
            known.discard(token)
            while _can_be_merged(token, known):
                token = f"{token}{token_id}>"
            known.add(token)
            result[token_id] = token
    return result


def _can_be_merged(token: str, known: set[str]) -> bool:
    cuts = range(1, len(token))
    return len(token) == 1 or any(_is_symbol(token[:cut], known) and _is_symbol(token[cut:], known) for cut in cuts)


def _is_symbol(text: str, known: set[str]) -> bool:
    return len(text) == 1 or text in known


# -- Qwen and ModernBERT: byte-level BPE ----------------------------------------------------------------------------


def _read_bpe(checkpoint: Checkpoint) -> Vocabulary:
    try:
        return _bpe(checkpoint)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as exc:
        problem = f"{checkpoint.directory}/tokenizer.json: no usable BPE vocabulary in it"
        raise ConvertError(f"{problem} ({exc!r:.100})") from exc


def _bpe(checkpoint: Checkpoint) -> Vocabulary:
    tokens, is_added, control, merges = bpe_tokens(checkpoint)
    types = [
        NORMAL if not added else CONTROL if control[token] else USER_DEFINED
        for token, added in zip(tokens, is_added, strict=True)
    ]
    if "[CLS]" in control and "[SEP]" in control:  # ModernBERT
        names = {"bos": "[CLS]", "eos": "[SEP]", "cls": "[CLS]", "seperator": "[SEP]", "padding": "[PAD]",
                 "unknown": "[UNK]", "mask": "[MASK]"}  # fmt: skip
    else:
        names = {"eos": "<|im_end|>", "padding": "<|endoftext|>"}
    options: dict[str, Any] = {
        "pre": pre_tokenizer(checkpoint), "merges": merges, "add_bos_token": False, "add_space_prefix": False,
    }  # fmt: skip
    special = _ids_of(checkpoint, tokens, names)
    return Vocabulary("gpt2", tokens, types, special, options=options, normalization=normalization(checkpoint))


# -- shared ---------------------------------------------------------------------------------------------------------


def _ids_of(checkpoint: Checkpoint, tokens: list[str], special: dict[str, str]) -> dict[str, int]:
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    missing = sorted({token for token in special.values() if token not in ids})
    if missing:
        raise ConvertError(f"{checkpoint.directory}: its vocabulary has no {', '.join(missing)}")
    return {name: ids[token] for name, token in special.items()}


def read_sentencepiece(path: Path) -> Any:
    """A SentencePiece ModelProto. Raises ConvertError for anything else."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        raw = path.read_bytes()
        refuse_stub(path, raw)
        model.ParseFromString(raw)
    except ConvertError:
        raise
    except Exception as exc:  # protobuf's DecodeError, whose module has no types, or OSError
        raise ConvertError(f"{path}: not a SentencePiece model ({str(exc)[:100]})") from exc
    if not model.pieces:
        raise ConvertError(f"{path}: no pieces in it")
    return model


_READERS: dict[str, Callable[[Checkpoint], Vocabulary]] = {
    "t5": _read_unigram, "bert": _read_wordpiece, "llama": _read_gemma, "gpt2": _read_bpe,
}  # fmt: skip
