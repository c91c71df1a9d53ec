"""How a language model is asked whether a passage answers a query: the prompt around the two texts,
the words whose logits are read after it, and how the reference cuts what is too long.

sentence-transformers 5.4 and later records it in a checkpoint: a LogitScore module (the words' ids)
and a chat template with the roles query and document. Older clones record nothing and are known by
their name.
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

# What the reference does with what is too long.
WHOLE = "whole"  # everything before the tail is one text, which loses its end
MXBAI = "mxbai"  # the query keeps 3/4 of the limit, the passage the rest; head and tail come on top


@dataclass(frozen=True)
class Recipe:
    """ids = head, query_prefix + query + query_suffix, separator, passage_prefix + passage, tail.

    Each of the five is tokenised by itself. Special tokens are read in head, separator and tail,
    which no user writes, and nowhere else.

    instructed_query_prefix: takes the place of query_prefix where a request has an instruction,
    which stands at {instruction} in it; "" where the model takes none. instruction: the one in
    query_prefix. strip: white space at both ends of query and passage is dropped.
    score = sigmoid(scale * (logit of yes - logit of no)); no is None where only one word counts.
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
    strip: bool = False
    instructed_query_prefix: str = ""
    instruction: str = ""


SPECIAL = re.compile(r"<\|\w+\|>")


def split_template(
    before: str, between: str, after: str, yes: str = "", no: str | None = None
) -> Recipe:
    """The parts of a prompt that is tokenised as one text, from what stands around its two texts.

    Text is tokenised together with the query or passage that it touches, up to the nearest special
    token. The white space before the passage is left to it: with the passage's own white space, or
    its first word, it makes tokens. What comes before that is the same for all passages, and
    computed once. Raises ConvertError when the passage is not followed by a special token.
    """
    if not SPECIAL.match(after):
        raise ConvertError("no special token stands between the passage and the rest of the prompt")
    head, query_prefix = _after_last_special(before)
    shared = between.rstrip()
    special = SPECIAL.search(shared)
    cut = special.start() if special else len(shared)
    passage_prefix = between[len(shared) :]
    return Recipe(head, query_prefix, shared[:cut], shared[cut:], passage_prefix, after, yes, no)


def _after_last_special(text: str) -> tuple[str, str]:
    cut = max((match.end() for match in SPECIAL.finditer(text)), default=0)
    return text[:cut], text[cut:]


# -- what is known by name -------------------------------------------------------------------------

# The cards of Qwen/Qwen3-Reranker-0.6B, -4B and -8B: prefix, format_instruction and suffix; the
# words are the bare tokens; process_inputs cuts the one text that stands between prefix and suffix.
_QWEN3_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
_QWEN3 = replace(
    split_template(
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
        'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
        "<|im_start|>user\n"
        f"<Instruct>: {_QWEN3_INSTRUCTION}\n<Query>: ",
        "\n<Document>: ",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        yes="yes",
        no="no",
    ),
    instructed_query_prefix="user\n<Instruct>: {instruction}\n<Query>: ",
    instruction=_QWEN3_INSTRUCTION,
)

# mxbai_rerank 0.1.6, MxbaiRerankV2: prepare_predefined_inputs and prepare_inputs, part by part.
_MXBAI = Recipe(
    head="<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    "<|im_end|>\n<|im_start|>user\n",
    query_prefix="query: ",
    query_suffix="",
    separator="\n",
    passage_prefix="document: ",
    tail="\nYou are a search relevance expert who evaluates how well documents match search queries. "
    "For each query-document pair, carefully analyze the semantic relationship between them, then "
    "provide your binary relevance judgment (0 for not relevant, 1 for relevant).\n"
    "Relevance:<|im_end|>\n"
    "<|im_start|>assistant\n",
    yes="1",
    no="0",
    truncation=MXBAI,
    instructed_query_prefix="instruction: {instruction}\nquery: ",
)

# zeroentropy/zerank-1 and zerank-1-small, modeling_zeranker.py, and zerank-2: the query is the
# system's message, the passage the user's; sigmoid(logit of "Yes" / 5). That code cuts a query at
# 2,000 characters and a passage at 10,000, to save memory; here the limit in tokens does.
_ZERANK = replace(
    split_template(
        "<|im_start|>system\n",
        "<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        yes="Yes",
    ),
    scale=0.2,
    strip=True,
)

_KNOWN = (  # part of the name of a directory, of the Hub id or of config.json's _name_or_path
    (re.compile(r"qwen3-reranker", re.IGNORECASE), _QWEN3),
    (re.compile(r"mxbai-rerank-\w+-v2", re.IGNORECASE), _MXBAI),
    (re.compile(r"zerank-[12]", re.IGNORECASE), _ZERANK),
)


def known_recipe(names: Iterable[str]) -> Recipe | None:
    """The recipe of a model that is known by one of its names."""
    joined = "\n".join(names)
    return next((recipe for pattern, recipe in _KNOWN if pattern.search(joined)), None)


# -- what a checkpoint records ---------------------------------------------------------------------


def find_recipe(checkpoint: Checkpoint, source: str, vocabulary: Vocabulary) -> Recipe:
    """source: the Hub id or name that the file will record. Raises CannotStartError where
    nothing says what the model must be asked, ConvertError for what it says wrongly."""
    directory, config = checkpoint.directory, checkpoint.config.values
    known = known_recipe((directory.resolve().name, source, str(config.get("_name_or_path", ""))))
    words = _recorded_words(checkpoint, vocabulary)
    if words is not None:
        return _recorded_recipe(checkpoint, words, known)
    if known is None:
        raise CannotStartError(
            f"{directory}: a language model, but nothing says that it is a reranker: no LogitScore in "
            "its modules.json, and neither Qwen3-Reranker nor mxbai-rerank-...-v2 nor zerank in its name"
        )
    return known


def _recorded_recipe(
    checkpoint: Checkpoint, words: tuple[str, str | None], known: Recipe | None
) -> Recipe:
    """mxbai's own code tokenises the prompt's parts apart, and so was the model trained: its
    chat template, one text, is not used."""
    if known is None and words == (_MXBAI.yes, _MXBAI.no):
        known = _MXBAI
    recipe = (
        known if known and known.truncation == MXBAI else _recipe_of_template(checkpoint) or known
    )
    if recipe is None:
        raise CannotStartError(
            f"{checkpoint.directory}: its chat template has no place for a query and a document, so "
            "the prompt of this reranker is not known"
        )
    scale = known.scale if known and (known.yes, known.no) == words else 1.0
    return replace(recipe, yes=words[0], no=words[1], scale=scale)


def _recorded_words(
    checkpoint: Checkpoint, vocabulary: Vocabulary
) -> tuple[str, str | None] | None:
    """The words of modules.json's LogitScore; None without one."""
    folder = _logit_score_folder(checkpoint)
    if folder is None:
        return None
    name = f"{folder}/config.json"
    values = checkpoint.json(name)
    no = values.get("false_token_id")
    for token_id in (values.get("true_token_id"), *([] if no is None else [no])):
        if type(token_id) is not int or not 0 <= token_id < len(vocabulary.tokens):
            raise ConvertError(f"{checkpoint.directory}/{name}: {token_id!r} is no token's id")
    return vocabulary.tokens[values["true_token_id"]], None if no is None else vocabulary.tokens[no]


def _logit_score_folder(checkpoint: Checkpoint) -> str | None:
    path = checkpoint.directory / "modules.json"
    try:
        modules = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        found = [str(one["path"]) for one in modules if str(one["type"]).endswith(".LogitScore")]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
        raise ConvertError(f"{path}: not a list of modules ({type(exc).__name__})") from exc
    if found and not re.fullmatch(r"\w+", found[0]):
        raise ConvertError(
            f"{path}: the LogitScore module's path {found[0]!r:.80} is no folder's name"
        )
    return found[0] if found else None


_QUERY, _PASSAGE, _INSTRUCTION = "QUERY⁂", "PASSAGE⁂", "INSTRUCTION⁂"  # what no template contains


def _recipe_of_template(checkpoint: Checkpoint) -> Recipe | None:
    """The prompt that the chat template makes of a query and a passage; None if it does not show
    both."""
    template, options = _chat_template(checkpoint), _template_options(checkpoint)

    def around(query: str, passage: str, *more: dict[str, str]) -> tuple[str, str, str] | None:
        pair = ({"role": "query", "content": query}, {"role": "document", "content": passage})
        return _around(_render(template, {**options, "messages": [*more, *pair]}), query, passage)

    plain = around(_QUERY, _PASSAGE)
    if plain is None:
        return None
    try:
        recipe = split_template(*plain)
    except ConvertError as exc:
        raise ConvertError(
            f"{checkpoint.directory}: its chat template cannot be used: {exc}"
        ) from exc
    recipe = replace(recipe, strip=around(f" {_QUERY} ", f" {_PASSAGE} ") is None)
    instructed = around(_QUERY, _PASSAGE, {"role": "system", "content": _INSTRUCTION})
    return _with_instruction(recipe, instructed[0]) if instructed else recipe


def _with_instruction(recipe: Recipe, before: str) -> Recipe:
    """before: what stands before the query when the system's message is _INSTRUCTION. A template
    that shows it elsewhere, or not at all, takes no instruction."""
    head, prefix = _after_last_special(before)
    start, marker, end = prefix.partition(_INSTRUCTION)
    plain = recipe.query_prefix
    if head != recipe.head or not marker or not (plain.startswith(start) and plain.endswith(end)):
        return recipe
    default = plain[len(start) : len(plain) - len(end)]
    return replace(
        recipe, instructed_query_prefix=f"{start}{{instruction}}{end}", instruction=default
    )


def _chat_template(checkpoint: Checkpoint) -> str:
    for name in ("additional_chat_templates/reranker.jinja", "chat_template.jinja"):
        path = checkpoint.directory / name
        if path.is_file():
            return path.read_text(encoding="utf-8", errors="replace")
    return str(checkpoint.json("tokenizer_config.json").get("chat_template") or "")


def _template_options(checkpoint: Checkpoint) -> dict[str, Any]:
    """What sentence-transformers hands to the template: add_generation_prompt, as a rule."""
    recorded = checkpoint.json("sentence_bert_config.json").get("processing_kwargs")
    options = recorded.get("chat_template") if isinstance(recorded, dict) else None
    return options if isinstance(options, dict) else {}


def _render(template: str, values: dict[str, Any]) -> str:
    """As transformers does (utils/chat_template_utils.py), but "" where that raises. Sandboxed: a
    template is its author's program."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    try:
        return environment.from_string(template).render(values)
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return ""


def _around(text: str, first: str, second: str) -> tuple[str, str, str] | None:
    """What stands before, between and after the two; None unless each is there once, in this
    order."""
    if text.count(first) != 1 or text.count(second) != 1 or text.index(first) > text.index(second):
        return None
    before, _, rest = text.partition(first)
    between, _, after = rest.partition(second)
    return before, between, after


# -- what a file says of it ------------------------------------------------------------------------


def recipe_metadata(
    checkpoint: Checkpoint, recipe: Recipe, vocabulary: Vocabulary
) -> dict[str, Any]:
    """The rerank.* keys; what is empty is left out. Raises ConvertError for a word that is no
    token."""
    names = (
        "head", "query_prefix", "query_suffix", "separator", "passage_prefix", "tail", "truncation", "strip",
        "instructed_query_prefix", "instruction",
    )  # fmt: skip
    values = {f"rerank.{name}": getattr(recipe, name) for name in names if getattr(recipe, name)}
    values["rerank.yes_token_id"] = _word_id(checkpoint, recipe.yes, vocabulary)
    if recipe.no is not None:
        values["rerank.no_token_id"] = _word_id(checkpoint, recipe.no, vocabulary)
    return values | ({"rerank.logit_scale": recipe.scale} if recipe.scale != 1 else {})


def _word_id(checkpoint: Checkpoint, word: str, vocabulary: Vocabulary) -> int:
    tokens = vocabulary.tokens
    if word not in tokens or vocabulary.types[tokens.index(word)] == CONTROL:
        raise ConvertError(
            f"{checkpoint.directory}: its vocabulary has no {word!r}, whose logit would be the score"
        )
    return tokens.index(word)
