"""What the reference makes of a pair: its token ids, by the checkpoint's own tokenizer, and (with the `reference`
extra) its logit, by transformers. Written apart from the server's code, so that the one can check the other.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from .bpe import is_control
from .checkpoint import Checkpoint
from .errors import CannotStartError, ConvertError
from .models import BI_ENCODER, MINI_COSINE_BIAS, MINI_COSINE_SCALE, MINI_OVERLAP_SCALE, YES_LOGIT, Architecture
from .recipe import MXBAI, SPECIAL, Recipe
from .vocab import Vocabulary, bert_normalization, read_sentencepiece

MAX_LENGTH_TOKENS = 512  # of rerank.check_ids
GEMMA_PROMPT = (  # FlagEmbedding 1.4.2, FlagLLMReranker
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)


@dataclass(frozen=True)
class PromptParts:
    """What a yes-logit model was trained to read around query and passage (FlagEmbedding's options of these names)."""

    prompt: str = GEMMA_PROMPT
    query_prefix: str = "A: "
    passage_prefix: str = "B: "
    separator: str = "\n"


GEMMA_PARTS = PromptParts()
COMMON_WORDS = "the of and in to was he is as for"  # ids 1996 to 2005 of BERT's uncased vocabulary

Encode = Callable[[str], list[int]]


def max_tokens(checkpoint: Checkpoint, architecture: Architecture, positions: int) -> int:
    """The longest input, specials counted. sentence-transformers cuts a bi-encoder's texts at max_seq_length."""
    if architecture.kind == BI_ENCODER:
        longest = checkpoint.json("sentence_bert_config.json").get("max_seq_length", positions)
        if type(longest) is not int or longest < 3:
            raise ConvertError(f"{checkpoint.directory}/sentence_bert_config.json: max_seq_length is {longest!r}")
        return min(longest, positions)
    return positions


def check_pooling(checkpoint: Checkpoint) -> None:
    """A bi-encoder is served with mean pooling and nothing else."""
    pooling = checkpoint.json("1_Pooling/config.json")
    wanted = [key for key, value in pooling.items() if key.startswith("pooling_mode_") and value is True]
    if wanted != ["pooling_mode_mean_tokens"] and pooling.get("pooling_mode") != "mean":
        raise CannotStartError(
            f"{checkpoint.directory}/1_Pooling/config.json: a BertModel is converted as a bi-encoder with mean "
            f"pooling, but this says {wanted or 'nothing'}"
        )


class ReferencePairs:
    """Token ids of pairs as FlagEmbedding 1.4.2 (cross-encoders, gemma), a recipe's own reference, or
    sentence-transformers (bi-encoders) build them."""

    def __init__(
        self, checkpoint: Checkpoint, architecture: Architecture, vocabulary: Vocabulary, longest: int,
        parts: PromptParts = GEMMA_PARTS, recipe: Recipe | None = None,
    ) -> None:
        """longest: tokens that the model takes. Raises ConvertError when the tokenizer cannot be opened."""
        self._parts, self.recipe = parts, recipe
        self._kind, self._special, self._longest = architecture.kind, vocabulary.special, longest
        self._separators = 2 if architecture.tokenizer == "t5" else 1
        self._tokens = vocabulary.tokens
        self.encode = _open_tokenizer(checkpoint, architecture)

    def ids(self, query: str, passage: str, max_length: int = MAX_LENGTH_TOKENS) -> list[int]:
        """The ids of a pair; of the passage alone for a bi-encoder."""
        limit = min(max_length, self._longest)
        if self.recipe:
            return self._recipe_ids(self.recipe, query, passage, limit)
        if self._kind == YES_LOGIT:
            return self._prompt_ids(query, passage, limit)
        first = self._special["cls" if "cls" in self._special else "bos"]
        last = self._special.get("seperator", first)
        if self._kind == BI_ENCODER:
            return [first, *self.encode(passage)[: limit - 2], last]
        head = [first, *self.encode(query)[: limit * 3 // 4], *[last] * self._separators]
        return [*head, *self.encode(passage)[: max(0, limit - len(head) - 1)], last]

    def first_piece_id(self) -> int:
        """The id of "the", if the vocabulary goes on from there in the order of frequency, as BERT's does; else 0."""
        ids = self.encode(COMMON_WORDS)
        return ids[0] if ids and ids == list(range(ids[0], ids[0] + len(COMMON_WORDS.split()))) else 0

    def _prompt_ids(self, query: str, passage: str, limit: int) -> list[int]:
        """prepare_for_model(..., truncation="only_second", max_length + len(separator) + len(prompt)), then the end."""
        parts = self._parts
        separator, prompt = self.encode(parts.separator), self.encode(parts.prompt)
        head = [self._special["bos"], *self.encode(parts.query_prefix + query)[: limit * 3 // 4]]
        body = [*separator, *self.encode(parts.passage_prefix + passage)[:limit]]
        room = limit + len(separator) + len(prompt) - len(head)
        return [*head, *body[: max(len(separator), room)], *separator, *prompt]


    def _recipe_ids(self, recipe: Recipe, query: str, passage: str, limit: int) -> list[int]:
        if recipe.strip:
            query, passage = query.strip(), passage.strip()
        asked, told = recipe.query_prefix + query + recipe.query_suffix, recipe.passage_prefix + passage
        head, tail = self._template_ids(recipe.head), self._template_ids(recipe.tail)
        if recipe.truncation == MXBAI:  # prepare_inputs: cut to 3/4; then prepare_for_model(..., "only_second")
            first = self.encode(asked)[: limit * 3 // 4]
            second = self.encode(recipe.separator) + self.encode(told)[:limit]
            return [*head, *first, *second[: max(0, limit - len(first))], *tail]
        if recipe.separator:  # special tokens stand between the two, and the text after them belongs to the passage
            cut = [match.end() for match in SPECIAL.finditer(recipe.separator)][-1]
            body = [*self.encode(asked), *self._template_ids(recipe.separator[:cut])]
            body += self.encode(recipe.separator[cut:] + told)
        else:
            body = self.encode(asked + told)
        return [*[*head, *body][: max(0, limit - len(tail))], *tail]

    def _template_ids(self, text: str) -> list[int]:
        """The prompt's own text, in which special tokens are read."""
        ids, start = [], 0
        for match in SPECIAL.finditer(text):
            ids += [*self.encode(text[start : match.start()]), self._special_id(match[0])]
            start = match.end()
        return ids + self.encode(text[start:])

    def _special_id(self, token: str) -> int:
        if token not in self._tokens:
            raise ConvertError(f"the vocabulary has no {token}, which the prompt of this reranker holds")
        return self._tokens.index(token)


def _open_tokenizer(checkpoint: Checkpoint, architecture: Architecture) -> Encode:
    """text -> ids without specials: tokenizer.json as the reference reads it, else the file that it is made from."""
    directory = checkpoint.directory
    try:
        if architecture.tokenizer == "gpt2":
            return _careful(directory, _open_bpe(checkpoint))
        if (directory / "tokenizer.json").is_file():
            from tokenizers import Tokenizer

            path = directory / "tokenizer.json"
            _try_in_child(str(path), path.stat().st_mtime_ns)
            tokenizer = Tokenizer.from_file(str(path))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return _careful(directory, lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids))
        if architecture.tokenizer == "bert":
            return _open_vocab_txt(checkpoint)
        return _open_sentencepiece(checkpoint, architecture)
    except ConvertError:
        raise
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as exc:  # bare Exception for a file that tokenizers cannot read, or a panic of its Rust code
        raise ConvertError(f"{directory}: its tokenizer cannot be opened ({str(exc)[:150]})") from exc


def _careful(directory: Path, encode: Encode) -> Encode:
    """A tokenizer may open and still fail at a text: an unknown character where unk_id is missing."""

    def careful(text: str) -> list[int]:
        try:
            return encode(text)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as exc:  # a panic of its Rust code is no Exception
            raise ConvertError(f"{directory}: its tokenizer fails at a text ({str(exc)[:150]})") from exc

    return careful


@lru_cache(maxsize=8)
def _try_in_child(path: str, changed_ns: int) -> None:
    """tokenizers ends the process for some files (a panic while it cleans up), so one opens the file first. Raises
    ValueError with its last words. changed_ns: so that a file which changed is tried again."""
    code = "import sys, tokenizers; tokenizers.Tokenizer.from_file(sys.argv[1]).encode('Größe 東京 a')"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise ValueError((done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1])


def _open_bpe(checkpoint: Checkpoint) -> Encode:
    """As the reference reads tokenizer.json, but what looks like a control token inside a text is text."""
    from tokenizers import Tokenizer

    path = checkpoint.directory / "tokenizer.json"
    _try_in_child(str(path), path.stat().st_mtime_ns)
    content = checkpoint.json("tokenizer.json")
    for added in content.get("added_tokens") or []:
        added["special"] = is_control(added)
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def _open_vocab_txt(checkpoint: Checkpoint) -> Encode:
    from tokenizers.implementations import BertWordPieceTokenizer

    lowercase, strip_accents = bert_normalization(checkpoint)
    path = str(checkpoint.directory / "vocab.txt")
    tokenizer = BertWordPieceTokenizer(path, lowercase=lowercase, strip_accents=strip_accents)
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def _open_sentencepiece(checkpoint: Checkpoint, architecture: Architecture) -> Encode:
    from sentencepiece import SentencePieceProcessor

    if architecture.tokenizer == "llama":
        model = read_sentencepiece(checkpoint.directory / "tokenizer.model")
        processor = SentencePieceProcessor(model_proto=model.SerializeToString())
        return lambda text: list(processor.encode(text))
    model = read_sentencepiece(checkpoint.directory / "sentencepiece.bpe.model")
    processor = SentencePieceProcessor(model_proto=model.SerializeToString())
    # fairseq's ids are SentencePiece's plus one; its <unk> (0) is 3
    return lambda text: [token + 1 if token else 3 for token in processor.encode(text)]


def transformers_logits(
    checkpoint: Checkpoint, architecture: Architecture, pairs: ReferencePairs, samples: Sequence[tuple[str, str]]
) -> list[float]:
    """The logits by transformers in float32, one pair at a time. Raises CannotStartError without torch."""
    try:
        import torch
        import transformers
    except ImportError as exc:
        raise CannotStartError("--reference needs torch and transformers: pip install '.[reference]'") from exc
    classes = {YES_LOGIT: "AutoModelForCausalLM", BI_ENCODER: "AutoModel"}
    loader = getattr(transformers, classes.get(architecture.kind, "AutoModelForSequenceClassification"))
    model = loader.from_pretrained(str(checkpoint.directory), dtype=torch.float32).eval()
    score = {YES_LOGIT: _yes_logit, BI_ENCODER: _cosine_logit}.get(architecture.kind, _head_logit)
    with torch.no_grad():
        return [score(torch, model, pairs, query, passage) for query, passage in samples]


def _head_logit(torch: Any, model: Any, pairs: ReferencePairs, query: str, passage: str) -> float:
    ids = pairs.ids(query, passage)
    types = [0] * len(ids)
    if getattr(model.config, "type_vocab_size", 1) > 1:
        start = len(pairs.ids(query, "")) - 1
        types = [int(index >= start) for index in range(len(ids))]
    inputs = {"token_type_ids": torch.tensor([types])} if hasattr(model.config, "type_vocab_size") else {}
    return float(model(input_ids=torch.tensor([ids]), **inputs).logits[0, 0])


def _yes_logit(torch: Any, model: Any, pairs: ReferencePairs, query: str, passage: str) -> float:
    logits = model(input_ids=torch.tensor([pairs.ids(query, passage)])).logits[0, -1]
    recipe = pairs.recipe
    if recipe is None:
        return float(logits[pairs.encode("Yes")[0]])
    no = 0.0 if recipe.no is None else float(logits[pairs.encode(recipe.no)[0]])
    return recipe.scale * (float(logits[pairs.encode(recipe.yes)[0]]) - no)


def _cosine_logit(torch: Any, model: Any, pairs: ReferencePairs, query: str, passage: str) -> float:
    outputs = [model(input_ids=torch.tensor([pairs.ids("", text)])) for text in (query, passage)]
    vectors = [output.last_hidden_state[0].mean(0) for output in outputs]
    logit = MINI_COSINE_SCALE * float(torch.cosine_similarity(*vectors, dim=0)) + MINI_COSINE_BIAS
    first = pairs.first_piece_id()
    return logit + MINI_OVERLAP_SCALE * overlap(pairs, query, passage, first) if first else logit


def overlap(pairs: ReferencePairs, query: str, passage: str, first_piece_id: int) -> float:
    """rerank_server.overlap, whose docstring says why, of two texts."""
    asked, held = (pairs.ids("", text)[1:-1] for text in (query, passage))
    weight = {token: math.log(1 + max(0, token - first_piece_id) / 10) for token in set(asked)}
    return sum(weight[token] for token in weight if token in held) / max(sum(weight.values()), 1e-9)
