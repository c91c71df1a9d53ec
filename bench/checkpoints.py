"""Checkpoints at a model's true size with random weights: speed and memory depend on the shapes, not on the values.

Written as float16 safetensors, block by block, so that memory does not follow the model's size; `python -m convert`
then makes GGUF files of them, exactly as it does of a real checkpoint. Kept under build/bench/.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
TINY_TOKENIZERS = ROOT / "tests" / "golden" / "tokenizers"
BLOCK_ITEMS = 1 << 22  # values drawn at once
STD = 0.02  # of the weights, as both models were initialised
# What the published config.json of both say. The weights here are float16 to halve the disk; transformers computes in
# the type that config.json names, and float16 on a CPU is ten times slower than float32.
TORCH_DTYPE = "float32"
UNUSED_SCORE = -100.0  # of filler pieces: no text is ever split into them

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]


def xlmr_config(hidden: int = 1024, layers: int = 24, vocabulary: int = 250_002) -> Config:
    """XLMRobertaForSequenceClassification; the defaults are bge-reranker-v2-m3's."""
    return {
        "architectures": ["XLMRobertaForSequenceClassification"], "model_type": "xlm-roberta",
        "vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64, "intermediate_size": 4 * hidden, "max_position_embeddings": 8194,
        "type_vocab_size": 1, "layer_norm_eps": 1e-5, "hidden_act": "gelu", "bos_token_id": 0, "pad_token_id": 1,
        "eos_token_id": 2, "position_embedding_type": "absolute", "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0}, "torch_dtype": TORCH_DTYPE, "classifier_dropout": None,
    }  # fmt: skip


def gemma_config(hidden: int = 2048, layers: int = 18, vocabulary: int = 256_000) -> Config:
    """GemmaForCausalLM; the defaults are bge-reranker-v2-gemma's."""
    return {
        "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "vocab_size": vocabulary, "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 256, "num_key_value_heads": 1, "head_dim": 256,
        "intermediate_size": 8 * hidden, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False,
        "tie_word_embeddings": True, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
        "torch_dtype": TORCH_DTYPE,
    }  # fmt: skip


def xlmr_shapes(config: Config) -> Shapes:
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {}

    def dense(name: str, n_out: int, n_in: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (n_out, n_in), (n_out,)

    def layer_norm(name: str) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (hidden,), (hidden,)

    rows = {"word": "vocab_size", "position": "max_position_embeddings", "token_type": "type_vocab_size"}
    for table, size in rows.items():
        shapes[f"roberta.embeddings.{table}_embeddings.weight"] = (config[size], hidden)
    layer_norm("roberta.embeddings.LayerNorm")
    for index in range(config["num_hidden_layers"]):
        layer = f"roberta.encoder.layer.{index}"
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            dense(f"{layer}.{name}", hidden, hidden)
        layer_norm(f"{layer}.attention.output.LayerNorm")
        dense(f"{layer}.intermediate.dense", wide, hidden)
        dense(f"{layer}.output.dense", hidden, wide)
        layer_norm(f"{layer}.output.LayerNorm")
    dense("classifier.dense", hidden, hidden)
    dense("classifier.out_proj", 1, hidden)
    return shapes


def gemma_shapes(config: Config) -> Shapes:
    hidden, wide, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    n_query, n_kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for index in range(config["num_hidden_layers"]):
        parts = {
            "input_layernorm": (hidden,), "self_attn.q_proj": (n_query, hidden), "self_attn.k_proj": (n_kv, hidden),
            "self_attn.v_proj": (n_kv, hidden), "self_attn.o_proj": (hidden, n_query),
            "post_attention_layernorm": (hidden,), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
        }  # fmt: skip
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in parts.items()}
    return shapes


@dataclass(frozen=True)
class Kind:
    """What tells one model from another here. n_outside: ids of the vocabulary that its tokenizer file lacks."""

    config: Callable[..., Config]
    shapes: Callable[[Config], Shapes]
    tokenizer_file: str
    tokenizer_class: str
    tiny: str
    n_outside: int


KINDS = {
    # fairseq adds <pad> and <mask> to SentencePiece's own pieces
    "m3": Kind(xlmr_config, xlmr_shapes, "sentencepiece.bpe.model", "XLMRobertaTokenizer", "xlmr", 2),
    "gemma": Kind(gemma_config, gemma_shapes, "tokenizer.model", "GemmaTokenizer", "gemma", 0),
}


def make_checkpoint(model: str, directory: Path, tokenizer: Path | None = None, **size: int) -> Path:
    """A checkpoint directory of "m3" or "gemma" shape; one that is there already is kept. Returns `directory`.

    tokenizer: a directory with the model's own tokenizer file; without it, the tests' tiny one is padded to size.
    size: hidden, layers, vocabulary, where not the true ones are wanted.
    """
    kind, done = KINDS[model], directory / "config.json"
    if not done.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        config = kind.config(**size)
        write_tokenizer(kind, tokenizer, config["vocab_size"] - kind.n_outside, directory)
        write_random_weights(directory / "model.safetensors", kind.shapes(config))
        done.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")  # last: it marks a complete directory
    return directory


def write_random_weights(path: Path, shapes: Shapes, seed: int = 1) -> None:
    """float16 safetensors: 8 bytes of header length, a JSON header, then the tensors (the format's README)."""
    header, start = {}, 0
    for name, shape in shapes.items():
        end = start + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = np.random.default_rng(seed)
    # drawn once and read from a random place for each block: billions of draws would take minutes
    pool = (STD * generator.standard_normal(2 * BLOCK_ITEMS, dtype=np.float32)).astype("<f2")
    with path.open("wb") as file, tqdm(total=start, unit="B", unit_scale=True, desc="weights", leave=False) as done:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for count in block_sizes(math.prod(shape)):
                offset = generator.integers(BLOCK_ITEMS)
                block = pool[offset : offset + count]
                file.write((block + np.float16(1) if "LayerNorm.weight" in name else block).data)
                done.update(block.nbytes)


def block_sizes(n_items: int) -> Iterator[int]:
    for first in range(0, n_items, BLOCK_ITEMS):
        yield min(BLOCK_ITEMS, n_items - first)


def write_tokenizer(kind: Kind, directory: Path | None, n_pieces: int, output: Path) -> None:
    """The tokenizer file that `directory` has, or the tests' tiny one with filler pieces up to n_pieces."""
    if directory is not None and (directory / kind.tokenizer_file).is_file():
        shutil.copyfile(directory / kind.tokenizer_file, output / kind.tokenizer_file)
    else:
        source = TINY_TOKENIZERS / kind.tiny / kind.tokenizer_file
        (output / kind.tokenizer_file).write_bytes(padded(source, n_pieces))
    names = {"tokenizer_class": kind.tokenizer_class, "model_max_length": 8192}
    (output / "tokenizer_config.json").write_text(json.dumps(names) + "\n", encoding="utf-8")


def padded(path: Path, n_pieces: int) -> bytes:
    """A SentencePiece model with unused pieces appended (of a private-use character, so that no text has them)."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    for index in range(len(model.pieces), n_pieces):
        model.pieces.add(piece=f"\uf8ff{index}", score=UNUSED_SCORE, type=1)  # 1: NORMAL
    return bytes(model.SerializeToString())


def quantized(checkpoint: Path, quantizations: Iterable[str]) -> dict[str, Path]:
    """quantisation -> GGUF file, made by `python -m convert` beside the checkpoint where it is not there yet."""
    out = checkpoint.parent
    files = {name: out / f"{checkpoint.name}-{name}.gguf" for name in dict.fromkeys(quantizations)}
    if missing := [name for name, path in files.items() if not path.is_file()]:
        command = [sys.executable, "-m", "convert", str(checkpoint), "--out", str(out), "--quant", *missing]
        # its warning that random weights rank nothing is true, and of no use here
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            raise SystemExit(f"bench: `python -m convert {checkpoint}` failed:\n{done.stderr.strip()[-600:]}")
    return files
