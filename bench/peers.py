"""Peers that are Python libraries, served like the others: `python -m bench.peers RECIPE ROLE CHECKPOINT PORT`.

Runs in the interpreter that has the peer's packages, so it imports nothing of this project. Each recipe is what the
library's own documentation tells people to do; requests are scored one after the other, as none of them queues.
"""

from __future__ import annotations

import http.server
import itertools
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MAX_LENGTH_TOKENS = 512
ONNX_BATCH = 4  # pairs, sorted by length: the best of 1, 4, 8 and 32 on two cores
OPENVINO_BATCH = 1  # the best of 1 and 4 on one core
PROMPT = (  # FlagEmbedding 1.4.2, FlagLLMReranker
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)

Score = Callable[[str, Sequence[str]], list[float]]


def flagembedding(role: str, checkpoint: Path) -> Score:
    """FlagReranker or FlagLLMReranker, float32 on the CPU, batch size and length limit as they come."""
    import FlagEmbedding

    make = FlagEmbedding.FlagLLMReranker if role == "gemma" else FlagEmbedding.FlagReranker
    reranker = make(str(checkpoint), use_fp16=False, devices=["cpu"])

    def score(query: str, passages: Sequence[str]) -> list[float]:
        scores = reranker.compute_score([(query, passage) for passage in passages], normalize=True)
        return [float(score) for score in scores]

    return score


def transformers(role: str, checkpoint: Path) -> Score:
    """AutoModelForSequenceClassification in float32: the recipe of the model card, in FlagEmbedding's batches."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if role != "m3":
        sys.exit("the recipe is for cross-encoders")
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint))
    model = AutoModelForSequenceClassification.from_pretrained(str(checkpoint), dtype=torch.float32).eval()

    def score_batch(query: str, passages: Sequence[str]) -> list[float]:
        pairs = [(query, passage) for passage in passages]
        inputs = tokenizer(pairs, padding=True, truncation="only_second", max_length=MAX_LENGTH_TOKENS,
                           return_tensors="pt")  # fmt: skip
        with torch.inference_mode():
            return [float(logit) for logit in model(**inputs).logits.view(-1)]

    return lambda query, passages: by_length(score_batch, query, passages, 128)


def onnxruntime(role: str, checkpoint: Path) -> Score:
    """ONNX Runtime with dynamic int8 (quantize_dynamic), which is what its own documentation advises for CPUs."""
    import onnxruntime
    from transformers import AutoTokenizer

    session = onnxruntime.InferenceSession(str(int8_onnx(checkpoint)), providers=["CPUExecutionProvider"])
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint))

    def score_batch(query: str, passages: Sequence[str]) -> list[float]:
        pairs = [(query, passage) for passage in passages]
        inputs = tokenizer(pairs, padding=True, truncation="only_second", max_length=MAX_LENGTH_TOKENS,
                           return_tensors="np")  # fmt: skip
        (logits,) = session.run(None, {one.name: inputs[one.name].astype("int64") for one in session.get_inputs()})
        return [float(logit) for logit in logits[:, 0]]

    return lambda query, passages: by_length(score_batch, query, passages, ONNX_BATCH)


def int8_onnx(checkpoint: Path) -> Path:
    """The exported and quantised model beside the checkpoint; made once, in minutes."""
    folder = checkpoint.with_name(f"{checkpoint.name}-onnx")
    quantized = folder / "int8.onnx"
    if not quantized.is_file():
        from onnxruntime.quantization import QuantType, quantize_dynamic

        folder.mkdir(exist_ok=True)
        export_onnx(checkpoint, folder / "float32.onnx")
        part = folder / "int8.part.onnx"
        quantize_dynamic(folder / "float32.onnx", part, weight_type=QuantType.QInt8)
        part.replace(quantized)
    return quantized


def openvino(precision: str) -> Callable[[str, Path], Score]:
    """OpenVINO's CPU plugin on weights that nncf made int8, as its documentation advises; the latency hint, and as many
    threads as the machine has cores. precision: of the activations ("": what it takes by itself on this CPU)."""

    def load(role: str, checkpoint: Path) -> Score:
        import openvino
        from transformers import AutoTokenizer

        properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0))}
        precisions = {"INFERENCE_PRECISION_HINT": precision} if precision else {}
        model = openvino.Core().compile_model(str(int8_openvino(checkpoint)), "CPU", properties | precisions)
        tokenizer = AutoTokenizer.from_pretrained(str(checkpoint))
        names = [name for one in model.inputs for name in one.names]

        def score_batch(query: str, passages: Sequence[str]) -> list[float]:
            pairs = [(query, passage) for passage in passages]
            inputs = tokenizer(pairs, padding=True, truncation="only_second", max_length=MAX_LENGTH_TOKENS,
                               return_tensors="np")  # fmt: skip
            (logits,) = model({name: inputs[name].astype("int64") for name in names}).values()
            return [float(logit) for logit in logits[:, 0]]

        return lambda query, passages: by_length(score_batch, query, passages, OPENVINO_BATCH)

    return load


def sentence_transformers(backend: str) -> Callable[[str, Path], Score]:
    """CrossEncoder with a backend of its own documentation ("onnx", "openvino"), which exports the checkpoint and keeps
    float32 weights. The library sorts pairs by length."""

    def load(role: str, checkpoint: Path) -> Score:
        from sentence_transformers import CrossEncoder

        model = CrossEncoder(str(checkpoint), backend=backend, max_length=MAX_LENGTH_TOKENS, device="cpu")

        def score(query: str, passages: Sequence[str]) -> list[float]:
            pairs = [(query, passage) for passage in passages]
            return [float(one) for one in model.predict(pairs, batch_size=ONNX_BATCH, show_progress_bar=False)]

        return score

    return load


def fastembed(role: str, checkpoint: Path) -> Score:
    """TextCrossEncoder, which is ONNX Runtime inside, with the model of the onnxruntime recipe as a custom one."""
    import shutil

    from fastembed.common.model_description import ModelSource
    from fastembed.rerank.cross_encoder import TextCrossEncoder
    from transformers import AutoTokenizer

    int8 = int8_onnx(checkpoint)
    folder = checkpoint.with_name(f"{checkpoint.name}-fastembed")
    # it reads tokenizer.json alone, and cuts pairs where its configuration says
    AutoTokenizer.from_pretrained(str(checkpoint), model_max_length=MAX_LENGTH_TOKENS).save_pretrained(folder)
    shutil.copyfile(checkpoint / "config.json", folder / "config.json")
    shutil.copyfile(int8, folder / int8.name)
    TextCrossEncoder.add_custom_model("local/peer", model_file=int8.name, sources=ModelSource(hf="local/peer"))
    model = TextCrossEncoder("local/peer", specific_model_path=str(folder))
    return lambda query, passages: list(model.rerank(query, list(passages), batch_size=ONNX_BATCH))


def int8_openvino(checkpoint: Path) -> Path:
    """The exported model with int8 weights beside the checkpoint; made once, in minutes."""
    folder = checkpoint.with_name(f"{checkpoint.name}-onnx")
    compressed = folder / "openvino-int8.xml"
    if not compressed.is_file():
        import nncf
        import openvino

        if not (folder / "float32.onnx").is_file():
            folder.mkdir(exist_ok=True)
            export_onnx(checkpoint, folder / "float32.onnx")
        model = openvino.Core().read_model(folder / "float32.onnx")
        compressed_model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
        part = folder / "openvino-int8.part.xml"
        openvino.save_model(compressed_model, part)
        part.with_suffix(".bin").replace(compressed.with_suffix(".bin"))
        part.replace(compressed)
    return compressed


def export_onnx(checkpoint: Path, path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(
        str(checkpoint), dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    names = AutoTokenizer.from_pretrained(str(checkpoint)).model_input_names
    ids = torch.tensor([[0, 5, 2, 2, 6, 7, 2], [0, 5, 2, 2, 6, 2, 1]])
    values = {"input_ids": ids, "attention_mask": (ids != 1).long(), "token_type_ids": torch.zeros_like(ids)}
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=MAX_LENGTH_TOKENS)
    torch.onnx.export(
        model, (), str(path), kwargs={name: values[name] for name in names}, input_names=names,
        output_names=["logits"], dynamic_shapes={name: {0: batch, 1: length} for name in names},
        dynamo=True, external_data=True,
    )  # fmt: skip


def llama_cpp_python(role: str, file: Path) -> Score:
    """gemma as people run it today: llama-cpp-python's defaults, the whole prompt of each pair evaluated by itself."""
    import llama_cpp

    model = llama_cpp.Llama(str(file), n_ctx=MAX_LENGTH_TOKENS + 128, verbose=False)
    (yes, *_) = model.tokenize(b"Yes", add_bos=False)

    def logit(query: str, passage: str) -> float:
        model.reset()
        model.eval(model.tokenize(f"A: {query}\nB: {passage}\n{PROMPT}".encode())[: MAX_LENGTH_TOKENS + 64])
        return float(llama_cpp.llama_get_logits_ith(model.ctx, -1)[yes])

    return lambda query, passages: [logit(query, passage) for passage in passages]


def infinity(role: str, checkpoint: Path) -> Score:
    """Infinity's engine on PyTorch, its defaults."""
    import asyncio

    from infinity_emb import AsyncEmbeddingEngine, EngineArgs

    engine = AsyncEmbeddingEngine.from_args(EngineArgs(model_name_or_path=str(checkpoint), device="cpu"))
    loop = asyncio.new_event_loop()
    loop.run_until_complete(engine.astart())

    def score(query: str, passages: Sequence[str]) -> list[float]:
        scores, _ = loop.run_until_complete(engine.rerank(query=query, docs=list(passages)))
        return [float(score.relevance_score) for score in scores]

    return score


RECIPES: dict[str, Callable[[str, Path], Score]] = {
    "flagembedding": flagembedding, "transformers": transformers, "onnxruntime": onnxruntime,
    "openvino": openvino(""), "openvino-bf16": openvino("bf16"), "openvino-f32": openvino("f32"),
    "sentence-transformers-onnx": sentence_transformers("onnx"),
    "sentence-transformers-openvino": sentence_transformers("openvino"), "fastembed": fastembed,
    "llama-cpp-python": llama_cpp_python, "infinity": infinity,
}  # fmt: skip


def by_length(score_batch: Score, query: str, passages: Sequence[str], size: int) -> list[float]:
    """Scores in the order of the passages; batches are of like length, so that little is padding."""
    order = sorted(range(len(passages)), key=lambda index: -len(passages[index]))
    chunks = [order[first : first + size] for first in range(0, len(order), size)]
    scored = [score_batch(query, [passages[index] for index in chunk]) for chunk in chunks]
    scores = dict(zip(order, itertools.chain.from_iterable(scored), strict=True))
    return [scores[index] for index in range(len(passages))]


def serve(score: Score, port: int) -> None:
    """POST /rerank {query, passages} -> [score], GET /health."""
    turn = threading.Lock()  # guards the model: none of these libraries is safe to call from two threads

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(b"{}")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with turn:
                scores = score(body["query"], body["passages"])
            self._answer(json.dumps(scores).encode())

        def _answer(self, payload: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    recipe, role, source, port = sys.argv[1:]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no warning about forking; the batches are small
    serve(RECIPES[recipe](role, Path(source)), int(port))
