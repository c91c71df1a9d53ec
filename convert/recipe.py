"""How a causal language model is asked whether a passage answers a query: the prompt around the two texts, the words
whose logits are read after it, and how the reference cuts what is too long.

A checkpoint records it in the files of sentence-transformers 5.4 and later: a LogitScore module (the words' ids) and a
chat template with the roles query and document. Older clones record nothing and are known by their name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from .checkpoint import Checkpoint
from .errors import CannotStartError, ConvertError
from .vocab import CONTROL, Vocabulary

# How the reference cuts, in this order: where the length of the answer's frame is counted, and what is cut first.
MXBAI = "mxbai"  # the query to 3/4 of the limit, then the passage; head and tail come on top of the limit
WHOLE = "whole"  # everything before the tail as one text, from its end


@dataclass(frozen=True)
class Recipe:
    """ids = head, query_prefix + query + query_suffix, separator, passage_prefix + passage, tail.

    Each of the five is tokenised by itself. Special tokens are read in head, separator and tail, which no user writes,
    and nowhere else. instructed_query_prefix: in place of query_prefix where a request has an instruction, with
    {instruction} in it; "" where the model takes none. instruction: the one that query_prefix holds.
    score = sigmoid(scale * (logit of `yes` - logit of `no`)); no: None where only one word counts.
    """

    head: str
    query_prefix: str
    query_suffix: str
    separator: str
    passage_prefix: str
    tail: str
    yes: str
    no: str | None
    truncation: str = WHOLE
    scale: float = 1.0
    instructed_query_prefix: str = ""
    instruction: str = ""


SPECIAL = re.compile(r"<\|\w+\|>")
# Whatever stands between the passage and the last word before it must begin a token of its own: white space does,
# with the passage's own white space or first word; then everything before it is the same for all passages.
_TRAILING_SPACE = re.compile(r"\s*\Z")


def split_template(before: str, between: str, after: str) -> Recipe:
    """The parts of a prompt whose texts are tokenised in one piece, from what stands around the query and the passage.

    Text next to the query or the passage, up to the nearest special token, is tokenised together with it.
    """
    head, query_prefix = _after_last_special(before)
    special = SPECIAL.search(between)
    query_suffix, separator = (between[: special.start()], between[special.start() :]) if special else (between, "")
    passage_prefix = _TRAILING_SPACE.search(between)[0]  # type: ignore[index]
    shared = len(passage_prefix)
    if separator:
        separator = separator[: len(separator) - shared]
    else:
        query_suffix = query_suffix[: len(query_suffix) - shared]
    if not SPECIAL.match(after):
        raise ConvertError("no special token stands between the passage and the rest of the prompt")
    return Recipe(head, query_prefix, query_suffix, separator, passage_prefix, after, "", None)


def _after_last_special(text: str) -> tuple[str, str]:
    ends = [match.end() for match in SPECIAL.finditer(text)]
    cut = ends[-1] if ends else 0
    return text[:cut], text[cut:]


# -- what is known by name ------------------------------------------------------------------------------------------

# The model cards of Qwen/Qwen3-Reranker-0.6B, -4B and -8B: prefix, format_instruction, suffix; the words are the
# bare tokens; process_inputs cuts the one text between prefix and suffix.
_QWEN3_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
_QWEN3 = replace(
    split_template(
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
        f"<Instruct>: {_QWEN3_INSTRUCTION}\n<Query>: ",
        "\n<Document>: ",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    yes="yes", no="no", instruction=_QWEN3_INSTRUCTION,
    instructed_query_prefix="user\n<Instruct>: {instruction}\n<Query>: ",
)  # fmt: skip

# mxbai_rerank 0.1.6, MxbaiRerankV2: prepare_inputs and prepare_predefined_inputs, whose parts are tokenised apart.
_MXBAI = Recipe(
    head="<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n",
    query_prefix="query: ",
    query_suffix="",
    separator="\n",
    passage_prefix="document: ",
    tail="\nYou are a search relevance expert who evaluates how well documents match search queries. For each "
    "query-document pair, carefully analyze the semantic relationship between them, then provide your binary relevance "
    "judgment (0 for not relevant, 1 for relevant).\nRelevance:<|im_end|>\n<|im_start|>assistant\n",
    yes="1",
    no="0",
    truncation=MXBAI,
    instructed_query_prefix="instruction: {instruction}\nquery: ",
)

# zeroentropy/zerank-1, zerank-1-small, zerank-2: the query is the system's message, the passage the user's; the cards
# and the models' own code give sigmoid(logit of "Yes" / 5).
_ZERANK = replace(
    split_template(
        "<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    ),
    yes="Yes", scale=0.2,
)  # fmt: skip

_KNOWN = (  # part of the name of a directory, of the Hub id or of config.json's _name_or_path
    (re.compile(r"qwen3-reranker", re.IGNORECASE), _QWEN3),
    (re.compile(r"mxbai-rerank-\w+-v2", re.IGNORECASE), _MXBAI),
    (re.compile(r"zerank-[12]", re.IGNORECASE), _ZERANK),
)


def known_recipe(names: Iterable[str]) -> Recipe | None:
    """The recipe of a model that is known by one of its names."""
    joined = "\n".join(names)
    return next((recipe for pattern, recipe in _KNOWN if pattern.search(joined)), None)


# -- what a checkpoint records --------------------------------------------------------------------------------------


def find_recipe(checkpoint: Checkpoint, source: str, vocabulary: Vocabulary) -> Recipe:
    """source: the Hub id or name that the file will record. Raises CannotStartError where nothing says what to ask."""
    names = (checkpoint.directory.resolve().name, source, str(checkpoint.config.values.get("_name_or_path", "")))
    known, words = known_recipe(names), _recorded_words(checkpoint, vocabulary)
    if known is None and words is None:
        raise CannotStartError(
            f"{checkpoint.directory}: a language model, but nothing says that it is a reranker: no LogitScore in its "
            "modules.json, and neither Qwen3-Reranker nor mxbai-rerank-v2 nor zerank in its name"
        )
    if words is not None:
        known = known or (_MXBAI if words == (_MXBAI.yes, _MXBAI.no) else None)
        recipe = known if known and known.truncation == MXBAI else _recipe_of_template(checkpoint) or known
        if recipe is None:
            raise CannotStartError(
                f"{checkpoint.directory}: its chat template has no place for a query and a document, so the prompt of "
                "this reranker is not known"
            )
        is_known = known is not None and (known.yes, known.no) == words
        return replace(recipe, yes=words[0], no=words[1], scale=known.scale if known and is_known else 1.0)
    assert known is not None
    return known


def _recorded_words(checkpoint: Checkpoint, vocabulary: Vocabulary) -> tuple[str, str | None] | None:
    """The words of modules.json's LogitScore; None without one. Raises ConvertError: an id outside the vocabulary."""
    folder = _logit_score_folder(checkpoint)
    if folder is None:
        return None
    values = checkpoint.json(f"{folder}/config.json")
    words: list[str] = []
    for name in ("true_token_id", "false_token_id"):
        token_id = values.get(name)
        if token_id is None and name == "false_token_id":
            return words[0], None
        if type(token_id) is not int or not 0 <= token_id < len(vocabulary.tokens):
            raise ConvertError(f"{checkpoint.directory}/{folder}/config.json: {name} is {token_id!r}, no token's id")
        words.append(vocabulary.tokens[token_id])
    return words[0], words[1]


def _logit_score_folder(checkpoint: Checkpoint) -> str | None:
    path = checkpoint.directory / "modules.json"
    try:
        modules = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        found = [str(module["path"]) for module in modules if str(module["type"]).endswith(".LogitScore")]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ConvertError(f"{path}: not a list of sentence-transformers' modules ({type(exc).__name__})") from exc
    if found and not re.fullmatch(r"\w+", found[0]):
        raise ConvertError(f"{path}: the LogitScore module's path {found[0]!r:.80} is no plain folder name")
    return found[0] if found else None


_QUERY, _PASSAGE, _INSTRUCTION = "QUERY⁂", "PASSAGE⁂", "INSTRUCTION⁂"  # what no template contains


def _recipe_of_template(checkpoint: Checkpoint) -> Recipe | None:
    """The prompt that the chat template makes of a query and a document; None where it shows not both of them."""
    template = _chat_template(checkpoint)
    pair = [{"role": "query", "content": _QUERY}, {"role": "document", "content": _PASSAGE}]
    plain = _around(_render(checkpoint, template, pair), _QUERY, _PASSAGE)
    if plain is None:
        return None
    recipe = _split(checkpoint, *plain)
    system = [{"role": "system", "content": _INSTRUCTION}, *pair]
    instructed = _around(_render(checkpoint, template, system), _QUERY, _PASSAGE)
    if instructed is None or instructed[1:] != plain[1:]:
        return recipe
    head, prefix = _after_last_special(instructed[0])
    before, marker, rest = prefix.partition(_INSTRUCTION)
    if head != recipe.head or not marker or not recipe.query_prefix.startswith(before):
        return recipe
    default = recipe.query_prefix[len(before) : len(recipe.query_prefix) - len(rest)]
    return replace(recipe, instructed_query_prefix=f"{before}{{instruction}}{rest}", instruction=default)


def _chat_template(checkpoint: Checkpoint) -> str:
    for name in ("additional_chat_templates/reranker.jinja", "chat_template.jinja"):
        path = checkpoint.directory / name
        if path.is_file():
            return path.read_text(encoding="utf-8", errors="replace")
    return str(checkpoint.json("tokenizer_config.json").get("chat_template") or "")


def _render(checkpoint: Checkpoint, template: str, messages: list[dict[str, str]]) -> str:
    """As transformers renders it (utils/chat_template_utils.py), sandboxed: a template is a program of its author's."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as exc:
        raise ConvertError(f"{checkpoint.directory}: its chat template cannot be used ({str(exc)[:120]})") from exc


def _around(text: str, first: str, second: str) -> tuple[str, str, str] | None:
    """What stands before, between and after the two; None unless each is there once, in this order."""
    if text.count(first) != 1 or text.count(second) != 1 or text.index(first) > text.index(second):
        return None
    before, _, rest = text.partition(first)
    between, _, after = rest.partition(second)
    return before, between, after


def _split(checkpoint: Checkpoint, before: str, between: str, after: str) -> Recipe:
    try:
        return split_template(before, between, after)
    except ConvertError as exc:
        raise ConvertError(f"{checkpoint.directory}: its chat template cannot be used: {exc}") from exc


def recipe_metadata(checkpoint: Checkpoint, recipe: Recipe, vocabulary: Vocabulary) -> dict[str, Any]:
    """rerank.* keys; a text that is empty is left out. Raises ConvertError for a word that is no token."""
    texts = {
        "head": recipe.head, "query_prefix": recipe.query_prefix, "query_suffix": recipe.query_suffix,
        "separator": recipe.separator, "passage_prefix": recipe.passage_prefix, "tail": recipe.tail,
        "instructed_query_prefix": recipe.instructed_query_prefix, "instruction": recipe.instruction,
        "truncation": recipe.truncation,
    }  # fmt: skip
    values: dict[str, Any] = {f"rerank.{key}": text for key, text in texts.items() if text}
    values["rerank.yes_token_id"] = _word_id(checkpoint, recipe.yes, vocabulary)
    if recipe.no is not None:
        values["rerank.no_token_id"] = _word_id(checkpoint, recipe.no, vocabulary)
    if recipe.scale != 1:
        values["rerank.logit_scale"] = recipe.scale
    return values


def _word_id(checkpoint: Checkpoint, word: str, vocabulary: Vocabulary) -> int:
    if word not in vocabulary.tokens or vocabulary.types[vocabulary.tokens.index(word)] == CONTROL:
        raise ConvertError(f"{checkpoint.directory}: its vocabulary has no token {word!r}, whose logit is the score")
    return vocabulary.tokens.index(word)
