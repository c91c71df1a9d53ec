"""Writes a GGUF file: metadata first, then each tensor in row blocks, so that memory does not follow the file's size.

The same checkpoint gives a byte-identical file: nothing here depends on time, paths or the order of a set.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import numpy.typing as npt

from .added import found_in_texts
from .checkpoint import Checkpoint, Config, FloatArray
from .errors import CannotStartError, ConvertError
from .gguf_file import GgufFile
from .models import (
    BI_ENCODER,
    CROSS_ENCODER,
    MINI_COSINE_BIAS,
    MINI_COSINE_SCALE,
    MINI_OVERLAP_SCALE,
    YES_LOGIT,
    Architecture,
)
from .progress import Progress
from .recipe import Recipe, recipe_metadata
from .reference import GEMMA_PARTS, PromptParts, ReferencePairs, check_pooling, max_tokens
from .samples import TOKENS_A_SAMPLE, passage_with
from .tensors import Tensor, head_dimension, position_offset
from .vocab import Vocabulary

# Of the rerank.* keys. 2: what an older server would score wrongly: another prompt than gemma's, text to normalise.
VERSION, RECIPE_VERSION = 1, 2
CHECK_QUERY = "What is the capital of France?"
CHECK_PASSAGE = "Paris is the capital of France. Größe, 東京, مرحبا!"
# rerank.verification is written as {} and this many bytes of blanks; verify fills them in without moving a tensor.
VERIFICATION_BYTES = 1024
MAX_FLOAT16 = float(np.finfo(np.float16).max)

Metadata = dict[str, Any]


def model_metadata(
    checkpoint: Checkpoint, architecture: Architecture, vocabulary: Vocabulary, source: str, revision: str,
    parts: PromptParts = GEMMA_PARTS, recipe: Recipe | None = None,
) -> Metadata:
    """Everything but the quantisation. int is written as uint32, float as float32. Raises ConvertError."""
    hyperparameters = _hyperparameters(checkpoint, architecture)
    longest = max_tokens(checkpoint, architecture, hyperparameters["context_length"])
    pairs = ReferencePairs(checkpoint, architecture, vocabulary, longest, parts, recipe)
    check_passage = f"{passage_with(found_in_texts(vocabulary)[:TOKENS_A_SAMPLE])} {CHECK_PASSAGE}".lstrip()
    return {
        "general.name": source,
        **{f"{architecture.gguf}.{key}": value for key, value in hyperparameters.items()},
        **_tokenizer(vocabulary),
        "rerank.version": RECIPE_VERSION if vocabulary.model == "gpt2" else VERSION,
        "rerank.kind": architecture.kind,
        "rerank.source": source,
        "rerank.revision": revision,
        "rerank.max_tokens": longest,
        "rerank.normalization": vocabulary.normalization,
        **(recipe_metadata(checkpoint, recipe, vocabulary) if recipe else {}),
        **({} if recipe else _kind_metadata(checkpoint, architecture, pairs, parts)),
        "rerank.check_query": CHECK_QUERY,
        "rerank.check_passage": check_passage,
        "rerank.check_ids": pairs.ids(CHECK_QUERY, check_passage),
    }


def _hyperparameters(checkpoint: Checkpoint, architecture: Architecture) -> Metadata:
    if architecture.gguf == "modern-bert":
        return _modern_bert(checkpoint)
    return _bert(checkpoint, architecture) if architecture.gguf == "bert" else _decoder(checkpoint)


def _bert(checkpoint: Checkpoint, architecture: Architecture) -> Metadata:
    config = checkpoint.config
    offset = position_offset(config) if architecture.tokenizer == "t5" else 0
    rank = architecture.kind == CROSS_ENCODER
    return {
        "context_length": config.integer("max_position_embeddings") - offset,
        "embedding_length": config.integer("hidden_size"),
        "feed_forward_length": config.integer("intermediate_size"),
        "block_count": config.integer("num_hidden_layers"),
        "attention.head_count": config.integer("num_attention_heads"),
        "attention.layer_norm_epsilon": config.number("layer_norm_eps", 1e-12),
        "attention.causal": False,
        "pooling_type": int(gguf.PoolingType.RANK if rank else gguf.PoolingType.MEAN),
    }


def _modern_bert(checkpoint: Checkpoint) -> Metadata:
    """Every n-th layer sees the whole pair, the first one included; the others half of local_attention to each side."""
    config = checkpoint.config
    config.expect("classifier_pooling", "cls", "mean")  # what the head sees: the first token, or the mean of all
    is_mean = config.values.get("classifier_pooling") == "mean"
    return {
        "context_length": config.integer("max_position_embeddings", 8192),
        "embedding_length": config.integer("hidden_size"),
        "feed_forward_length": config.integer("intermediate_size"),
        "block_count": config.integer("num_hidden_layers"),
        "attention.head_count": config.integer("num_attention_heads"),
        "attention.layer_norm_epsilon": config.number("norm_eps", 1e-5),
        "attention.causal": False,
        "attention.sliding_window": config.integer("local_attention", 128),
        "attention.sliding_window_pattern": _global_layers(config),
        "rope.freq_base": _modern_bert_theta(config, "full_attention", "global_rope_theta", 160000.0),
        "rope.freq_base_swa": _modern_bert_theta(config, "sliding_attention", "local_rope_theta", 10000.0),
        "vocab_size": config.integer("vocab_size"),
        "pooling_type": int(gguf.PoolingType.RANK),
        "classifier.pooling_type": int(gguf.PoolingType.MEAN if is_mean else gguf.PoolingType.CLS),
    }


def _global_layers(config: Config) -> int:
    """n: layers 0, n, 2n ... attend to everything. transformers 5 lists the layers' types in place of n."""
    every, types = config.integer("global_attn_every_n_layers", 3), config.values.get("layer_types")
    if isinstance(types, list) and types:
        every = next((n for n in range(1, len(types)) if types[n] == "full_attention"), len(types))
        n_layers = config.integer("num_hidden_layers")
        if types != ["sliding_attention" if n % every else "full_attention" for n in range(n_layers)]:
            raise ConvertError(f"{config.path}: layer_types is not one full_attention in every {every} layers")
    return every


def _modern_bert_theta(config: Config, kind: str, name: str, default: float) -> float:
    rope = config.values.get("rope_parameters")
    own = rope.get(kind) if isinstance(rope, dict) else None
    return _plain_theta(config, own) or config.number(name, default)


def _plain_theta(config: Config, rope: Any) -> float | None:
    """rope_theta of transformers 5's rope_parameters, None without it. Raises ConvertError: scaled positions."""
    if not isinstance(rope, dict):
        return None
    if rope.get("rope_type", "default") != "default":
        raise ConvertError(f"{config.path}: rope_parameters.rope_type is {rope['rope_type']!r}, expected 'default'")
    theta = rope.get("rope_theta")
    if theta is None:
        return None
    return Config(config.path, {"rope_parameters.rope_theta": theta}).number("rope_parameters.rope_theta")


def _decoder(checkpoint: Checkpoint) -> Metadata:
    config = checkpoint.config
    heads = config.integer("num_attention_heads")
    theta = _plain_theta(config, config.values.get("rope_parameters"))
    return {
        "context_length": config.integer("max_position_embeddings", 8192),
        "embedding_length": config.integer("hidden_size"),
        "feed_forward_length": config.integer("intermediate_size"),
        "block_count": config.integer("num_hidden_layers"),
        "attention.head_count": heads,
        "attention.head_count_kv": config.integer("num_key_value_heads", heads),
        "attention.key_length": head_dimension(config),
        "attention.value_length": head_dimension(config),
        "attention.layer_norm_rms_epsilon": config.number("rms_norm_eps", 1e-6),
        "rope.freq_base": theta or config.number("rope_theta", 10000.0),
    }


def _tokenizer(vocabulary: Vocabulary) -> Metadata:
    values: Metadata = {"model": vocabulary.model, "pre": "default", "tokens": vocabulary.tokens}
    if vocabulary.scores:
        values["scores"] = vocabulary.scores
    values["token_type"] = vocabulary.types
    values |= {f"{name}_token_id": token_id for name, token_id in vocabulary.special.items()} | vocabulary.options
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def _kind_metadata(
    checkpoint: Checkpoint, architecture: Architecture, pairs: ReferencePairs, parts: PromptParts
) -> Metadata:
    if architecture.kind == YES_LOGIT:
        yes = pairs.encode("Yes")
        if not yes:
            raise ConvertError(f"{checkpoint.directory}: its tokenizer makes nothing of 'Yes'")
        return {
            "rerank.query_prefix": parts.query_prefix, "rerank.passage_prefix": parts.passage_prefix,
            "rerank.separator": parts.separator, "rerank.prompt": parts.prompt, "rerank.yes_token_id": yes[0],
        }  # fmt: skip
    if parts != GEMMA_PARTS:
        raise CannotStartError("--prompt, --query-prefix and --passage-prefix are for a Gemma reranker alone")
    if architecture.kind == BI_ENCODER:
        check_pooling(checkpoint)
        line: Metadata = {"rerank.cosine_scale": MINI_COSINE_SCALE, "rerank.cosine_bias": MINI_COSINE_BIAS}
        if first_piece_id := pairs.first_piece_id():
            line |= {"rerank.overlap_scale": MINI_OVERLAP_SCALE, "rerank.first_piece_id": first_piece_id}
        return line
    if architecture.gguf == "modern-bert":
        return {"rerank.token_types": 1}
    # Two types mean that the passage has type 1 (BERT); llama.cpp gives all tokens type 0, so the server must know.
    return {"rerank.token_types": min(2, checkpoint.config.integer("type_vocab_size", 2))}


def file_bytes(tensors: list[Tensor], half: bool) -> int:
    """Bytes of tensor data in an F16 (half) or F32 file."""
    return sum(gguf.GGUFWriter.ggml_pad(_n_bytes(tensor, half), gguf.GGUF_DEFAULT_ALIGNMENT) for tensor in tensors)


def _n_bytes(tensor: Tensor, half: bool) -> int:
    return math.prod(tensor.shape) * _dtype(tensor, half).itemsize


def _dtype(tensor: Tensor, half: bool) -> np.dtype[Any]:
    return np.dtype("<f2" if half and tensor.half else "<f4")


def write_file(
    path: Path,
    checkpoint: Checkpoint,
    architecture: Architecture,
    tensors: list[Tensor],
    metadata: Metadata,
    half: bool,
) -> None:
    """Writes an F16 (half) or F32 file. Raises ConvertError: a NaN, a value beyond float16, a full disk."""
    what, total = f"writing {'F16' if half else 'F32'}", file_bytes(tensors, half)
    try:
        _write_header(path, architecture, tensors, metadata, half)
        with path.open("ab") as file, Progress(what, total) as done:
            _pad(file)
            for tensor in tensors:
                for block in _converted(checkpoint, tensor, half):
                    file.write(block.data)
                    done(block.nbytes)
                _pad(file)
        GgufFile.open(path).seal()
    except OSError as exc:
        raise disk_error(path, exc) from exc


def _write_header(
    path: Path, architecture: Architecture, tensors: list[Tensor], metadata: Metadata, half: bool
) -> None:
    writer = gguf.GGUFWriter(path, architecture.gguf)
    for key, value in metadata.items():
        _add(writer, key, value)
    file_type = gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32
    writer.add_file_type(int(file_type))
    writer.add_string("rerank.quantization", "F16" if half else "F32")
    writer.add_string("rerank.verification", "{}".ljust(VERIFICATION_BYTES))
    writer.add_string("rerank.header_sha256", "0" * 64)  # filled in when all is written
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, _dtype(tensor, half), _n_bytes(tensor, half))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        # not add_string, which leaves an empty one out: the server would take its own default for it
        writer.add_key_value(key, value, gguf.GGUFValueType.STRING)
    elif value:  # an empty array cannot be written, and says nothing
        writer.add_array(key, value)


def _converted(checkpoint: Checkpoint, tensor: Tensor, half: bool) -> Iterator[npt.NDArray[Any]]:
    for block in checkpoint.blocks(tensor.source, tensor.first_row):
        edited = tensor.edit(block)
        _check_values(checkpoint, tensor, edited, half)
        yield np.ascontiguousarray(edited, dtype=_dtype(tensor, half))


def _check_values(checkpoint: Checkpoint, tensor: Tensor, block: FloatArray, half: bool) -> None:
    largest = float(np.abs(block).max(initial=0.0))  # NaN when one is in it
    if not math.isfinite(largest):
        raise ConvertError(f"{checkpoint.tensors[tensor.source].file}: tensor {tensor.source} holds NaN or infinity")
    if half and tensor.half and largest > MAX_FLOAT16:
        raise ConvertError(f"tensor {tensor.source} holds {largest:g}, which float16 cannot: it cannot be converted")


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))


def disk_error(path: Path, exc: OSError) -> ConvertError:
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return ConvertError(f"{path.parent}: the disk is full; free some space, or choose another --out")
    return ConvertError(f"{path}: cannot be written ({exc.strerror or exc})")
