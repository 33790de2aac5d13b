"""Rows of weights in GGUF block layout, random and adversarial, for the kernel tests."""

from __future__ import annotations

import gguf
import numpy as np
from numpy.typing import NDArray

from tokenmill.program.ops import WeightFormat

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]

ELEMENT_FORMATS = (WeightFormat.F32, WeightFormat.F16, WeightFormat.BF16)
GROUP_FORMATS = tuple(f for f in WeightFormat if WeightFormat.Q4_0 <= f <= WeightFormat.IQ4_NL)
SUPER_BLOCK_FORMATS = tuple(f for f in WeightFormat if f >= WeightFormat.Q2_K)
QUANTIZED_FORMATS = GROUP_FORMATS + SUPER_BLOCK_FORMATS

# Byte offsets of the fp16 fields inside one block.
_HALVES = {
    WeightFormat.Q4_0: (0,),
    WeightFormat.Q4_1: (0, 2),
    WeightFormat.Q5_0: (0,),
    WeightFormat.Q5_1: (0, 2),
    WeightFormat.Q8_0: (0,),
    WeightFormat.IQ4_NL: (0,),
    WeightFormat.Q2_K: (80, 82),
    WeightFormat.Q3_K: (108,),
    WeightFormat.Q4_K: (0, 2),
    WeightFormat.Q5_K: (0, 2),
    WeightFormat.Q6_K: (208,),
}

# Values for the fp16 fields that break careless arithmetic: zeros, subnormals, the extremes, negative scales.
ADVERSARIAL_HALVES = np.array([0.0, -0.0, 6e-8, -6e-8, 6.0e-5, 65504.0, -65504.0, 1.0, -0.37], np.float16)


def ggml_type(weight_format: WeightFormat) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[weight_format.name]


def block_size(weight_format: WeightFormat) -> tuple[int, int]:
    """(columns, bytes) of one block."""
    columns, size = gguf.GGML_QUANT_SIZES[ggml_type(weight_format)]
    return columns, size


def random_rows(weight_format: WeightFormat, n: int, k: int, seed: int = 0) -> U8:
    """``[n, bytes of a row]``: all code bits random, scales near 0.01."""
    rng = np.random.default_rng([seed, weight_format, n, k])
    if weight_format in ELEMENT_FORMATS:
        values = rng.standard_normal((n, k)).astype(np.float32)
        if weight_format == WeightFormat.BF16:
            return np.ascontiguousarray((values.view(np.uint32) >> 16).astype(np.uint16)).view(np.uint8).reshape(n, -1)
        kept = values if weight_format == WeightFormat.F32 else values.astype(np.float16)
        return kept.view(np.uint8).reshape(n, -1)
    columns, size = block_size(weight_format)
    raw = rng.integers(0, 256, (n, k // columns, size), dtype=np.uint8)
    for at in _HALVES[weight_format]:
        halves = (rng.standard_normal((n, k // columns, 1)) * 0.01).astype(np.float16)
        raw[..., at : at + 2] = halves.view(np.uint8)
    return raw.reshape(n, -1)


def adversarial_rows(weight_format: WeightFormat, k: int) -> U8:
    """Rows that combine every adversarial scale with all-zero, all-one and random code bits (quantized formats)."""
    columns, size = block_size(weight_format)
    fields = _HALVES[weight_format]
    halves = np.stack(np.meshgrid(*[ADVERSARIAL_HALVES] * len(fields)), -1).reshape(-1, len(fields))
    rng = np.random.default_rng(int(weight_format))
    rows = []
    for values in halves:
        for fill in (0, 255, None):
            row = rng.integers(0, 256, (k // columns, size), dtype=np.uint8)
            if fill is not None:
                row[:] = fill
            for at, value in zip(fields, values, strict=True):
                row[:, at : at + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
            rows.append(row.reshape(-1))
    return np.stack(rows)


def reference_decode(weight_format: WeightFormat, rows: U8) -> F32:
    """The reference decoding of the ``gguf`` package, ``[n, k]``."""
    decoded = gguf.dequantize(rows.copy(), ggml_type(weight_format))
    return np.asarray(decoded, np.float32).reshape(rows.shape[0], -1)
