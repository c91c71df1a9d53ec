"""Tiny Hugging Face checkpoints made on the spot: the tests' models, complete and with the real ones' layout.

Every weight comes from a seeded numpy RandomState, whose stream numpy has frozen, so the golden logits that were
computed once from these checkpoints hold on any machine. The random gains are chosen so that the logits of different
passages differ by more than 1 and stay within about +-6: differences between implementations then show, in the score
as well as in the logit. tests/golden/make_golden.py reports the spread.
"""
from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

Array = npt.NDArray[Any]
Tensors = dict[str, Array]

TOKENIZERS = Path(__file__).resolve().parent / "golden" / "tokenizers"


class Weights:
    """Draws tensors from one seeded stream; the order of the calls is part of the checkpoint's definition."""

    def __init__(self, seed: int, dtype: str = "float32") -> None:
        self._random = np.random.RandomState(seed)
        self._dtype = np.dtype(dtype)
        self.tensors: Tensors = {}

    def normal(self, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> None:
        self.tensors[name] = (mean + std * self._random.standard_normal(shape)).astype(self._dtype)

    def dense(self, name: str, n_out: int, n_in: int, gain: float = 1.0, bias: bool = True) -> None:
        """A linear layer whose outputs have about `gain` times the spread of its inputs."""
        self.normal(f"{name}.weight", (n_out, n_in), gain / np.sqrt(n_in))
        if bias:
            self.normal(f"{name}.bias", (n_out,), 0.1)

    def layer_norm(self, name: str, n: int) -> None:
        self.normal(f"{name}.weight", (n,), 0.1, mean=1.0)
        self.normal(f"{name}.bias", (n,), 0.1)


def make_xlmr(directory: Path, *, hidden_size: int = 256, layers: int = 2, max_tokens: int = 8192,
              tokenizer_dir: Path | None = None, dtype: str = "float32") -> Path:
    """Writes an XLMRobertaForSequenceClassification (one label), as bge-reranker-v2-m3 is, and returns `directory`.

    hidden_size: a multiple of 64; 256 so that K-quants fit. tokenizer_dir: a directory with another
    sentencepiece.bpe.model, the real XLM-R one for example. Positions start at pad_token_id + 1, hence 2 more rows.
    """
    source = (tokenizer_dir or TOKENIZERS / "xlmr") / "sentencepiece.bpe.model"
    vocab_size = sentencepiece_size(source) + 2  # fairseq's <pad> and <mask>, which the model file does not have
    config = {
        "architectures": ["XLMRobertaForSequenceClassification"], "model_type": "xlm-roberta",
        "vocab_size": vocab_size, "hidden_size": hidden_size, "num_hidden_layers": layers,
        "num_attention_heads": hidden_size // 64, "intermediate_size": 2 * hidden_size,
        "max_position_embeddings": max_tokens + 2, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "hidden_act": "gelu",
        "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "position_embedding_type": "absolute",
        "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "torch_dtype": dtype,
        "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "classifier_dropout": None,
    }
    weights = Weights(seed=20, dtype=dtype)
    bert_body(weights, "roberta.", config)
    weights.dense("classifier.dense", hidden_size, hidden_size)
    weights.dense("classifier.out_proj", 1, hidden_size, gain=3.0)
    write_checkpoint(directory, config, weights.tensors)
    shutil.copyfile(source, directory / source.name)
    write_json(directory / "tokenizer_config.json", {
        "tokenizer_class": "XLMRobertaTokenizer", "model_max_length": max_tokens,
        "added_tokens_decoder": added_tokens({0: "<s>", 1: "<pad>", 2: "</s>", 3: "<unk>", vocab_size - 1: "<mask>"}),
        "bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>",
        "unk_token": "<unk>", "mask_token": "<mask>"})
    write_json(directory / "special_tokens_map.json", {
        "bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>",
        "unk_token": "<unk>", "mask_token": "<mask>"})
    return directory


def make_bert(directory: Path, *, hidden_size: int = 128, layers: int = 3, dtype: str = "float32") -> Path:
    """Writes a BertForSequenceClassification (pooler, one label, two token types), as MiniLM cross-encoders are."""
    config = bert_config("BertForSequenceClassification", hidden_size, layers, dtype)
    config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    weights = Weights(seed=21, dtype=dtype)
    bert_body(weights, "bert.", config)
    weights.dense("bert.pooler.dense", hidden_size, hidden_size)
    weights.dense("classifier", 1, hidden_size, gain=3.0)
    write_checkpoint(directory, config, weights.tensors)
    write_bert_tokenizer(directory)
    return directory


def make_bi(directory: Path, *, hidden_size: int = 64, layers: int = 2, max_seq_length: int = 128) -> Path:
    """Writes a BertModel in the sentence-transformers layout (mean pooling), as all-MiniLM-L6-v2 is."""
    config = bert_config("BertModel", hidden_size, layers, "float32")
    weights = Weights(seed=22)
    bert_body(weights, "", config)
    weights.dense("pooler.dense", hidden_size, hidden_size)  # in the real file too, and not used by mean pooling
    weights.tensors["embeddings.position_ids"] = np.arange(512, dtype=np.int64)[None, :]  # likewise
    write_checkpoint(directory, config, weights.tensors)
    write_bert_tokenizer(directory)
    write_json(directory / "sentence_bert_config.json", {"max_seq_length": max_seq_length, "do_lower_case": False})
    write_json(directory / "modules.json", [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}])
    (directory / "1_Pooling").mkdir(exist_ok=True)
    write_json(directory / "1_Pooling" / "config.json", {
        "word_embedding_dimension": hidden_size, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False})
    return directory


def make_gemma(directory: Path, shards: int = 1, *, hidden_size: int = 256, layers: int = 2,
               dtype: str = "float32") -> Path:
    """Writes a GemmaForCausalLM (Gemma 1, tied embeddings), as bge-reranker-v2-gemma is, in `shards` files."""
    source = TOKENIZERS / "gemma" / "tokenizer.model"
    config = {
        "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "vocab_size": sentencepiece_size(source),
        "hidden_size": hidden_size, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 1,
        "head_dim": 64, "intermediate_size": 2 * hidden_size, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "rope_scaling": None, "hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": True,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "torch_dtype": dtype,
    }
    weights = Weights(seed=23, dtype=dtype)
    gemma_body(weights, config)
    write_checkpoint(directory, config, weights.tensors, shards)
    shutil.copyfile(source, directory / source.name)
    specials = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 106: "<start_of_turn>", 107: "<end_of_turn>"}
    write_json(directory / "tokenizer_config.json", {
        "tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False,
        "added_tokens_decoder": added_tokens(specials), "additional_special_tokens": [specials[106], specials[107]],
        "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"})
    write_json(directory / "special_tokens_map.json", {
        "additional_special_tokens": [specials[106], specials[107]],
        "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"})
    return directory


def make_qwen3(directory: Path, *, hidden_size: int = 256, layers: int = 2, dtype: str = "float32") -> Path:
    """Writes a Qwen3ForCausalLM (tied embeddings) in the sentence-transformers layout, as Qwen3-Reranker-0.6B is."""
    config = qwen_config("Qwen3ForCausalLM", hidden_size, layers, dtype) | {"head_dim": 64, "attention_bias": False}
    write_checkpoint(directory, config, qwen_weights(24, config).tensors)
    write_qwen_tokenizer(directory)
    write_logit_score(directory, "yes", "no")
    (directory / "chat_template.jinja").write_text(QWEN3_RERANKER_TEMPLATE, encoding="utf-8")
    return directory


def make_zerank(directory: Path, *, hidden_size: int = 256, layers: int = 2, dtype: str = "float32") -> Path:
    """Writes a Qwen3ForCausalLM with a head of its own, as a zerank-1 from before sentence-transformers 5.4 is: its
    recipe is known by the directory's name, which becomes zerank-1-small beside `directory`'s."""
    directory = directory.with_name(f"{directory.name}-zerank-1-small")
    config = qwen_config("Qwen3ForCausalLM", hidden_size, layers, dtype) | {
        "head_dim": 64, "attention_bias": False, "tie_word_embeddings": False}
    write_checkpoint(directory, config, qwen_weights(25, config, head_std=1.0).tensors)
    write_qwen_tokenizer(directory)
    return directory


def make_qwen2(directory: Path, *, hidden_size: int = 256, layers: int = 2, dtype: str = "float32") -> Path:
    """Writes a Qwen2ForCausalLM (tied, biases at queries, keys and values), as mxbai-rerank-base-v2 is."""
    config = qwen_config("Qwen2ForCausalLM", hidden_size, layers, dtype)
    write_checkpoint(directory, config, qwen_weights(26, config).tensors)
    write_qwen_tokenizer(directory)
    write_logit_score(directory, "1", "0")
    return directory


def make_modernbert(directory: Path, *, hidden_size: int = 256, layers: int = 4, pooling: str = "mean",
                    dtype: str = "float32") -> Path:
    """Writes a ModernBertForSequenceClassification (one label), as gte-reranker-modernbert-base is.

    The window is 32 tokens, so that the local layers see only a part of the tests' pairs.
    """
    tokenizer = json.loads((TOKENIZERS / "modernbert" / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    config = {
        "architectures": ["ModernBertForSequenceClassification"], "model_type": "modernbert",
        "vocab_size": max(ids.values()) + 3, "hidden_size": hidden_size, "num_hidden_layers": layers,
        "num_attention_heads": hidden_size // 64, "intermediate_size": 2 * hidden_size,
        "max_position_embeddings": 8192, "norm_eps": 1e-5, "hidden_activation": "gelu", "attention_bias": False,
        "mlp_bias": False, "norm_bias": False, "classifier_bias": False, "classifier_activation": "gelu",
        "classifier_pooling": pooling, "global_attn_every_n_layers": 3, "local_attention": 32,
        "global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "bos_token_id": ids["[CLS]"],
        "cls_token_id": ids["[CLS]"], "eos_token_id": ids["[SEP]"], "sep_token_id": ids["[SEP]"],
        "pad_token_id": ids["[PAD]"], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "torch_dtype": dtype,
        "attention_dropout": 0.0, "embedding_dropout": 0.0, "mlp_dropout": 0.0, "classifier_dropout": 0.0,
        "reference_compile": False,
    }
    weights = Weights(seed=27, dtype=dtype)
    modernbert_body(weights, config)
    write_checkpoint(directory, config, weights.tensors)
    shutil.copyfile(TOKENIZERS / "modernbert" / "tokenizer.json", directory / "tokenizer.json")
    write_json(directory / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192, "cls_token": "[CLS]",
        "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"})
    return directory


# As sentence-transformers 5.4 has it in Qwen/Qwen3-Reranker-0.6B; Jinja drops the last of the line breaks.
QWEN3_RERANKER_TEMPLATE = """\
{%- set instruction = messages | selectattr("role", "eq", "system") | map(attribute="content") | first \
| default("Given a web search query, retrieve relevant passages that answer the query") -%}
{%- set query_text = messages | selectattr("role", "eq", "query") | map(attribute="content") | first -%}
{%- set document_text = messages | selectattr("role", "eq", "document") | map(attribute="content") | first -%}
<|im_start|>system
Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that the answer \
can only be "yes" or "no".<|im_end|>
<|im_start|>user
<Instruct>: {{ instruction }}
<Query>: {{ query_text }}
<Document>: {{ document_text }}<|im_end|>
<|im_start|>assistant
<think>

</think>


"""


def qwen_config(architecture: str, hidden_size: int, layers: int, dtype: str) -> dict[str, Any]:
    ids = qwen_ids()
    return {
        "architectures": [architecture], "model_type": architecture.removesuffix("ForCausalLM").lower(),
        "vocab_size": len(ids) + 2, "hidden_size": hidden_size, "num_hidden_layers": layers,
        "num_attention_heads": hidden_size // 64, "num_key_value_heads": 2, "intermediate_size": 2 * hidden_size,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_scaling": None,
        "hidden_act": "silu", "use_sliding_window": False, "sliding_window": None, "attention_dropout": 0.0,
        "tie_word_embeddings": True, "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        "torch_dtype": dtype,
    }


def qwen_ids() -> dict[str, int]:
    content = json.loads((TOKENIZERS / "qwen" / "tokenizer.json").read_text(encoding="utf-8"))
    return {**content["model"]["vocab"], **{token["content"]: token["id"] for token in content["added_tokens"]}}


def qwen_weights(seed: int, config: dict[str, Any], head_std: float = 0.0) -> Weights:
    """A Qwen3's, or a Qwen2's, whose attention has biases and no norms. head_std: of a head that is not tied."""
    weights, is_qwen2 = Weights(seed, config["torch_dtype"]), config["model_type"] == "qwen2"
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    n_query, n_kv = hidden, 64 * config["num_key_value_heads"]
    weights.normal("model.embed_tokens.weight", (config["vocab_size"], hidden), 0.1)
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        weights.normal(f"{layer}.input_layernorm.weight", (hidden,), 0.1, mean=1.0)
        weights.dense(f"{layer}.self_attn.q_proj", n_query, hidden, gain=1.5, bias=is_qwen2)
        weights.dense(f"{layer}.self_attn.k_proj", n_kv, hidden, gain=1.5, bias=is_qwen2)
        weights.dense(f"{layer}.self_attn.v_proj", n_kv, hidden, gain=3.0, bias=is_qwen2)
        weights.dense(f"{layer}.self_attn.o_proj", hidden, n_query, gain=3.0, bias=False)
        if not is_qwen2:
            weights.normal(f"{layer}.self_attn.q_norm.weight", (64,), 0.2, mean=1.2)
            weights.normal(f"{layer}.self_attn.k_norm.weight", (64,), 0.2, mean=1.2)
        weights.normal(f"{layer}.post_attention_layernorm.weight", (hidden,), 0.1, mean=1.0)
        weights.dense(f"{layer}.mlp.gate_proj", wide, hidden, bias=False)
        weights.dense(f"{layer}.mlp.up_proj", wide, hidden, bias=False)
        weights.dense(f"{layer}.mlp.down_proj", hidden, wide, gain=2.0, bias=False)
    weights.normal("model.norm.weight", (hidden,), 0.1, mean=1.0)
    if head_std:
        weights.normal("lm_head.weight", (config["vocab_size"], hidden), head_std)
    return weights


def modernbert_body(weights: Weights, config: dict[str, Any]) -> None:
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    weights.normal("model.embeddings.tok_embeddings.weight", (config["vocab_size"], hidden), 0.5)
    weights.normal("model.embeddings.norm.weight", (hidden,), 0.1, mean=1.0)
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        if n:
            weights.normal(f"{layer}.attn_norm.weight", (hidden,), 0.1, mean=1.0)
        weights.dense(f"{layer}.attn.Wqkv", 3 * hidden, hidden, gain=1.7, bias=False)
        weights.dense(f"{layer}.attn.Wo", hidden, hidden, gain=2.0, bias=False)
        weights.normal(f"{layer}.mlp_norm.weight", (hidden,), 0.1, mean=1.0)
        weights.dense(f"{layer}.mlp.Wi", 2 * wide, hidden, bias=False)
        weights.dense(f"{layer}.mlp.Wo", hidden, wide, gain=2.0, bias=False)
    weights.normal("model.final_norm.weight", (hidden,), 0.1, mean=1.0)
    weights.dense("head.dense", hidden, hidden, gain=2.0, bias=False)
    weights.normal("head.norm.weight", (hidden,), 0.1, mean=1.0)
    weights.dense("classifier", 1, hidden, gain=2.0)


def write_qwen_tokenizer(directory: Path) -> None:
    shutil.copyfile(TOKENIZERS / "qwen" / "tokenizer.json", directory / "tokenizer.json")
    write_json(directory / "tokenizer_config.json", {
        "tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "bos_token": None, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "unk_token": None, "model_max_length": 131072})


def write_logit_score(directory: Path, yes: str, no: str | None) -> None:
    """The files in which sentence-transformers 5.4 records which words are the answer."""
    modules = "sentence_transformers.base.modules.transformer.Transformer"
    score = "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"
    write_json(directory / "modules.json", [
        {"idx": 0, "name": "0", "path": "", "type": modules},
        {"idx": 1, "name": "1", "path": "1_LogitScore", "type": score}])
    (directory / "1_LogitScore").mkdir(exist_ok=True)
    ids = qwen_ids()
    write_json(directory / "1_LogitScore" / "config.json", {
        "true_token_id": ids[yes], "false_token_id": None if no is None else ids[no]})


def bert_config(architecture: str, hidden_size: int, layers: int, dtype: str) -> dict[str, Any]:
    return {
        "architectures": [architecture], "model_type": "bert", "vocab_size": len(bert_vocabulary()),
        "hidden_size": hidden_size, "num_hidden_layers": layers, "num_attention_heads": hidden_size // 32,
        "intermediate_size": 2 * hidden_size, "max_position_embeddings": 512, "type_vocab_size": 2,
        "layer_norm_eps": 1e-12, "hidden_act": "gelu", "pad_token_id": 0, "position_embedding_type": "absolute",
        "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "classifier_dropout": None,
        "torch_dtype": dtype,
    }


def bert_body(weights: Weights, prefix: str, config: dict[str, Any]) -> None:
    """Embeddings and encoder layers of a BERT or an XLM-R, which have the same names after `prefix`."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    tables = {"word": "vocab_size", "position": "max_position_embeddings", "token_type": "type_vocab_size"}
    for table, rows in tables.items():
        weights.normal(f"{prefix}embeddings.{table}_embeddings.weight", (config[rows], hidden), 0.5)
    weights.layer_norm(f"{prefix}embeddings.LayerNorm", hidden)
    for n in range(config["num_hidden_layers"]):
        layer = f"{prefix}encoder.layer.{n}"
        weights.dense(f"{layer}.attention.self.query", hidden, hidden, gain=1.5)  # attention that prefers some tokens
        weights.dense(f"{layer}.attention.self.key", hidden, hidden, gain=1.5)
        weights.dense(f"{layer}.attention.self.value", hidden, hidden, gain=2.0)
        weights.dense(f"{layer}.attention.output.dense", hidden, hidden)
        weights.layer_norm(f"{layer}.attention.output.LayerNorm", hidden)
        weights.dense(f"{layer}.intermediate.dense", wide, hidden)
        weights.dense(f"{layer}.output.dense", hidden, wide)
        weights.layer_norm(f"{layer}.output.LayerNorm", hidden)


def gemma_body(weights: Weights, config: dict[str, Any]) -> None:
    hidden, wide, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    n_query, n_kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    weights.normal("model.embed_tokens.weight", (config["vocab_size"], hidden), 0.1)
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        weights.normal(f"{layer}.input_layernorm.weight", (hidden,), 0.1)  # stored as w, applied as 1 + w
        weights.dense(f"{layer}.self_attn.q_proj", n_query, hidden, gain=1.5, bias=False)
        weights.dense(f"{layer}.self_attn.k_proj", n_kv, hidden, gain=1.5, bias=False)
        weights.dense(f"{layer}.self_attn.v_proj", n_kv, hidden, gain=3.0, bias=False)
        weights.dense(f"{layer}.self_attn.o_proj", hidden, n_query, gain=3.0, bias=False)
        weights.normal(f"{layer}.post_attention_layernorm.weight", (hidden,), 0.1)
        weights.dense(f"{layer}.mlp.gate_proj", wide, hidden, bias=False)
        weights.dense(f"{layer}.mlp.up_proj", wide, hidden, bias=False)
        weights.dense(f"{layer}.mlp.down_proj", hidden, wide, gain=2.0, bias=False)
    weights.normal("model.norm.weight", (hidden,), 0.1)


def sentencepiece_size(model: Path) -> int:
    """Number of pieces in a sentencepiece model file: counts the repeated field 1 of its protobuf message."""
    data, position, pieces = model.read_bytes(), 0, 0
    while position < len(data):
        tag, position = read_varint(data, position)
        if tag & 7 != 2:  # ModelProto has only length-delimited fields
            raise ValueError(f"{model} is not a sentencepiece model: wire type {tag & 7} at byte {position}")
        length, position = read_varint(data, position)
        position += length
        pieces += tag >> 3 == 1
    return pieces


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def bert_vocabulary() -> list[str]:
    return (TOKENIZERS / "bert" / "vocab.txt").read_text(encoding="utf-8").splitlines()


def write_bert_tokenizer(directory: Path) -> None:
    shutil.copyfile(TOKENIZERS / "bert" / "vocab.txt", directory / "vocab.txt")
    names = {"cls_token": "[CLS]", "mask_token": "[MASK]", "pad_token": "[PAD]", "sep_token": "[SEP]",
             "unk_token": "[UNK]"}
    write_json(directory / "special_tokens_map.json", names)
    write_json(directory / "tokenizer_config.json", {
        "tokenizer_class": "BertTokenizer", "do_lower_case": True, "strip_accents": None, "model_max_length": 512,
        "tokenize_chinese_chars": True, **names})


def added_tokens(contents: dict[int, str]) -> dict[str, dict[str, Any]]:
    flags = {"normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {str(n): {"content": text, "lstrip": text == "<mask>", **flags} for n, text in contents.items()}


def write_checkpoint(directory: Path, config: dict[str, Any], tensors: Tensors, shards: int = 1) -> None:
    """config.json and model.safetensors, or `shards` files and their index as transformers names them."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    files = {name: f"model-{1 + n * shards // len(names):05d}-of-{shards:05d}.safetensors"
             for n, name in enumerate(names)}
    for file in sorted(set(files.values())):
        save_file({n: tensors[n] for n in names if files[n] == file}, directory / file, metadata={"format": "pt"})
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": files}
    write_json(directory / "model.safetensors.index.json", index)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer_json(directory: Path) -> None:
    """tokenizer.json as transformers makes it of the tiny checkpoint's own vocabulary, reduced to what tokenizing
    needs; with no added token in it."""
    from tokenizers import Tokenizer

    if (directory / "vocab.txt").is_file():
        content = bert_tokenizer_json(directory)
    elif (directory / "tokenizer.model").is_file():
        content = gemma_tokenizer_json(directory)
    else:
        content = xlmr_tokenizer_json(directory)
    content = {"version": "1.0", "added_tokens": [], "post_processor": None, "decoder": None, **content}
    Tokenizer.from_str(json.dumps(content))  # so that no test passes for a file that nobody could have
    write_json(directory / "tokenizer.json", content)


def bert_tokenizer_json(directory: Path) -> dict[str, Any]:
    pieces = (directory / "vocab.txt").read_text(encoding="utf-8").splitlines()
    return {
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                       "strip_accents": None, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": {piece: n for n, piece in enumerate(pieces)}},
    }


def xlmr_tokenizer_json(directory: Path) -> dict[str, Any]:
    from convert.vocab import _unigram_of_sentencepiece

    pieces, charsmap = _unigram_of_sentencepiece(directory / "sentencepiece.bpe.model")
    return {
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "WhitespaceSplit"},
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}]},
        "model": {"type": "Unigram", "unk_id": 3, "vocab": pieces, "byte_fallback": False},
    }


def gemma_tokenizer_json(directory: Path) -> dict[str, Any]:
    """The merges are those that transformers generates: each piece from every two that spell it, by its score."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    ids = {model.id_to_piece(n): n for n in range(model.get_piece_size())}
    merges = []
    for piece, n in ids.items():
        cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece)) if piece[:at] in ids and piece[at:] in ids]
        cuts.sort(key=lambda cut: (ids[cut[0]], ids[cut[1]]))
        merges += [(model.get_score(n), len(left), len(right), left, right) for left, right in cuts]
    merges.sort(key=lambda merge: merge[:3], reverse=True)  # stable
    return {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
                          "invert": False},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": ids, "merges": [[left, right] for *_, left, right in merges]},
    }


def add_token(directory: Path, text: str, **flags: Any) -> int:
    """One more token and one more row of embeddings, as a fine-tune adds them; returns the token's id."""
    if not (directory / "tokenizer.json").is_file():
        write_tokenizer_json(directory)
    config, content = (json.loads((directory / name).read_text()) for name in ("config.json", "tokenizer.json"))
    token_id = config["vocab_size"]
    write_json(directory / "config.json", config | {"vocab_size": token_id + 1})
    content["added_tokens"].append({"id": token_id, "content": text, "single_word": False, "lstrip": False,
                                    "rstrip": False, "normalized": False, "special": False, **flags})
    write_json(directory / "tokenizer.json", content)
    tensors = load_file(directory / "model.safetensors")
    name = next(name for name in tensors if name.endswith(("word_embeddings.weight", "embed_tokens.weight")))
    tensors[name] = np.concatenate([tensors[name], tensors[name][-1:]])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return int(token_id)
