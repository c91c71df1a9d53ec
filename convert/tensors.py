"""Which tensor of the checkpoint becomes which of llama.cpp's, and what is edited on the way.

Strict: a tensor that is missing, that nothing maps, or whose shape contradicts config.json is an error that names it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from .checkpoint import READABLE, Checkpoint, Config, FloatArray
from .errors import CannotStartError, ConvertError
from .models import ARCHITECTURES, Architecture

MAX_LAYERS = 512  # llama.cpp's LLAMA_MAX_LAYERS
# Exact or tanh-approximated GELU: llama.cpp has one kernel for both; the two differ by 1e-3 at most.
GELU = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_python")


@dataclass(frozen=True)
class Tensor:
    """One tensor of the output. shape: rows first, after the edits."""

    name: str
    source: str
    shape: tuple[int, ...]
    half: bool = False  # float16 in an F16 file; the rest stays float32, as llama.cpp's own files have it
    first_row: int = 0  # rows before it are dropped
    add: float = 0.0

    def edit(self, block: FloatArray) -> FloatArray:
        return block + np.float32(self.add) if self.add else block


@dataclass(frozen=True)
class Mapping:
    """expected: what the output needs. ignored: patterns of checkpoint tensors that inference does not use."""

    expected: list[Tensor]
    ignored: tuple[str, ...] = ()


def find_architecture(checkpoint: Checkpoint) -> Architecture:
    """Raises CannotStartError naming the architecture and what is supported."""
    name = checkpoint.config.architecture
    if name not in ARCHITECTURES:
        raise CannotStartError(
            f"{checkpoint.config.path}: architecture {name} is not supported, only {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def plan(checkpoint: Checkpoint, architecture: Architecture) -> list[Tensor]:
    """The output's tensors, in the order in which they are written. Raises ConvertError naming a tensor or field."""
    names = _modern_names(checkpoint)
    mapping = _MAPPINGS[architecture.name](checkpoint.config, names)
    found = [_match(checkpoint, names, tensor) for tensor in mapping.expected]
    used = {tensor.source for tensor in found}
    for name, stored in names.items():
        if stored not in used and not any(re.fullmatch(pattern, name) for pattern in mapping.ignored):
            raise ConvertError(f"{checkpoint.tensors[stored].file}: tensor {stored} is not part of {architecture.name}")
    if architecture.gguf == "gemma":
        _check_tied(checkpoint, names)
    return found


def _modern_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Today's name -> the stored one. BERT's first checkpoints call LayerNorm's weight and bias gamma and beta."""
    names: dict[str, str] = {}
    for stored in checkpoint.tensors:
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", stored))
        if name in names:
            raise ConvertError(f"{checkpoint.directory}: tensors {names[name]} and {stored} are the same one")
        names[name] = stored
    return names


def _missing(checkpoint: Checkpoint, names: dict[str, str], wanted: str) -> ConvertError:
    """Names what may be meant: a key with a prefix, or the head that an embedding model does not have."""
    path, found = checkpoint.directory, next((name for name in names if name.endswith(f".{wanted}")), None)
    if found:
        prefix = found.removesuffix(wanted)
        return ConvertError(f"{path}: tensor {wanted} is missing, but {names[found]} is there: take {prefix!r} off the "
                            "keys, or save the inner model again (save_pretrained)")  # fmt: skip
    if wanted.startswith("classifier") and not any(name.startswith("classifier") for name in names):
        return ConvertError(f"{path}: tensor {wanted} is missing: it has no classification head, so it is no reranker "
                            "(an embedding model, or the encoder of one)")  # fmt: skip
    near = difflib.get_close_matches(wanted, names, 1)
    return ConvertError(f"{path}: tensor {wanted} is missing{f' (nearest: {names[near[0]]})' if near else ''}")


def _match(checkpoint: Checkpoint, names: dict[str, str], tensor: Tensor) -> Tensor:
    stored = names.get(tensor.source)
    if stored is None:
        raise _missing(checkpoint, names, tensor.source)
    info = checkpoint.tensors[stored]
    expected = (tensor.shape[0] + tensor.first_row, *tensor.shape[1:])
    if info.shape != expected:
        raise ConvertError(
            f"{info.file}: tensor {stored} has shape {list(info.shape)}, but config.json asks for {list(expected)}"
        )
    if info.dtype not in READABLE:
        raise ConvertError(f"{info.file}: tensor {stored} is {info.dtype}, expected one of {', '.join(READABLE)}")
    return Tensor(tensor.name, stored, tensor.shape, tensor.half, tensor.first_row, tensor.add)


# -- BERT and XLM-RoBERTa -------------------------------------------------------------------------------------------

_LAYER = {  # llama.cpp's name -> the checkpoint's, under encoder.layer.N.
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "layer_output_norm": "output.LayerNorm",
}


def _map_xlm_roberta(config: Config, names: dict[str, str]) -> Mapping:
    offset = position_offset(config)
    expected = [*_encoder(config, "roberta.", offset)]
    expected += _head(config, "classifier.dense", "classifier.out_proj")
    return Mapping(expected, (r"roberta\.embeddings\.position_ids",))


def _map_bert_classifier(config: Config, names: dict[str, str]) -> Mapping:
    expected = [*_encoder(config, "bert.", 0)]
    expected += _head(config, "bert.pooler.dense", "classifier")
    return Mapping(expected, (r"bert\.embeddings\.position_ids",))


def _map_bert(config: Config, names: dict[str, str]) -> Mapping:
    """Mean pooling uses the last layer alone, so BertModel's pooler is left out."""
    prefix = "bert." if any(name.startswith("bert.") for name in names) else ""
    ignored = (r"(bert\.)?embeddings\.position_ids", r"(bert\.)?pooler\.dense\.(weight|bias)")
    return Mapping([*_encoder(config, prefix, 0)], ignored)


def position_offset(config: Config) -> int:
    """XLM-R numbers positions from pad_token_id + 1 (fairseq), llama.cpp from 0: the rows before that are cut off."""
    return config.integer("pad_token_id", 1, low=0) + 1


def _encoder(config: Config, prefix: str, offset: int) -> Iterator[Tensor]:
    _check_encoder(config)
    hidden, inner = config.integer("hidden_size"), config.integer("intermediate_size")
    embeddings = f"{prefix}embeddings."
    positions = config.integer("max_position_embeddings") - offset
    if positions < 1:
        raise ConvertError(f"{config.path}: max_position_embeddings leaves no position after pad_token_id")
    types = config.integer("type_vocab_size", 2)
    vocabulary = (config.integer("vocab_size"), hidden)
    yield Tensor("token_embd.weight", f"{embeddings}word_embeddings.weight", vocabulary, half=True)
    yield Tensor("token_types.weight", f"{embeddings}token_type_embeddings.weight", (types, hidden))
    yield Tensor(
        "position_embd.weight", f"{embeddings}position_embeddings.weight", (positions, hidden), first_row=offset
    )
    yield from _with_bias("token_embd_norm", f"{embeddings}LayerNorm", (hidden,))
    shapes = {"ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
    for layer in range(config.integer("num_hidden_layers", high=MAX_LAYERS)):
        for name, source in _LAYER.items():
            shape = (hidden,) if name.endswith("norm") else shapes.get(name, (hidden, hidden))
            yield from _with_bias(f"blk.{layer}.{name}", f"{prefix}encoder.layer.{layer}.{source}", shape)


def _check_encoder(config: Config) -> None:
    config.expect("hidden_act", *GELU)
    config.expect("position_embedding_type", "absolute")
    config.expect("is_decoder", False)
    config.expect("add_cross_attention", False)
    _check_heads(config)


def _check_heads(config: Config) -> None:
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if "head_dim" not in config.values and hidden % heads:
        raise ConvertError(f"{config.path}: hidden_size {hidden} is no multiple of num_attention_heads {heads}")


def _head(config: Config, dense: str, output: str) -> Iterator[Tensor]:
    """One label: a relevance logit. llama.cpp's RANK pooling is cls (dense, tanh), then cls.output."""
    _check_one_label(config)
    hidden = config.integer("hidden_size")
    yield from _with_bias("cls", dense, (hidden, hidden))
    for tensor in _with_bias("cls.output", output, (1, hidden)):
        yield Tensor(tensor.name, tensor.source, tensor.shape)  # a single row: float32 costs nothing


def _check_one_label(config: Config) -> None:
    labels = config.values.get("id2label", {"0": ""})
    if not isinstance(labels, dict):
        raise ConvertError(f"{config.path}: id2label is {labels!r:.60}, expected an object of one label")
    if len(labels) != 1:
        raise ConvertError(f"{config.path}: id2label has {len(labels)} labels; a reranker has one, its relevance logit")
    if config.values.get("num_labels", 1) != 1:
        raise ConvertError(f"{config.path}: num_labels is {config.values['num_labels']!r:.60}, but id2label has one")


def _with_bias(name: str, source: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", f"{source}.weight", shape, half=len(shape) > 1)
    yield Tensor(f"{name}.bias", f"{source}.bias", shape[:1])


# -- Gemma ----------------------------------------------------------------------------------------------------------


def _map_gemma(config: Config, names: dict[str, str]) -> Mapping:
    expected = [*_decoder(config)]
    return Mapping(expected, (r"lm_head\.weight", r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"))


def _decoder(config: Config) -> Iterator[Tensor]:
    _check_decoder(config)
    hidden, matrices = config.integer("hidden_size"), _decoder_matrices(config)
    yield Tensor("token_embd.weight", "model.embed_tokens.weight", (config.integer("vocab_size"), hidden), half=True)
    for layer in range(config.integer("num_hidden_layers", high=MAX_LAYERS)):
        source = f"model.layers.{layer}"
        yield _gemma_norm(f"blk.{layer}.attn_norm", f"{source}.input_layernorm", hidden)
        yield _gemma_norm(f"blk.{layer}.ffn_norm", f"{source}.post_attention_layernorm", hidden)
        for name, (module, shape) in matrices.items():
            yield Tensor(f"blk.{layer}.{name}.weight", f"{source}.{module}.weight", shape, half=True)
    yield _gemma_norm("output_norm", "model.norm", hidden)


def _decoder_matrices(config: Config) -> dict[str, tuple[str, tuple[int, int]]]:
    """llama.cpp's name -> (the checkpoint's under model.layers.N., shape)."""
    hidden, inner = config.integer("hidden_size"), config.integer("intermediate_size")
    heads = config.integer("num_attention_heads")
    queries = heads * head_dimension(config)
    keys = config.integer("num_key_value_heads", heads) * head_dimension(config)
    return {
        "attn_q": ("self_attn.q_proj", (queries, hidden)),
        "attn_k": ("self_attn.k_proj", (keys, hidden)),
        "attn_v": ("self_attn.v_proj", (keys, hidden)),
        "attn_output": ("self_attn.o_proj", (hidden, queries)),
        "ffn_gate": ("mlp.gate_proj", (inner, hidden)),
        "ffn_up": ("mlp.up_proj", (inner, hidden)),
        "ffn_down": ("mlp.down_proj", (hidden, inner)),
    }


def _gemma_norm(name: str, source: str, hidden: int) -> Tensor:
    """Stored as w and applied as 1 + w (transformers, GemmaRMSNorm); llama.cpp multiplies by what it is given."""
    return Tensor(f"{name}.weight", f"{source}.weight", (hidden,), add=1.0)


def _check_decoder(config: Config) -> None:
    config.expect("hidden_act", "gelu_pytorch_tanh", *GELU)
    config.expect("hidden_activation", None, *GELU)
    config.expect("attention_bias", False)
    config.expect("rope_scaling", None)
    _check_heads(config)


def head_dimension(config: Config) -> int:
    return config.integer("head_dim", config.integer("hidden_size") // config.integer("num_attention_heads"))


def _check_tied(checkpoint: Checkpoint, names: dict[str, str]) -> None:
    """llama.cpp's gemma multiplies by the embedding table; an lm_head that is another matrix cannot be expressed."""
    head = names.get("lm_head.weight")
    if head is None:
        return
    table = names["model.embed_tokens.weight"]
    if checkpoint.tensors[head].shape != checkpoint.tensors[table].shape or any(
        not np.array_equal(left, right)
        for left, right in zip(checkpoint.blocks(head), checkpoint.blocks(table), strict=True)
    ):
        raise ConvertError(f"{checkpoint.tensors[head].file}: tensor {head} is not tied to {table}: not a Gemma 1")


# -- Qwen2 and Qwen3 ------------------------------------------------------------------------------------------------


def _map_qwen2(config: Config, names: dict[str, str]) -> Mapping:
    """Its attention has biases for queries, keys and values."""
    config.expect("attention_bias", True)
    heads = config.integer("num_attention_heads")
    if head_dimension(config) * heads != config.integer("hidden_size"):
        raise ConvertError(f"{config.path}: head_dim is not hidden_size / num_attention_heads, which Qwen2 is made of")
    expected = [*_qwen(config)]
    for layer in range(config.integer("num_hidden_layers")):
        for name in ("attn_q", "attn_k", "attn_v"):
            module, (n_out, _) = _decoder_matrices(config)[name]
            expected.append(Tensor(f"blk.{layer}.{name}.bias", f"model.layers.{layer}.{module}.bias", (n_out,)))
    return Mapping(expected, _ignored_of_qwen(config))


def _map_qwen3(config: Config, names: dict[str, str]) -> Mapping:
    """Its queries and keys are normalised, each head by itself."""
    config.expect("attention_bias", False)
    expected = [*_qwen(config)]
    for layer in range(config.integer("num_hidden_layers")):
        for letter in "qk":
            source = f"model.layers.{layer}.self_attn.{letter}_norm.weight"
            expected.append(Tensor(f"blk.{layer}.attn_{letter}_norm.weight", source, (head_dimension(config),)))
    return Mapping(expected, _ignored_of_qwen(config))


def _qwen(config: Config) -> Iterator[Tensor]:
    config.expect("hidden_act", "silu")
    config.expect("rope_scaling", None)
    config.expect("use_sliding_window", False)
    _check_heads(config)
    hidden, matrices = config.integer("hidden_size"), _decoder_matrices(config)
    vocabulary = (config.integer("vocab_size"), hidden)
    yield Tensor("token_embd.weight", "model.embed_tokens.weight", vocabulary, half=True)
    if not is_tied(config):
        yield Tensor("output.weight", "lm_head.weight", vocabulary, half=True)
    for layer in range(config.integer("num_hidden_layers", high=MAX_LAYERS)):
        source = f"model.layers.{layer}"
        yield Tensor(f"blk.{layer}.attn_norm.weight", f"{source}.input_layernorm.weight", (hidden,))
        yield Tensor(f"blk.{layer}.ffn_norm.weight", f"{source}.post_attention_layernorm.weight", (hidden,))
        for name, (module, shape) in matrices.items():
            yield Tensor(f"blk.{layer}.{name}.weight", f"{source}.{module}.weight", shape, half=True)
    yield Tensor("output_norm.weight", "model.norm.weight", (hidden,))


def is_tied(config: Config) -> bool:
    """Whether the head is the embedding table; transformers then ignores an lm_head that the file holds."""
    config.expect("tie_word_embeddings", False, True)
    return config.values.get("tie_word_embeddings") is True


def _ignored_of_qwen(config: Config) -> tuple[str, ...]:
    rotary = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    return (rotary, r"lm_head\.weight") if is_tied(config) else (rotary,)


# -- ModernBERT -----------------------------------------------------------------------------------------------------


def _map_modern_bert(config: Config, names: dict[str, str]) -> Mapping:
    """llama.cpp's graph has no biases but the classifier's, and GELU in its layers and its head (build_pooling)."""
    for name in ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"):
        config.expect(name, False)
    for name in ("hidden_activation", "classifier_activation"):
        config.expect(name, *GELU)
    _check_heads(config)
    _check_one_label(config)
    hidden, inner = config.integer("hidden_size"), config.integer("intermediate_size")
    matrices = {
        "attn_qkv": ("attn.Wqkv", (3 * hidden, hidden)),
        "attn_output": ("attn.Wo", (hidden, hidden)),
        "ffn_up": ("mlp.Wi", (2 * inner, hidden)),  # both halves of GeGLU, in llama.cpp's order
        "ffn_down": ("mlp.Wo", (hidden, inner)),
    }
    table = (config.integer("vocab_size"), hidden)
    expected = [Tensor("token_embd.weight", "model.embeddings.tok_embeddings.weight", table, half=True)]
    expected.append(Tensor("token_embd_norm.weight", "model.embeddings.norm.weight", (hidden,)))
    for layer in range(config.integer("num_hidden_layers", high=MAX_LAYERS)):
        source = f"model.layers.{layer}"
        if layer:  # the first layer's is the identity: the embeddings are normalised already
            expected.append(Tensor(f"blk.{layer}.attn_norm.weight", f"{source}.attn_norm.weight", (hidden,)))
        expected.append(Tensor(f"blk.{layer}.ffn_norm.weight", f"{source}.mlp_norm.weight", (hidden,)))
        for name, (module, shape) in matrices.items():
            expected.append(Tensor(f"blk.{layer}.{name}.weight", f"{source}.{module}.weight", shape, half=True))
    expected.append(Tensor("output_norm.weight", "model.final_norm.weight", (hidden,)))
    expected.append(Tensor("cls.weight", "head.dense.weight", (hidden, hidden), half=True))
    expected.append(Tensor("cls.norm.weight", "head.norm.weight", (hidden,)))
    expected.append(Tensor("cls.output.weight", "classifier.weight", (1, hidden)))
    expected.append(Tensor("cls.output.bias", "classifier.bias", (1,)))
    return Mapping(expected)


_MAPPINGS: dict[str, Callable[[Config, dict[str, str]], Mapping]] = {
    "XLMRobertaForSequenceClassification": _map_xlm_roberta,
    "BertForSequenceClassification": _map_bert_classifier,
    "GemmaForCausalLM": _map_gemma,
    "Qwen2ForCausalLM": _map_qwen2,
    "Qwen3ForCausalLM": _map_qwen3,
    "ModernBertForSequenceClassification": _map_modern_bert,
    "BertModel": _map_bert,
}

