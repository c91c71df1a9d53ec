"""The engine of accel/: its products and its attention against float64, the models' scores with it against llama.cpp's.

`make accel` builds it; without it these tests are skipped. What it does on a lesser CPU than this one
is tested as well: oneDNN, which it asks what the CPU has, believes ONEDNN_MAX_CPU_ISA.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import ACCEL_LIBRARY, ARCHITECTURES, ROOT, Gguf
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from golden.inputs import SCORED_PAIRS
from server_process import ServerProcess

import rerank_server
from bench import profile

needs_engine = pytest.mark.skipif(not ACCEL_LIBRARY.is_file(), reason="the int8 engine is not built: make accel")

Floats = npt.NDArray[np.float32]
Exact = npt.NDArray[np.float64]

PLAIN = (Type.F32, Type.F16, Type.BF16)
TYPES = (
    *PLAIN, Type.Q8_0, Type.Q5_0, Type.Q4_0, Type.Q6_K, Type.Q5_K, Type.Q4_K, Type.Q3_K, Type.Q2_K, Type.IQ4_XS,
    Type.IQ4_NL,
)  # fmt: skip
SHAPES = (  # rows, inputs, outputs: a kernel's rows, one less and one more, several blocks of rows and columns
    (1, 256, 1), (1, 512, 64), (31, 256, 7), (32, 256, 100), (33, 768, 65), (256, 256, 320), (257, 1024, 513),
    (600, 256, 130),
)  # fmt: skip
SEED = 5
# Logits with the engine against those without, as a part of their range. Activations and weights have 127 steps on each
# side: 1 % of a product, at random. Measured: 1/23 (XLM-R), 1/55 (BERT), 1/44 (bi-encoder), 1/43 (Gemma).
TOLERANCE = 1 / 20
# ModernBERT's layers multiply two rounded products (GEGLU) and have no biases: measured 1/18, the mean
# of all pairs 1/67.
MODERNBERT_TOLERANCE = 1 / 15
# The same with bfloat16, whose 8 bits are 0.2 % of each value. Measured: 1/120 (XLM-R), 1/177, 1/160, 1/168.
BF16_TOLERANCE = 1 / 80
BF16_ROUNDING = 2.0**-9  # of a value: half of the last of 8 bits
# Attention in bfloat16, where values are near 1: queries four times as large as keys make scores near
# 4, which rounding moves by 0.01. Measured: at most 0.0024, and 0.0011 where keys belong to few tokens.
ATTENTION_MEAN_ERROR = 0.004
# Alone against packed. All that the engine computes is the same to the bit, wherever in a batch a pair stands; the head
# and gemma's rotation are llama.cpp's. Measured: at most 1/4,000,000; one step of one int8 would be 1/1,000.
COMPANY_TOLERANCE = 1 / 1_000_000

@pytest.fixture(scope="module")
def library() -> Any:
    loaded, reason = rerank_server.load_accel(ACCEL_LIBRARY)
    assert loaded is not None, reason
    return loaded


def quantised(weights: Floats, kind: Type) -> tuple[bytes, Exact]:
    """The matrix as a GGUF file holds it, and its exact values by the gguf package, which is not ggml."""
    rows, columns = weights.shape
    if kind in PLAIN:
        raw = weights.astype({Type.F32: np.float32, Type.F16: np.float16}.get(kind, np.float32))
        if kind == Type.BF16:
            raw = (weights.view(np.uint32) >> 16).astype(np.uint16)
            return raw.tobytes(), (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return raw.tobytes(), raw.astype(np.float64)
    row_size = rerank_server._native("ggml_row_size", ctypes.c_size_t, ctypes.c_int, ctypes.c_int64)(kind, columns)
    raw_bytes = np.empty((rows, row_size), dtype=np.uint8)
    quantize = rerank_server._native(
        "ggml_quantize_chunk", ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    )  # fmt: skip
    quantize(kind, weights.ctypes.data, raw_bytes.ctypes.data, 0, rows, columns, None)
    return raw_bytes.tobytes(), dequantize(raw_bytes, kind).astype(np.float64)


def multiply(
    library: ctypes.CDLL, raw: bytes, kind: Type, n: int, rows: Floats, bias: Floats | None = None, gelu: bool = False,
    n_threads: int = 2, bf16: bool = False,
) -> Floats:  # fmt: skip
    out = np.full((len(rows), n), 7, dtype=np.float32)
    library.rerank_accel_configure(True, bf16, False)
    library.rerank_accel_multiply.restype = ctypes.c_bool
    rows = np.ascontiguousarray(rows)
    done = library.rerank_accel_multiply(
        ctypes.c_int(kind), raw, ctypes.c_int64(n), ctypes.c_int64(rows.shape[1]), ctypes.c_void_p(rows.ctypes.data),
        ctypes.c_int64(len(rows)), ctypes.c_void_p(bias.ctypes.data if bias is not None else None), ctypes.c_bool(gelu),
        ctypes.c_int(n_threads), ctypes.c_void_p(out.ctypes.data),
    )  # fmt: skip
    assert done
    return out


def bound(rows: Floats, weights: Exact) -> Exact:
    """The largest error that rounding to int8 can make: half a step of each factor, times the other."""
    in_step = np.abs(rows.astype(np.float64)).max(axis=1, keepdims=True) / 127
    weight_step = np.abs(weights).max(axis=1)[None, :] / 127
    of_rows = in_step / 2 * np.abs(weights).sum(axis=1)[None, :]
    of_weights = weight_step / 2 * np.abs(rows.astype(np.float64)).sum(axis=1, keepdims=True)
    return np.asarray((of_rows + of_weights + rows.shape[1] * in_step * weight_step / 4) * (1 + 1e-4) + 1e-30)


def bf16_bound(rows: Floats, weights: Exact) -> Exact:
    """The same for bfloat16: a part of each factor, and 1e-5 of the terms for sums in float32."""
    part = (1 + BF16_ROUNDING) ** 2 - 1 + 1e-5
    return np.asarray(part * (np.abs(rows.astype(np.float64)) @ np.abs(weights).T) + 1e-30)


def error_bound(library: ctypes.CDLL, bf16: bool, rows: Floats, weights: Exact) -> Exact:
    return bf16_bound(rows, weights) if bf16 and library.rerank_accel_has_bf16() else bound(rows, weights)


def draw(*shape: int) -> Floats:
    return np.random.default_rng([SEED, *shape]).standard_normal(shape).astype(np.float32)


@needs_engine
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_products_of_every_type_of_weight(library: ctypes.CDLL, kind: Type, bf16: bool) -> None:
    raw, weights = quantised(draw(96, 512) * np.float32(0.02), kind)
    rows = draw(40, 512)
    rows[:, 3] *= 20  # a channel as trained models have them
    error = np.abs(multiply(library, raw, kind, 96, rows, bf16=bf16) - rows.astype(np.float64) @ weights.T)
    assert np.all(error <= error_bound(library, bf16, rows, weights))


@needs_engine
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_odd_shapes(library: ctypes.CDLL, shape: tuple[int, int, int], bf16: bool) -> None:
    n_rows, k, n = shape
    weights, rows, bias = draw(n, k), draw(n_rows, k), draw(n)
    exact = rows.astype(np.float64) @ weights.T.astype(np.float64)
    allowed = error_bound(library, bf16, rows, weights.astype(np.float64))
    assert np.all(np.abs(multiply(library, weights.tobytes(), Type.F32, n, rows, bf16=bf16) - exact) <= allowed)
    with_bias = multiply(library, weights.tobytes(), Type.F32, n, rows, bias, bf16=bf16)
    assert np.all(np.abs(with_bias - exact - bias) <= allowed + 1e-5)


@needs_engine
def test_gelu_is_that_of_ggml(library: ctypes.CDLL) -> None:
    """Over all that comes up: a product of one input and one weight, which is exact."""
    values = np.linspace(-12, 12, 2001, dtype=np.float32)[:, None]
    rows = np.pad(values, ((0, 0), (0, 3)))  # matrices have a multiple of 4 inputs
    one, zero = np.eye(1, 4, dtype=np.float32), np.zeros(1, dtype=np.float32)
    x = values[:, 0].astype(np.float64)
    expected = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    out = multiply(library, one.tobytes(), Type.F32, 1, rows, zero, gelu=True)
    np.testing.assert_allclose(out[:, 0], expected, rtol=2e-6, atol=1e-6)


@needs_engine
def test_zeroes_nothing_and_huge_values(library: ctypes.CDLL) -> None:
    weights, rows, bias = draw(64, 256), draw(9, 256), draw(64)
    nothing = np.zeros((64, 256), dtype=np.float32)
    assert np.all(multiply(library, nothing.tobytes(), Type.F32, 64, rows) == 0)
    assert np.all(multiply(library, nothing.tobytes(), Type.F32, 64, rows, bias) == bias)
    assert np.all(multiply(library, weights.tobytes(), Type.F32, 64, np.zeros_like(rows)) == 0)
    assert multiply(library, weights.tobytes(), Type.F32, 64, rows[:0]).shape == (0, 64)
    tiny = multiply(library, weights.tobytes(), Type.F32, 64, rows * np.float32(1e-42))  # denormal
    assert np.all(np.abs(tiny) < 1e-38)
    huge = rows * np.float32(1e30)
    exact = huge.astype(np.float64) @ weights.T.astype(np.float64)
    error = np.abs(multiply(library, weights.tobytes(), Type.F32, 64, huge) - exact)
    assert np.all(error <= bound(huge, weights.astype(np.float64)))


@needs_engine
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_spoils_its_row_and_no_other(library: ctypes.CDLL, value: float, bf16: bool) -> None:
    """A failure is never a score: int8 has no NaN, so the row's scale carries it."""
    weights, rows = draw(64, 256), draw(70, 256)
    good = multiply(library, weights.tobytes(), Type.F32, 64, rows, bf16=bf16)
    rows[37, 5] = value
    out = multiply(library, weights.tobytes(), Type.F32, 64, rows, bf16=bf16)
    assert np.all(np.isnan(out[37]))
    np.testing.assert_array_equal(np.delete(out, 37, axis=0), np.delete(good, 37, axis=0))
    spoilt = weights.copy()
    spoilt[11, 3] = value
    assert np.all(np.isnan(multiply(library, spoilt.tobytes(), Type.F32, 64, rows[:5], bf16=bf16)[:, 11]))


@needs_engine
@pytest.mark.parametrize("bf16", [False, True])
def test_a_row_does_not_depend_on_the_others_or_on_threads(library: ctypes.CDLL, bf16: bool) -> None:
    """To the bit, so that a pair's score does not depend on its batch."""
    weights, rows = draw(700, 512), draw(300, 512)
    whole = multiply(library, weights.tobytes(), Type.F32, 700, rows, bf16=bf16)
    for first, last in [(0, 1), (5, 44), (250, 300)]:
        part = multiply(library, weights.tobytes(), Type.F32, 700, rows[first:last], bf16=bf16)
        np.testing.assert_array_equal(part, whole[first:last])
    for n_threads in (1, 3):
        again = multiply(library, weights.tobytes(), Type.F32, 700, rows, n_threads=n_threads, bf16=bf16)
        np.testing.assert_array_equal(again, whole)


# -- attention --------------------------------------------------------------------------------------------------------


class Graph:
    """One ggml_flash_attn_ext, computed by the engine's backend."""

    def __init__(self) -> None:
        class Parameters(ctypes.Structure):  # struct ggml_init_params
            _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))

        pointer, wide, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        native = rerank_server._native
        self._init = native("ggml_init", pointer, Parameters)
        self._free = native("ggml_free", None, pointer)
        self._tensor = native("ggml_new_tensor_3d", pointer, pointer, ctypes.c_int, wide, wide, wide)
        self._data = native("ggml_get_data", pointer, pointer)
        self._attention = native("ggml_flash_attn_ext", pointer, *[pointer] * 5, real, real, real)
        self._graph = native("ggml_new_graph", pointer, pointer)
        self._expand = native("ggml_build_forward_expand", None, pointer, pointer)
        self._device = native("ggml_backend_dev_by_name", pointer, ctypes.c_char_p)
        self._backend = native("ggml_backend_dev_init", pointer, pointer, ctypes.c_char_p)
        self._supports = native("ggml_backend_supports_op", ctypes.c_bool, pointer, pointer)
        self._compute = native("ggml_backend_graph_compute", ctypes.c_int, pointer, pointer)
        self._free_backend = native("ggml_backend_free", None, pointer)
        self._parameters = Parameters(256 << 20, None, False)

    def attention(self, q: Floats, k: Floats, v: Floats, mask: Floats, scale: float) -> Floats:
        """q [heads, tokens, d], k and v [kv heads, keys, d], mask [tokens, keys] -> [tokens, heads, d]."""
        context = self._init(self._parameters)
        tensors = []
        for values, kind in ((q, np.float32), (k, np.float16), (v, np.float16), (mask[None], np.float16)):
            array = np.ascontiguousarray(values, dtype=kind)
            tensor = self._tensor(context, 0 if kind == np.float32 else 1, *reversed(array.shape))
            ctypes.memmove(self._data(tensor), array.ctypes.data, array.nbytes)
            tensors.append(tensor)
        out = self._attention(context, *tensors, scale, 0.0, 0.0)
        graph = self._graph(context)
        self._expand(graph, out)
        backend = self._backend(self._device(b"int8"), None)
        assert self._supports(backend, out)
        assert self._compute(backend, graph) == 0
        self._free_backend(backend)
        shape = (q.shape[1], q.shape[0], v.shape[2])
        result = np.ctypeslib.as_array(
            ctypes.cast(self._data(out), ctypes.POINTER(ctypes.c_float)), (int(np.prod(shape)),)
        ).reshape(shape)  # fmt: skip
        copied: Floats = result.copy()
        self._free(context)
        return copied


def exact_attention(q: Floats, k: Floats, v: Floats, mask: Floats, scale: float) -> Exact:
    group = len(q) // len(k)
    wide_k, wide_v = (np.repeat(x.astype(np.float16).astype(np.float64), group, axis=0) for x in (k, v))
    scores = scale * q.astype(np.float64) @ wide_k.transpose(0, 2, 1) + mask.astype(np.float64)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = np.nan_to_num(weights) if np.isneginf(mask).all(axis=1).any() else weights
    sums = weights.sum(axis=-1, keepdims=True)
    return np.asarray((weights / np.where(sums == 0, 1, sums) @ wide_v).transpose(1, 0, 2))


def check_attention(library: ctypes.CDLL, q: Floats, k: Floats, v: Floats, mask: Floats, scale: float) -> Floats:
    """Against float64, with what rounding to bfloat16 can do at the most, and at random. Returns what was computed."""
    library.rerank_accel_configure(True, False, False)
    out = Graph().attention(q, k, v, mask, scale)
    exact = exact_attention(q, k, v, mask, scale)
    if library.rerank_accel_has_bf16():
        assert np.all(np.abs(out - exact) <= attention_bound(q, k, v, mask, scale))
        assert np.mean(np.abs(out - exact)) < ATTENTION_MEAN_ERROR
    else:
        np.testing.assert_allclose(out, exact, rtol=0, atol=2e-5)
    return out


def attention_bound(q: Floats, k: Floats, v: Floats, mask: Floats, scale: float) -> Exact:
    """Rounding moves each score by a part of its terms, so each weight by a factor; then weights
    and values are rounded."""
    terms = scale * np.abs(q) @ np.repeat(np.abs(k), len(q) // len(k), axis=0).transpose(0, 2, 1)
    shift = ((1 + BF16_ROUNDING) ** 2 - 1) * terms.max(axis=-1) + 1e-5
    factor = np.exp(2 * shift) * (1 + BF16_ROUNDING) ** 2 - 1
    return np.asarray(exact_attention(q, k, np.abs(v), mask, scale) * factor.T[:, :, None] + 1e-6)


def packed_mask(lengths: list[int]) -> Floats:
    """Each sequence sees itself alone."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    return np.where(owner[:, None] == owner[None, :], 0, -np.inf).astype(np.float32)


@needs_engine
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "lengths"),
    [
        (4, 4, 16, [5]), (2, 2, 32, [1, 1, 30, 64]), (3, 3, 64, [100, 7, 200]), (8, 1, 256, [70, 20]),
        (2, 1, 48, [24, 24]),
    ],
)
def test_attention_over_packed_pairs(
    library: ctypes.CDLL, heads: int, kv_heads: int, d: int, lengths: list[int]
) -> None:
    n = sum(lengths)
    q, k, v, mask = 4 * draw(heads, n, d), draw(kv_heads, n, d), draw(kv_heads, n, d)[::-1], packed_mask(lengths)
    check_attention(library, q, k, v, mask, d**-0.5)


@needs_engine
def test_attention_where_little_or_nothing_is_seen(library: ctypes.CDLL) -> None:
    """A causal mask over a longer cache, with a token that sees nothing: zeroes, as ggml gives."""
    q, k, v = draw(2, 50, 32), draw(2, 130, 32), draw(2, 130, 32)
    mask = np.where(np.arange(130)[None, :] <= np.arange(50)[:, None] + 20, 0, -np.inf).astype(np.float32)
    mask[:, 64:96] = -np.inf
    mask[17] = -np.inf
    assert np.all(check_attention(library, q, k, v, mask, 0.2)[17] == 0)


@needs_engine
def test_attention_where_what_is_seen_has_gaps(library: ctypes.CDLL) -> None:
    """Two sequences after a prefix that both see, as a shared query in gemma's cache, and a bias beside the hiding."""
    n_prefix, lengths = 21, (30, 45)
    q, k, v = draw(4, sum(lengths), 64), draw(1, 100, 64), draw(1, 100, 64)
    mask = np.full((sum(lengths), 100), -np.inf, dtype=np.float32)
    mask[:, :n_prefix] = 0
    for first, n in ((0, lengths[0]), (lengths[0], lengths[1])):
        for i in range(first, first + n):
            mask[i, n_prefix + first : n_prefix + i + 1] = 0
    check_attention(library, q, k, v, mask, 0.125)
    mask[3:50, :9] = -1.5
    check_attention(library, q, k, v, mask, 0.125)


@needs_engine
def test_attention_does_not_hide_what_is_no_number(library: ctypes.CDLL) -> None:
    q, k, v = draw(1, 8, 16), draw(1, 8, 16), draw(1, 8, 16)
    q[0, 3, 2] = np.nan
    library.rerank_accel_configure(True, False, False)
    out = Graph().attention(q, k, v, np.zeros((8, 8), dtype=np.float32), 0.25)
    assert np.all(np.isnan(out[3]))
    assert np.all(np.isfinite(np.delete(out, 3, axis=0)))


@needs_engine
@pytest.mark.skipif("ONEDNN_MAX_CPU_ISA" in os.environ, reason="this is such a run")
@pytest.mark.parametrize("isa", ["AVX2_VNNI", "AVX512_CORE_VNNI"])
def test_products_and_attention_on_lesser_cpus(library: ctypes.CDLL, isa: str) -> None:
    """oneDNN's kernels, float32 attention: what most desktop CPUs run, and nobody would test here."""
    tests = "products or attention or spoils or (models_score and (xlmr or gemma))"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", tests]
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rerank_server, "ACCEL_LIBRARY", ACCEL_LIBRARY)
    yield
    if library := rerank_server.load_accel(ACCEL_LIBRARY)[0]:
        library.rerank_accel_configure(False, False, True)


def score(file: Path, order: list[int], **settings: Any) -> Exact:
    """Logits of SCORED_PAIRS in this order, from an engine of its own."""
    base: dict[str, Any] = {"max_length": 8192, "ubatch": 512, "threads": 2}
    engine = rerank_server.load_engine(file, rerank_server.Settings(**{**base, **settings}))
    pairs = [SCORED_PAIRS[n] for n in order]
    logits = rerank_server.score_all(engine, [
        engine.pairs.make(pair.query, [pair.passage], rerank_server.Cut(pair.max_length))[0] for pair in pairs
    ])
    engine.close()
    return np.array(logits)


@needs_engine
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_score_as_the_reference_does(
    architecture: str, gguf_of: Gguf, library: ctypes.CDLL, with_engine: None
) -> None:
    file, everything = gguf_of(architecture), list(range(len(SCORED_PAIRS)))
    reference = score(file, everything, accel="off")
    fast = score(file, everything, accel="int8")
    tolerance = MODERNBERT_TOLERANCE if architecture == "modernbert" else TOLERANCE
    np.testing.assert_allclose(fast, reference, rtol=0, atol=tolerance * np.ptp(reference))
    assert np.any(fast != reference), "the engine was not used"
    if library.rerank_accel_has_bf16():
        bf16 = score(file, everything, accel="bf16")
        np.testing.assert_allclose(bf16, reference, rtol=0, atol=BF16_TOLERANCE * np.ptp(reference))
        assert np.mean(np.abs(bf16 - reference)) < np.mean(np.abs(fast - reference)) / 2


@needs_engine
def test_the_profile_times_together_what_the_engine_computes_together(gguf_of: Gguf, with_engine: None) -> None:
    """Timed alone, GELU looked like a sixth of the time, which it is not where the engine computes it."""
    costs, _ = profile.profile(gguf_of(ARCHITECTURES[0]), None, n_passages=2, n_runs=1, accel="int8")
    plain, _ = profile.profile(gguf_of(ARCHITECTURES[0]), None, n_passages=2, n_runs=1, accel="off")
    assert costs["MUL_MAT + ADD + GELU"].nodes == plain["GELU"].nodes
    assert "GELU" not in costs
    assert sum(cost.operations for cost in costs.values()) == sum(cost.operations for cost in plain.values())


@needs_engine
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_score_does_not_depend_on_its_company(architecture: str, gguf_of: Gguf, with_engine: None) -> None:
    order = [n for n in range(len(SCORED_PAIRS)) if (SCORED_PAIRS[n].max_length or 0) <= 1024]
    file = gguf_of(architecture)
    alone = np.concatenate([score(file, [n], accel="int8", max_length=1024) for n in order[:8]])
    shuffled = random.Random(3).sample(order, len(order))
    packed = dict(zip(shuffled, score(file, shuffled, accel="int8", max_length=1024), strict=True))
    spread = np.ptp(list(packed.values()))
    np.testing.assert_allclose([packed[n] for n in order[:8]], alone, rtol=0, atol=COMPANY_TOLERANCE * spread)


@needs_engine
def test_the_copied_weights_are_freed_with_the_model(gguf_of: Gguf, with_engine: None) -> None:
    engine = rerank_server.load_engine(gguf_of("xlmr"), rerank_server.Settings(accel="int8", max_length=256))
    assert rerank_server.accel_bytes() > 0
    engine.close()
    assert rerank_server.accel_bytes() == 0


@needs_engine
@pytest.mark.parametrize(("quantization", "mode"), [("F32", "bf16"), ("Q8_0", "bf16"), ("Q5_0", "int8")])
def test_auto_keeps_the_exactness_of_the_file(
    gguf_of: Gguf, library: ctypes.CDLL, with_engine: None, quantization: str, mode: str
) -> None:
    """Who made a file of 8 bits or more did so for its exactness: int8 would double Q8_0's drift."""
    engine = rerank_server.load_engine(gguf_of("xlmr", quantization), rerank_server.Settings(max_length=256))
    without_bf16 = {"F32": "llama.cpp, F32"}.get(quantization, "int8 engine")
    assert engine.arithmetic == (f"{mode} engine" if library.rerank_accel_has_bf16() else without_bf16)
    engine.close()


@needs_engine
def test_auto_leaves_it_where_memory_is_short(
    gguf_of: Gguf, with_engine: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rerank_server, "available_bytes", lambda: 150e6)
    engine = rerank_server.load_engine(gguf_of("xlmr"), rerank_server.Settings(max_length=256))
    assert rerank_server.accel_bytes() == 0
    assert "150 MB are free" in caplog.text
    engine.close()


# -- the server -------------------------------------------------------------------------------------------------------


@needs_engine
def test_the_server_says_that_it_is_used(gguf_of: Gguf) -> None:
    server = ServerProcess("--m3", gguf_of("xlmr"), "--accel", "int8")
    try:
        assert server.rerank(query="q", passages=["a", "b"])[0] == 200
        accel = server.health()["accel"]
        assert accel["used"]
        assert accel["bytes"] > 0
    finally:
        server.stop()


def test_a_library_that_is_missing_or_does_not_fit_is_refused_in_a_line(tmp_path: Path) -> None:
    assert rerank_server.load_accel(tmp_path / "absent.so")[0] is None
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    loaded, reason = rerank_server.load_accel(broken)
    assert loaded is None
    assert "make accel" in reason


@pytest.mark.skipif(shutil.which("cc") is None, reason="a C compiler is needed")
def test_a_library_for_another_version_is_refused_before_ggml_sees_it(tmp_path: Path) -> None:
    """Its structures may have other members; ggml would read past them."""
    source, file = tmp_path / "other.c", tmp_path / "other.so"
    names = ["is_fast_here", "has_bf16", "copied_bytes", "configure"]
    stubs = "".join(f"int rerank_accel_{name}(void) {{ return 1; }}\n" for name in names)
    source.write_text('const char *rerank_accel_built_for(void) { return "0.0.1"; }\n' + stubs)
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(file)], check=True)
    loaded, reason = rerank_server.load_accel(file)
    assert loaded is None
    assert "built for llama-cpp-python 0.0.1" in reason


def test_asking_for_what_is_not_there_ends_the_start(tmp_path: Path) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import pathlib, rerank_server as server; "
        "server.ACCEL_LIBRARY = pathlib.Path('absent.so'); sys.exit(server.main(['--accel', 'int8']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--accel int8: not built: make accel" in done.stderr
    assert "Traceback" not in done.stderr
