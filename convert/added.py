"""Tokens that a fine-tune added to the vocabulary of its base model.

Hugging Face's tokenizers cut a text at them before anything else (tokenizers, added_vocabulary.rs);
llama.cpp does so at USER_DEFINED tokens, in the text as it was written and the longest first
(llama-vocab.cpp, tokenizer_st_partition). What the one can ask for and the other cannot do is refused
with the token's name: left out, it would make other ids of every text that holds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gguf import TokenType

from .checkpoint import Checkpoint
from .errors import ConvertError

if TYPE_CHECKING:
    from .vocab import Vocabulary

MAX_GAP = 255  # ids without a token before an added one; more is a damaged file
_NEVER_TEXT = (TokenType.CONTROL, TokenType.UNKNOWN)
_FLAGS = ("lstrip", "rstrip", "single_word")


@dataclass(frozen=True)
class AddedToken:
    """One entry of `file`. id: None where the entry names a text alone."""

    file: str
    text: str
    id: int | None
    flags: dict[str, Any] = field(default_factory=dict)

    @property
    def is_special(self) -> bool:
        return self.flags.get("special") is True


def append_added_tokens(checkpoint: Checkpoint, vocabulary: Vocabulary) -> None:
    """Gives each added token its entry. Raises ConvertError naming one that llama.cpp cannot find as
    the reference does."""
    known = {text: token_id for token_id, text in enumerate(vocabulary.tokens)}
    for token in sorted(_read(checkpoint), key=lambda token: -1 if token.id is None else token.id):
        if token.id is None:
            if token.text not in known and not _is_respelled(vocabulary, token.text):
                raise _refused(checkpoint, token, "has no id there")
        elif _is_new(checkpoint, vocabulary, token):
            _check(checkpoint, vocabulary, token)
            _enter(checkpoint, vocabulary, token)
            known[token.text] = token.id
    _check_overlaps(checkpoint, found_in_texts(vocabulary))


def found_in_texts(vocabulary: Vocabulary) -> list[str]:
    """The tokens at which a text is cut before it is tokenised."""
    pairs = zip(vocabulary.tokens, vocabulary.types, strict=True)
    return [text for text, kind in pairs if kind == TokenType.USER_DEFINED]


def _is_new(checkpoint: Checkpoint, vocabulary: Vocabulary, token: AddedToken) -> bool:
    """False for what the vocabulary itself has: the tokens that frame a pair, and Gemma's own ones."""
    assert token.id is not None
    if token.id >= len(vocabulary.tokens):
        return True
    text, kind = vocabulary.tokens[token.id], vocabulary.types[token.id]
    if kind == TokenType.USER_DEFINED:
        return False
    if text != token.text and not (kind in _NEVER_TEXT and text.startswith(token.text)):
        if vocabulary.model == "bert":
            return True  # its pieces are stored in another spelling; refused in any case
        raise _refused(checkpoint, token, f"has id {token.id}, which is {text!r:.40} in the vocabulary")
    return kind not in _NEVER_TEXT


def _is_respelled(vocabulary: Vocabulary, text: str) -> bool:
    """A control token that merges could spell is stored under a longer spelling (vocab.py)."""
    pairs = zip(vocabulary.tokens, vocabulary.types, strict=True)
    return bool(text) and any(kind in _NEVER_TEXT and token.startswith(text) for token, kind in pairs)


def _check(checkpoint: Checkpoint, vocabulary: Vocabulary, token: AddedToken) -> None:
    """Refuses what llama.cpp, or the server's WordPiece, cannot do."""
    if vocabulary.model == "bert":
        raise _refused(checkpoint, token, "would not be found: this project splits BERT's texts into pieces alone")
    if token.file != "tokenizer.json":
        raise _refused(checkpoint, token, "is not in tokenizer.json, which alone says how it is found in a text: "
                       "save the tokenizer again with transformers' AutoTokenizer")  # fmt: skip
    if token.is_special:
        raise _refused(checkpoint, token, "is special, and no text may become such a token: set its \"special\" to "
                       "false there if texts hold it")  # fmt: skip
    for flag in _FLAGS:
        if token.flags.get(flag, False) is not False:
            raise _refused(checkpoint, token, f"has {flag} {token.flags[flag]!r}, which llama.cpp cannot do")
    is_spaced = not {" ", "▁"}.isdisjoint(token.text)
    if (vocabulary.model == "t5" or is_spaced) and token.flags.get("normalized", True) is not False:
        raise _refused(checkpoint, token, "is looked for in normalised text, which llama.cpp cannot do: set its "
                       "\"normalized\" to false there, and it is found where it is written just so")  # fmt: skip
    if vocabulary.model == "t5" and "▁" in token.text:
        raise _refused(checkpoint, token, "holds ▁, which llama.cpp takes for a space")


def _enter(checkpoint: Checkpoint, vocabulary: Vocabulary, token: AddedToken) -> None:
    assert token.id is not None
    if not token.id <= len(vocabulary.tokens) + MAX_GAP:
        raise _refused(checkpoint, token, f"has id {token.id}, far beyond {len(vocabulary.tokens)} tokens")
    while len(vocabulary.tokens) <= token.id:
        vocabulary.tokens.append(f"<filler {len(vocabulary.tokens)}>")
        vocabulary.types.append(int(TokenType.CONTROL))
        if vocabulary.scores:
            vocabulary.scores.append(0.0)
    vocabulary.tokens[token.id] = token.text
    vocabulary.types[token.id] = int(TokenType.USER_DEFINED)


def _check_overlaps(checkpoint: Checkpoint, texts: list[str]) -> None:
    """Where the end of one is the beginning of another, tokenizers takes the one that comes first and
    llama.cpp the longer one. (For runs of one character both give the same.)"""
    texts = [text for text in texts if len(set(text)) > 1]
    beginnings = {text[:end]: text for text in texts for end in range(1, len(text))}
    for text in texts:
        for start in range(1, len(text)):
            other = beginnings.get(text[start:])
            if other is not None and other != text:
                raise ConvertError(
                    f"{checkpoint.directory}/tokenizer.json: the added tokens {text!r:.60} and {other!r:.60} may "
                    "overlap in a text, where llama.cpp would cut in another place: take one of them out"
                )


def _refused(checkpoint: Checkpoint, token: AddedToken, problem: str) -> ConvertError:
    return ConvertError(f"{checkpoint.directory / token.file}: the added token {token.text!r:.60} {problem}")


# -- the files in which they are found ------------------------------------------------------------------------------


def _read(checkpoint: Checkpoint) -> Iterator[AddedToken]:
    """Each text once; tokenizer.json, which the reference reads, first."""
    seen: set[str] = set()
    for token in (*_in_lists(checkpoint), *_in_maps(checkpoint), *_in_names(checkpoint)):
        if token.text not in seen:
            seen.add(token.text)
            yield token


def entries(checkpoint: Checkpoint, name: str, key: str, kind: type) -> Any:
    """A list or an object of a tokenizer's file; empty where it is absent. Raises ConvertError."""
    value = checkpoint.json(name).get(key)
    if value is not None and not isinstance(value, kind):
        expected = "a list" if kind is list else "an object"
        raise ConvertError(f"{checkpoint.directory / name}: {key} is {value!r:.60}, expected {expected}")
    return kind() if value is None else value


def _in_lists(checkpoint: Checkpoint) -> Iterator[AddedToken]:
    for entry in entries(checkpoint, "tokenizer.json", "added_tokens", list):
        yield _token(checkpoint, "tokenizer.json", entry, entry.get("id") if isinstance(entry, dict) else None)


def _in_maps(checkpoint: Checkpoint) -> Iterator[AddedToken]:
    name = "tokenizer_config.json"
    for key, entry in entries(checkpoint, name, "added_tokens_decoder", dict).items():
        yield _token(checkpoint, name, entry, int(key) if key.isdecimal() and len(key) < 10 else None)
    for text, token_id in checkpoint.json("added_tokens.json").items():
        yield _token(checkpoint, "added_tokens.json", {"content": text}, token_id)


def _in_names(checkpoint: Checkpoint) -> Iterator[AddedToken]:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        for entry in entries(checkpoint, name, "additional_special_tokens", list):
            content = entry if isinstance(entry, dict) else {"content": entry}
            yield AddedToken(name, _text(checkpoint, name, content), None, content)


def _token(checkpoint: Checkpoint, name: str, entry: Any, token_id: Any) -> AddedToken:
    text = _text(checkpoint, name, entry)
    if type(token_id) is not int or not 0 <= token_id < 1 << 24:
        raise ConvertError(f"{checkpoint.directory / name}: the added token {text!r:.60} has no usable id")
    return AddedToken(name, text, token_id, entry)


def _text(checkpoint: Checkpoint, name: str, entry: Any) -> str:
    text = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(text, str) or not text:
        raise ConvertError(f"{checkpoint.directory / name}: an added token is {entry!r:.60}, expected one with a text")
    return text
