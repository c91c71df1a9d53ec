"""What a language model is asked, and what becomes of its tokenizer and weights: convert/recipe.py, bpe.py, tensors.py.

No file is scored here; that a converted file scores as its reference is what test_parity.py shows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    make_modernbert,
    make_qwen2,
    make_qwen3,
    make_zerank,
    qwen_ids,
    write_json,
    write_logit_score,
)
from golden.inputs import CUT_PAIRS, compact
from safetensors.numpy import load_file, save_file

from convert.errors import ConvertError
from convert.job import Job
from convert.recipe import Recipe
from convert.vocab import CONTROL, NORMAL, USER_DEFINED

MAKERS = {"qwen3": make_qwen3, "qwen2": make_qwen2, "zerank": make_zerank, "modernbert": make_modernbert}
GOLDEN = Path(__file__).resolve().parent / "golden"
ZERANK_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ {"query": "system", "document": "user"}[message.role] }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def edit_json(path: Path, **changes: Any) -> None:
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | changes)


def recipe_of(checkpoint: Path) -> Recipe:
    recipe = Job.open(checkpoint).pairs.recipe
    assert recipe is not None
    return recipe


def renamed(checkpoint: Path, name: str) -> Path:
    """The same model as an old clone: under the Hub's name, and without sentence-transformers' files."""
    target = checkpoint.parent / "old" / name
    shutil.copytree(checkpoint, target)
    shutil.rmtree(target / "1_LogitScore", ignore_errors=True)
    for file in ("modules.json", "chat_template.jinja"):
        (target / file).unlink(missing_ok=True)
    return target


# -- the prompt --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_the_converters_pairs_are_the_references(name: str, tmp_path: Path) -> None:
    """`python -m convert` compares the server's ids with these: if both were wrong, nobody would notice."""
    answers = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))["pairs"]
    pairs = Job.open(MAKERS[name](tmp_path / "tiny")).pairs
    for pair, (query, passage) in CUT_PAIRS.items():
        for length, ids in answers[pair].items():
            if length != "whole":
                assert compact(pairs.ids(query, passage, int(length))) == ids, f"{pair} at {length}"


def test_a_qwen3_reranker_says_the_same_with_and_without_its_sentence_transformers_files(tmp_path: Path) -> None:
    """The prompt in its chat template, read as the template's author meant it, is the model card's."""
    checkpoint = make_qwen3(tmp_path / "tiny")
    recorded = recipe_of(checkpoint)
    assert recorded == recipe_of(renamed(checkpoint, "Qwen3-Reranker-0.6B"))
    assert recorded.instruction == "Given a web search query, retrieve relevant passages that answer the query"
    assert "{instruction}" in recorded.instructed_query_prefix


def test_a_zerank_says_the_same_with_and_without_its_sentence_transformers_files(tmp_path: Path) -> None:
    checkpoint = make_zerank(tmp_path / "tiny")
    by_name = recipe_of(checkpoint)
    write_logit_score(checkpoint, "Yes", None)
    (checkpoint / "chat_template.jinja").write_text(ZERANK_TEMPLATE.replace("content", "content.strip()"))
    options = {"processing_kwargs": {"chat_template": {"add_generation_prompt": True}}}
    write_json(checkpoint / "sentence_bert_config.json", options)
    assert recipe_of(checkpoint) == by_name
    assert by_name.strip
    (checkpoint / "chat_template.jinja").write_text(ZERANK_TEMPLATE)
    assert not recipe_of(checkpoint).strip, "a template that keeps white space"
    (checkpoint / "sentence_bert_config.json").unlink()
    assert recipe_of(checkpoint).tail == "<|im_end|>\n", "without the option, as sentence-transformers renders it"


def test_mxbai_is_known_by_its_words_and_by_its_name(tmp_path: Path) -> None:
    checkpoint = make_qwen2(tmp_path / "tiny")
    assert recipe_of(checkpoint) == recipe_of(renamed(checkpoint, "mxbai-rerank-base-v2"))


def test_a_fine_tunes_own_prompt_and_words_are_read(tmp_path: Path) -> None:
    """A fine-tune keeps Qwen's files and changes what it is asked; by its name alone it would be asked wrongly."""
    checkpoint = make_qwen3(tmp_path / "Qwen3-Reranker-of-mine")
    write_logit_score(checkpoint, "Yes", "No")
    (checkpoint / "chat_template.jinja").write_text(
        "<|im_start|>user\nQ: {{ messages[0].content }}<|im_end|>\n<|im_start|>user\nP:{{ messages[1].content }}"
        "<|im_end|>\n<|im_start|>assistant\n\n"
    )
    recipe = recipe_of(checkpoint)
    assert (recipe.head, recipe.query_prefix, recipe.separator) == (
        "<|im_start|>", "user\nQ: ", "<|im_end|>\n<|im_start|>user\nP:")  # fmt: skip
    assert (recipe.yes, recipe.no, recipe.scale, recipe.instructed_query_prefix) == ("Yes", "No", 1.0, "")
    metadata = Job.open(checkpoint).metadata
    assert metadata["rerank.yes_token_id"] == qwen_ids()["Yes"]
    assert metadata["rerank.no_token_id"] == qwen_ids()["No"]


def test_a_chat_model_is_not_served_as_a_reranker(tmp_path: Path) -> None:
    """Any Qwen3 gives a logit for "yes"; a score from it would look like one."""
    with pytest.raises(ConvertError, match="nothing says that it is a reranker"):
        Job.open(renamed(make_qwen3(tmp_path / "tiny"), "Qwen3-0.6B"))


TEMPLATES = {
    "shows neither text": "{% for message in messages %}{% if message.role == 'user' %}x{% endif %}{% endfor %}",
    "is no template": "{% for %}",
    "raises": "{{ raise_exception('no') }}",
    "reaches out of its sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "shows the passage twice": "{{ messages[0].content }}{{ messages[1].content }}{{ messages[1].content }}<|im_end|>",
    "has no end": "<|im_start|>{{ messages[0].content }} {{ messages[1].content }} yes or no?",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_cannot_be_followed_is_refused(template: str, tmp_path: Path) -> None:
    checkpoint = make_qwen3(tmp_path / "tiny")
    (checkpoint / "chat_template.jinja").write_text(TEMPLATES[template])
    with pytest.raises(ConvertError, match="chat template"):
        Job.open(checkpoint)


@pytest.mark.parametrize("modules", [{}, [1], [{"type": "x.LogitScore"}], [{"type": "x.LogitScore", "path": "../x"}]])
def test_modules_json_is_not_trusted(modules: Any, tmp_path: Path) -> None:
    checkpoint = make_qwen3(tmp_path / "tiny")
    write_json(checkpoint / "modules.json", modules)
    with pytest.raises(ConvertError, match=r"modules\.json|nothing says"):
        Job.open(checkpoint)


@pytest.mark.parametrize("token_id", [None, -1, 10**6, 1.5, "yes", True])
def test_a_word_that_is_no_token_is_refused(token_id: Any, tmp_path: Path) -> None:
    checkpoint = make_qwen3(tmp_path / "tiny")
    write_json(checkpoint / "1_LogitScore" / "config.json", {"true_token_id": token_id, "false_token_id": None})
    with pytest.raises(ConvertError, match="no token's id"):
        Job.open(checkpoint)


# -- the tokenizer -----------------------------------------------------------------------------------------------------


def test_what_steers_the_model_is_a_control_token(tmp_path: Path) -> None:
    """A passage that spells <|im_end|> must not end the user's turn; <think> is an ordinary token in the reference."""
    metadata = Job.open(make_qwen3(tmp_path / "tiny")).metadata
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    kinds = dict(zip(tokens, types, strict=True))
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|fim_prefix|>", "<|file_sep|>"):
        assert kinds[token] == CONTROL, token
    assert kinds["<think>"] == kinds["</tool_call>"] == USER_DEFINED
    assert kinds["yes"] == NORMAL
    assert types[-2:] == [CONTROL, CONTROL], "rows of the table that are no tokens"
    assert metadata["tokenizer.ggml.pre"] == "qwen2"
    assert metadata["rerank.normalization"] == "NFC"
    assert metadata["rerank.version"] == 2, "an older server must not ask this model gemma's question"


def test_modernbert_is_framed_by_cls_and_sep(tmp_path: Path) -> None:
    job = Job.open(make_modernbert(tmp_path / "tiny"))
    tokens = job.metadata["tokenizer.ggml.tokens"]
    assert tokens[job.metadata["tokenizer.ggml.cls_token_id"]] == "[CLS]"
    assert tokens[job.metadata["tokenizer.ggml.seperator_token_id"]] == "[SEP]"
    assert job.metadata["tokenizer.ggml.pre"] == "modern-bert"
    kinds = dict(zip(tokens, job.metadata["tokenizer.ggml.token_type"], strict=True))
    assert kinds["[SEP]"] == kinds["[MASK]"] == CONTROL
    assert kinds["  "] == kinds["[unused0]"] == USER_DEFINED


def bpe(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(checkpoint: Path) -> None:
        content = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
        change(content)
        write_json(checkpoint / "tokenizer.json", content)

    return edit


BROKEN_TOKENIZERS = {
    "missing": lambda checkpoint: (checkpoint / "tokenizer.json").unlink(),
    "another expression": bpe(lambda content: content["pre_tokenizer"]["pretokenizers"][0].update(
        pattern={"Regex": r"\p{N}{1,3}"})),
    "digits apart": bpe(lambda content: content["pre_tokenizer"]["pretokenizers"].insert(
        0, {"type": "Digits", "individual_digits": True})),
    "another normaliser": bpe(lambda content: content.update(normalizer={"type": "NFKC"})),
    "a list of normalisers": bpe(lambda content: content.update(normalizer=[{"type": "NFC"}])),
    "no pre-tokenizer": bpe(lambda content: content.update(pre_tokenizer=None)),
    "ignores merges": bpe(lambda content: content["model"].update(ignore_merges=True)),
    "unigram": bpe(lambda content: content["model"].update(type="Unigram")),
    "no merges": bpe(lambda content: content["model"].pop("merges")),
    "a merge that makes no token": bpe(lambda content: content["model"]["merges"].append(["x", "yesyes"])),
    "a merge that makes <|im_end|>": bpe(lambda content: content["model"]["merges"].append(["<|im", "_end|>"])),
    "ids with a hole": bpe(lambda content: content["added_tokens"].pop(0)),
    "ids of no kind": bpe(lambda content: content["model"]["vocab"].update(yes="x")),
    "no such word": bpe(lambda content: content["model"]["vocab"].update(
        {"yess": content["model"]["vocab"].pop("yes")})),
    "an empty token": bpe(lambda content: content["model"]["vocab"].update(
        {"": content["model"]["vocab"].pop("zebra", None) or content["model"]["vocab"].pop("yes")})),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_TOKENIZERS)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(name: str, tmp_path: Path) -> None:
    checkpoint = make_qwen3(tmp_path / "Qwen3-Reranker-tiny")
    BROKEN_TOKENIZERS[name](checkpoint)
    with pytest.raises(ConvertError) as caught:
        Job.open(checkpoint)
    assert "\n" not in str(caught.value)


# -- the weights -------------------------------------------------------------------------------------------------------


def sources(checkpoint: Path) -> dict[str, str]:
    return {tensor.name: tensor.source for tensor in Job.open(checkpoint).tensors}


def test_a_head_of_its_own_is_kept_and_a_tied_one_is_the_table(tmp_path: Path) -> None:
    """Qwen3-Reranker-8B has another head than its embedding table; with the table's, every score is noise."""
    assert sources(make_zerank(tmp_path / "untied"))["output.weight"] == "lm_head.weight"
    tied = make_qwen3(tmp_path / "tied")
    assert "output.weight" not in sources(tied)
    weights = load_file(tied / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": np.zeros_like(table)}, tied / "model.safetensors")
    assert "output.weight" not in sources(tied), "transformers ignores it when the embeddings are tied"
    edit_json(tied / "config.json", tie_word_embeddings=False)
    assert "output.weight" in sources(tied)


def test_qwen2_has_biases_and_qwen3_norms(tmp_path: Path) -> None:
    qwen2, qwen3 = sources(make_qwen2(tmp_path / "2")), sources(make_qwen3(tmp_path / "3"))
    assert qwen2["blk.1.attn_k.bias"] == "model.layers.1.self_attn.k_proj.bias"
    assert qwen3["blk.1.attn_k_norm.weight"] == "model.layers.1.self_attn.k_norm.weight"
    assert "blk.1.attn_k.bias" not in qwen3


CONFIGS = {
    "hidden_act": (make_qwen3, "gelu"),
    "rope_scaling": (make_qwen3, {"type": "yarn", "factor": 4.0}),
    "use_sliding_window": (make_qwen2, True),
    "attention_bias": (make_qwen3, True),
    "rope_parameters": (make_qwen3, {"rope_type": "yarn", "rope_theta": 1e6}),
    "tie_word_embeddings": (make_qwen3, "yes"),
    "norm_bias": (make_modernbert, True),
    "classifier_bias": (make_modernbert, True),
    "classifier_pooling": (make_modernbert, "max"),
    "classifier_activation": (make_modernbert, "silu"),
    "hidden_activation": (make_modernbert, "silu"),
    "layer_types": (make_modernbert, ["sliding_attention", "full_attention"] * 2),
    "id2label": (make_modernbert, {"0": "a", "1": "b"}),
}


@pytest.mark.parametrize("field", CONFIGS)
def test_what_llama_cpp_computes_otherwise_is_refused(field: str, tmp_path: Path) -> None:
    make, value = CONFIGS[field]
    checkpoint = make(tmp_path / "tiny")
    edit_json(checkpoint / "config.json", **{field: value})
    with pytest.raises(ConvertError, match=field):
        Job.open(checkpoint)


def test_modernberts_layers_are_the_same_in_the_old_and_the_new_configuration(tmp_path: Path) -> None:
    """transformers 5 writes layer_types and rope_parameters in place of a period and two thetas."""
    checkpoint = make_modernbert(tmp_path / "tiny", pooling="cls")
    old = Job.open(checkpoint).metadata
    assert old["modern-bert.attention.sliding_window_pattern"] == 3
    assert old["modern-bert.classifier.pooling_type"] == 2, "the first token"
    config = json.loads((checkpoint / "config.json").read_text())
    for field in ("global_attn_every_n_layers", "global_rope_theta", "local_rope_theta"):
        del config[field]
    config["layer_types"] = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    config["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": 160000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    write_json(checkpoint / "config.json", config)
    assert Job.open(checkpoint).metadata == old
