"""A small network with every op and feature, and packed weights for it in any format."""

from __future__ import annotations

from collections.abc import Mapping

import gguf
import numpy as np

from tokenmill import _native
from tokenmill.backends.backend import Float32, PackedMatrix
from tokenmill.program.ops import Activation, RopeStyle, Value, WeightFormat
from tokenmill.program.program import Program
from tokenmill.program.recorder import Recorder, Rotation

VOCABULARY = 101
WIDTH, HEADS, KV_HEADS, HEAD_DIM, INNER = 256, 8, 2, 32, 512

F32 = dict.fromkeys(["token_embedding", "q", "k", "v", "o", "gate", "up", "down"], WeightFormat.F32)
# Matrices that share an input want different int8 groups, fp32 or both.
MIXED = {
    "token_embedding": WeightFormat.Q8_0,
    "q": WeightFormat.Q4_K,
    "k": WeightFormat.Q6_K,
    "v": WeightFormat.Q5_0,
    "o": WeightFormat.Q8_0,
    "gate": WeightFormat.Q4_0,
    "up": WeightFormat.F16,
    "down": WeightFormat.Q6_K,
}
SIXTEEN_BIT = {**F32, "q": WeightFormat.BF16, "k": WeightFormat.F16, "down": WeightFormat.BF16}


def layer(r: Recorder, x: Value, index: int) -> Value:
    """Even layers look far, rotate halves and bound their scores; odd ones use a window and rotate neighbours."""
    even = index % 2 == 0
    rotation = (
        Rotation(tuple(10000.0 ** (-i / 16) for i in range(16)), RopeStyle.HALF)
        if even
        else Rotation(tuple(500.0 ** (-i / 12) for i in range(12)), RopeStyle.INTERLEAVED, magnitude=1.1)
    )
    with r.scope(f"layers.{index}"):
        h = r.rms_norm(x, "attention_norm", eps=1e-5, out="attention.in")
        q = r.linear(h, "attention.q", HEADS * HEAD_DIM, bias=True)
        k = r.linear(h, "attention.k", KV_HEADS * HEAD_DIM)
        v = r.linear(h, "attention.v", KV_HEADS * HEAD_DIM, bias=True)
        if even:
            q = r.rms_norm(
                q, "attention.q_norm", eps=1e-6, group_width=HEAD_DIM, weight_offset=1.0, out="attention.q.normed"
            )
        q = r.rope(q, rotation, heads=HEADS, out="attention.q.rotated")
        k = r.rope(k, rotation, heads=KV_HEADS, out="attention.k.rotated")
        h = r.attention(
            q,
            k,
            v,
            heads=HEADS,
            kv_heads=KV_HEADS,
            scale=0.2,
            softcap=8.0 if even else None,
            window=None if even else 90,
            out="attention.o.in",
        )
        h = r.linear(h, "attention.o", WIDTH)
        if not even:
            h = r.rms_norm(h, "post_attention_norm", eps=1e-5, out="attention.normed")
        x = r.add(x, h, out="attention.residual")
        h = r.rms_norm(x, "mlp_norm", eps=1e-5, out="mlp.in")
        gate, up = r.linear(h, "mlp.gate", INNER), r.linear(h, "mlp.up", INNER)
        activation = (Activation.SILU, Activation.GELU_TANH, Activation.GELU)[index % 3]
        h = r.gated(gate, up, activation, out="mlp.down.in")
        return r.add(x, r.linear(h, "mlp.down", WIDTH), out="residual")


def network(layers: int = 3) -> Program:
    r = Recorder(VOCABULARY)
    x = r.embed("token_embedding", WIDTH, scale=1.5)
    for index in range(layers):
        x = layer(r, x, index)
    x = r.gather_sampled(x, out="sampled")
    x = r.rms_norm(x, "output_norm", eps=1e-5, out="hidden")
    logits = r.linear(x, "token_embedding", VOCABULARY, out="logits.raw")
    r.softcap(logits, 20.0, out="logits")
    return r.program()


_GGUF_TYPES = {
    format: gguf.GGMLQuantizationType[format.name] for format in WeightFormat if format is not WeightFormat.IQ4_NL
}


def source_rows(format: WeightFormat, n: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of a checkpoint, uint8 ``[n, bytes]``, whose values have a deviation of about k^-0.5."""
    values = (rng.standard_normal((n, k)) * k**-0.5).astype(np.float32)
    if format in (WeightFormat.Q4_K, WeightFormat.Q6_K):
        # gguf cannot quantize to these: random codes under small scales.
        size = {WeightFormat.Q4_K: 144, WeightFormat.Q6_K: 210}[format]
        blocks = rng.integers(0, 256, (n, k // 256, size), dtype=np.uint8)
        scale = {WeightFormat.Q4_K: 1e-3, WeightFormat.Q6_K: 4e-5}[format]
        small = (scale * rng.uniform(0.5, 1.5, (n, k // 256, 2))).astype(np.float16)
        if format is WeightFormat.Q4_K:
            blocks[..., :4] = small.view(np.uint8)
        else:
            blocks[..., 208:] = small[..., :1].copy().view(np.uint8)
        return blocks.reshape(n, -1)
    if format is WeightFormat.F32:
        return values.view(np.uint8)
    if format is WeightFormat.F16:
        return values.astype(np.float16).view(np.uint8)
    return np.ascontiguousarray(gguf.quants.quantize(values, _GGUF_TYPES[format])).view(np.uint8).reshape(n, -1)


class PackedWeights:
    """Random weights of a program: packed for the native backend, decoded by the gguf package for the oracle."""

    def __init__(self, program: Program, formats: Mapping[str, WeightFormat], seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.formats = {name: formats[name.rsplit(".", 1)[-1]] for name in program.matrices()}
        self.vectors = {
            name: (rng.standard_normal(program.weights[name]) * 0.3 + (0 if name.endswith("bias") else 1)).astype(
                np.float32
            )
            for name in program.vectors()
        }
        self._sources = {
            name: source_rows(self.formats[name], *program.weights[name], rng) for name in program.matrices()
        }
        self._shapes = {name: program.weights[name] for name in program.matrices()}

    def matrix(self, name: str) -> PackedMatrix:
        (n, k), format = self._shapes[name], self.formats[name]
        size = _native.packed_bytes(format, n, k)
        memory = np.zeros(size + 64, np.uint8)
        data = memory[-memory.ctypes.data % 64 :][:size]
        _native.pack_matrix(format, self._sources[name].reshape(-1), n, k, data, 1)
        return PackedMatrix(name, format, n, k, data)

    def vector(self, name: str) -> Float32:
        return self.vectors[name]

    def decoded(self, name: str) -> Float32:
        source, format = self._sources[name], self.formats[name]
        if format is WeightFormat.F32:
            return source.view(np.float32)
        return gguf.quants.dequantize(source, _GGUF_TYPES[format]).reshape(self._shapes[name])

    def close(self) -> None:
        self._sources.clear()
