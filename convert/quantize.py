"""Quantises an F16 GGUF with llama.cpp's own llama_model_quantize, in a process of its own (`python -m
convert.quantize`): an abort inside llama.cpp, or the kernel's out-of-memory killer, cannot take the conversion down.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from .errors import CannotStartError, ConvertError
from .gguf_file import GgufFile
from .models import ROOT
from .progress import Progress

MAX_BUFFER_BYTES = 128 << 20  # tensor rows that llama.cpp holds at once; its default is 8 GiB


@dataclass(frozen=True)
class Quantization:
    """ftype: llama.h, enum llama_ftype. bits: per weight, rounded up, to estimate the file. block: weights that share
    a scale; rows that are no multiple of it get another type. drift_limit: see verify.py."""

    name: str
    ftype: int
    bits: float
    block: int
    drift_limit: float


# What verify.py calls drift: mean |logit - F16 logit| over the built-in pairs, divided by the standard deviation of the
# F16 logits. Measured on two 384-wide MiniLM models, which lose more than larger ones: F32 0.001, BF16 0.006, 8 bits
# 0.020, 6 bits 0.052, 5 bits 0.112, 4 bits 0.07 to 0.15 (and 0.33, refused: Q4_0 of a cross-encoder, tau 0.80), 3 bits
# 0.28. A broken file measures 0.26 (query and key of one of six layers swapped) to 2.2 (every norm off by one).
FULL, BRAIN, EIGHT_BIT, SIX_BIT, FIVE_BIT, FOUR_BIT, THREE_BIT, TWO_BIT = 0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.4, 0.5

QUANTIZATIONS = {
    quantization.name: quantization
    for quantization in (
        Quantization("F32", 0, 32, 1, FULL),
        Quantization("F16", 1, 16, 1, FULL),
        Quantization("BF16", 32, 16, 1, BRAIN),
        Quantization("Q8_0", 7, 8.5, 32, EIGHT_BIT),
        Quantization("Q6_K", 18, 6.6, 256, SIX_BIT),
        Quantization("Q5_0", 8, 5.6, 32, FIVE_BIT),
        Quantization("Q5_1", 9, 6.1, 32, FIVE_BIT),
        Quantization("Q5_K_S", 16, 5.6, 256, FIVE_BIT),
        Quantization("Q5_K_M", 17, 5.8, 256, FIVE_BIT),
        Quantization("Q4_0", 2, 4.6, 32, FOUR_BIT),
        Quantization("Q4_1", 3, 5.1, 32, FOUR_BIT),
        Quantization("Q4_K_S", 14, 4.7, 256, FOUR_BIT),
        Quantization("Q4_K_M", 15, 5.0, 256, FOUR_BIT),
        Quantization("IQ4_NL", 25, 4.6, 32, FOUR_BIT),
        Quantization("IQ4_XS", 30, 4.4, 256, FOUR_BIT),
        Quantization("Q3_K_S", 11, 3.6, 256, THREE_BIT),
        Quantization("Q3_K_M", 12, 4.0, 256, THREE_BIT),
        Quantization("Q3_K_L", 13, 4.3, 256, THREE_BIT),
        Quantization("IQ3_S", 26, 3.6, 256, THREE_BIT),
        Quantization("IQ3_M", 27, 3.8, 256, THREE_BIT),
        Quantization("Q2_K", 10, 3.4, 256, TWO_BIT),
    )
}

_IMATRIX = "llama.cpp makes it only with an importance matrix, which needs calibration texts"
_TRAINED = "it is for models trained with such weights; any other model becomes noise"
REFUSED = {
    **dict.fromkeys(
        ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"), _IMATRIX
    ),
    **dict.fromkeys(("TQ1_0", "TQ2_0", "Q1_0", "Q2_0"), _TRAINED),
    "MXFP4_MOE": "it is for mixtures of experts",
    "NVFP4": "llama.cpp cannot make it from other weights",
}


def find_quantization(name: str) -> Quantization:
    """Raises CannotStartError that says why a type is refused, or which there are."""
    found = QUANTIZATIONS.get(name.upper())
    if found:
        return found
    if name.upper() in REFUSED:
        raise CannotStartError(f"--quant {name}: not offered, because {REFUSED[name.upper()]}")
    raise CannotStartError(f"--quant {name}: not a type of llama.cpp; there are {' '.join(QUANTIZATIONS)}")


def quantize(base: Path, output: Path, quantization: Quantization) -> str:
    """Writes output from the F16 file base. Returns a note on the types that tensors got instead, or "".

    Raises ConvertError with llama.cpp's last words. Memory: MAX_BUFFER_BYTES and the mapped pages of one tensor.
    """
    command = [sys.executable, "-m", "convert.quantize", str(base.resolve()), str(output.resolve()), quantization.name]
    last, total = "", len(GgufFile.open(base).tensors)
    with (
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child,
        Progress(f"quantising {quantization.name}", total, unit=" tensors") as done,
    ):
        assert child.stderr is not None
        try:
            for raw in child.stderr:
                line = raw.decode("utf-8", "replace").strip()
                last = line or last
                done(bool(re.match(r"\[\s*\d+/\s*\d+\]", line)))
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        reason = re.sub(r"^\w+: ", "", last) if child.returncode == 1 else f"its process ended with {child.returncode}"
        raise ConvertError(f"{output.name}: llama.cpp could not quantise to {quantization.name} ({reason[:200]})")
    file = GgufFile.open(output)
    file.seal()
    return fallback_note(file, quantization)


def fallback_note(file: GgufFile, quantization: Quantization) -> str:
    """llama.cpp gives another type to a matrix whose rows are no multiple of the block; that must not go unnoticed."""
    narrow = Counter(
        tensor.type.name
        for tensor in file.tensors.values()
        if len(tensor.shape) > 1 and tensor.shape[-1] % quantization.block and tensor.type.name not in ("F32", "F16")
    )
    if not narrow:
        return ""
    types = ", ".join(f"{count} as {name}" for name, count in sorted(narrow.items()))
    return f"rows that are no multiple of {quantization.block} fall back to another type: {types}"


def main(arguments: list[str]) -> int:
    """The child: BASE OUTPUT TYPE. llama.cpp's log goes to standard error."""
    import llama_cpp

    base, output, name = arguments

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def write_log(level: int, text: bytes, user_data: object) -> None:
        sys.stderr.buffer.write(text)
        sys.stderr.buffer.flush()

    llama_cpp.llama_log_set(write_log, ctypes.c_void_p(0))
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = QUANTIZATIONS[name].ftype
    parameters.max_buf_size = MAX_BUFFER_BYTES
    overrides = (llama_cpp.llama_model_kv_override * 2)()  # the second, empty one ends the list
    overrides[0].tag, overrides[0].key = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, b"rerank.quantization"
    overrides[0].value.val_str = name.encode()
    parameters.kv_overrides = overrides
    status = llama_cpp.llama_model_quantize(base.encode(), output.encode(), ctypes.byref(parameters))
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
