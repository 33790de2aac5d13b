"""Two references for attention: the textbook in fp64, and the rules of the numerics contract in fp32, bit by bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from attention_harness import Sequence, Shape

from tokenmill.program.kv import KvElement

SPAN = 256
LOG2E = 1.4426950408889634074


def stored(x: np.ndarray, element: KvElement) -> np.ndarray:
    """What the cache holds after the one rounding on write, as fp32."""
    if element is KvElement.F16:
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)
    return x.astype(ml_dtypes.bfloat16).astype(np.float32) if element is KvElement.BF16 else x


def _heads(shape: Shape, sequence: Sequence) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    q = sequence.q.reshape(len(sequence), shape.heads, shape.head_dim)
    k = stored(sequence.k, shape.element).reshape(len(sequence), shape.kv_heads, shape.head_dim)
    v = stored(sequence.v, shape.element).reshape(len(sequence), shape.kv_heads, shape.head_dim)
    group = shape.heads // shape.kv_heads
    return q, np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)


def textbook(shape: Shape, sequence: Sequence) -> np.ndarray:
    """softmax(scale q k^T) v in fp64 on the stored keys and values: ``[slots, heads * head_dim]``."""
    q, k, v = (x.astype(np.float64) for x in _heads(shape, sequence))
    scores = np.einsum("phd,thd->hpt", q, k) * shape.scale
    if shape.softcap is not None:
        scores = shape.softcap * np.tanh(scores / shape.softcap)
    slots = np.arange(len(sequence))
    visible = slots[None, :] <= slots[:, None]
    if shape.window is not None:
        visible &= slots[None, :] > slots[:, None] - shape.window
    scores = np.where(visible, scores, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return np.einsum("hpt,thd->phd", p, v).reshape(len(sequence), -1)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Fused multiply-add of fp32 arrays, correctly rounded.

    The product is exact in fp64. The sum is rounded to odd there, which makes the second rounding harmless (Boldo and
    Melquiond, "Emulation of a FMA and correctly rounded sums", 2008).
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = np.broadcast_to(c, product.shape).astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    even = (total.view(np.int64) & 1) == 0
    towards = np.where(error > 0, np.inf, -np.inf)
    odd = np.where((error != 0) & even & np.isfinite(total), np.nextafter(total, towards), total)
    return odd.astype(np.float32)


def exp2(x: np.ndarray) -> np.ndarray:
    """The one exp2 of the contract: round to n, Horner of degree 6 in fma, 0 below -126."""
    x = np.asarray(x, np.float32)
    bounded = np.clip(x, np.float32(-127), np.float32(128))
    n = np.round(bounded)
    f = bounded - n
    p = np.full_like(x, 1.5403530393381608e-4)
    for c in (
        1.3333558146428443e-3,
        9.6181291076284772e-3,
        5.5504108664821580e-2,
        2.4022650695910072e-1,
        6.9314718055994531e-1,
        1.0,
    ):
        p = fma(p, f, np.float32(c))
    return np.where(x < -126, np.float32(0), np.ldexp(p, n.astype(np.int32))).astype(np.float32)


def _lane_sum(p: np.ndarray) -> np.float32:
    """Sixteen lanes by position, then halves."""
    lanes = np.zeros(16, np.float32)
    for vector in p.reshape(-1, 16):
        lanes = lanes + vector
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = lanes[:half] + lanes[half:]
    return lanes[0]


def row_by_rules(shape: Shape, sequence: Sequence, slot: int, *, running_maximum: bool = False) -> np.ndarray:
    """The output row of one token after NUMERICS N7; no soft-capping.

    ``running_maximum`` is the mutation that N12 demands: P relative to the maximum so far instead of the span's own.
    """
    q, k, v = _heads(shape, sequence)
    scaled = q[slot] * np.float32(shape.scale * LOG2E)
    first = 0 if shape.window is None else max(0, slot - shape.window + 1)
    heads, dims = scaled.shape
    best = np.full(heads, -np.inf, np.float32)
    total = np.zeros(heads, np.float32)
    out = np.zeros((heads, dims), np.float32)
    for span in range(first // SPAN, slot // SPAN + 1):
        begin, end = max(first, span * SPAN), min(slot + 1, (span + 1) * SPAN)
        scores = np.zeros((heads, end - begin), np.float32)
        for d in range(dims):
            scores = fma(scaled[:, d : d + 1], k[begin:end, :, d].T, scores)
        maximum = scores.max(axis=1)
        if running_maximum:
            maximum = np.maximum(maximum, best)
        p = np.zeros((heads, SPAN), np.float32)
        p[:, begin % SPAN : begin % SPAN + end - begin] = exp2(scores - maximum[:, None])
        sums = np.array([_lane_sum(row) for row in p])
        span_out = np.zeros((heads, dims), np.float32)
        for t in range(begin, end):
            span_out = fma(p[:, t % SPAN, None], v[t], span_out)
        merged = np.maximum(best, maximum)
        with np.errstate(invalid="ignore"):
            old, new = exp2(best - merged), exp2(maximum - merged)
        out = fma(span_out, new[:, None], out * old[:, None])
        total = fma(sums, new, total * old)
        best = merged
    return (out / total[:, None]).reshape(-1)
