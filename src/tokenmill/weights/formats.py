"""Tensor types of checkpoints, and the exact meaning of their bytes.

:class:`TensorType` names every element and block format that GGUF defines, with its size; :func:`decode_blocks`
gives the fp32 values of those that are supported. Decoding is the definition that packed weights and kernels are
tested against: fp32 arithmetic in the order of ggml's reference (``dequantize_row_*``), equal to it bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tokenmill.program.ops import WeightFormat

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Blocks = np.ndarray[Any, np.dtype[np.void]]


class TensorType(IntEnum):
    """Tensor types by their GGUF number. ``block_size`` values take ``block_bytes`` bytes."""

    if TYPE_CHECKING:
        block_size: int
        block_bytes: int

    def __new__(cls, number: int, block_size: int, block_bytes: int) -> TensorType:
        member = int.__new__(cls, number)
        member._value_ = number
        member.block_size = block_size
        member.block_bytes = block_bytes
        return member

    F32 = 0, 1, 4
    F16 = 1, 1, 2
    Q4_0 = 2, 32, 18
    Q4_1 = 3, 32, 20
    Q5_0 = 6, 32, 22
    Q5_1 = 7, 32, 24
    Q8_0 = 8, 32, 34
    Q8_1 = 9, 32, 36
    Q2_K = 10, 256, 84
    Q3_K = 11, 256, 110
    Q4_K = 12, 256, 144
    Q5_K = 13, 256, 176
    Q6_K = 14, 256, 210
    Q8_K = 15, 256, 292
    IQ2_XXS = 16, 256, 66
    IQ2_XS = 17, 256, 74
    IQ3_XXS = 18, 256, 98
    IQ1_S = 19, 256, 50
    IQ4_NL = 20, 32, 18
    IQ3_S = 21, 256, 110
    IQ2_S = 22, 256, 82
    IQ4_XS = 23, 256, 136
    I8 = 24, 1, 1
    I16 = 25, 1, 2
    I32 = 26, 1, 4
    I64 = 27, 1, 8
    F64 = 28, 1, 8
    IQ1_M = 29, 256, 56
    BF16 = 30, 1, 2
    TQ1_0 = 34, 256, 54
    TQ2_0 = 35, 256, 66
    MXFP4 = 39, 32, 17

    @property
    def weight_format(self) -> WeightFormat | None:
        """The packed format that holds exactly this type's information; None if the type is not supported."""
        return WeightFormat[self.name] if self.name in WeightFormat.__members__ else None

    @property
    def supported(self) -> bool:
        """Whether tensors of this type can be decoded and run."""
        return self.weight_format is not None

    def row_bytes(self, width: int) -> int:
        """Bytes of ``width`` consecutive values. Raises ValueError if ``width`` is not a whole number of blocks."""
        if width % self.block_size:
            raise ValueError(f"{width} values are not a whole number of {self.name} blocks of {self.block_size}")
        return width // self.block_size * self.block_bytes


SUPPORTED_TYPES: tuple[TensorType, ...] = tuple(t for t in TensorType if t.supported)


def decode_blocks(tensor_type: TensorType, data: UInt8) -> Float32:
    """The fp32 values of ``data``, a flat array of whole blocks: ``[bytes] -> [bytes / block_bytes * block_size]``.

    Working memory is about three times the result, so callers decode long tensors in parts. Raises ValueError for an
    unsupported type or a partial block.
    """
    if not tensor_type.supported:
        raise ValueError(f"tensor type {tensor_type.name} cannot be decoded")
    if data.size % tensor_type.block_bytes:
        raise ValueError(f"{data.size} bytes are not a whole number of {tensor_type.name} blocks")
    data = np.ascontiguousarray(data)
    # Corrupt scales may be infinite or NaN; the values then are what IEEE arithmetic makes of them, without warnings.
    with np.errstate(over="ignore", invalid="ignore"):
        if tensor_type in _PLAIN:
            return _PLAIN[tensor_type](data)
        layout, decode = _QUANTIZED[tensor_type]
        return decode(data.view(layout)).reshape(-1)


# ---- plain elements ------------------------------------------------------------------------------------------------


def _decode_f32(data: UInt8) -> Float32:
    return data.view("<f4").astype(np.float32)


def _decode_f16(data: UInt8) -> Float32:
    return data.view("<f2").astype(np.float32)


def _decode_bf16(data: UInt8) -> Float32:
    return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)


_PLAIN: dict[TensorType, Callable[[UInt8], Float32]] = {
    TensorType.F32: _decode_f32,
    TensorType.F16: _decode_f16,
    TensorType.BF16: _decode_bf16,
}


# ---- blocks of 32: one scale, perhaps a minimum --------------------------------------------------------------------
#
# Codes of 4 bits lie as 16 bytes: value j in the low half of byte j, value j + 16 in the high half. The fifth bit of
# value j is bit j of `high`.


def _layout(*fields: tuple[str, str] | tuple[str, str, int]) -> np.dtype[np.void]:
    return np.dtype([f if len(f) == 2 else (f[0], f[1], (f[2],)) for f in fields])


def _scale(blocks: Blocks, field: str) -> Float32:
    """``[blocks, 1]``."""
    scale: Float32 = blocks[field].astype(np.float32)[:, None]
    return scale


def _low_bits(codes: UInt8, bits: int, run: int) -> UInt8:
    """Unpacks codes of ``bits`` bits: within a run of ``run`` bytes, first all lowest parts, then the next ones.

    ``[blocks, bytes] -> [blocks, bytes * 8 / bits]``.
    """
    parts = codes.reshape(len(codes), -1, 1, run) >> np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    unpacked: UInt8 = parts & np.uint8((1 << bits) - 1)
    return unpacked.reshape(len(codes), codes.shape[1] * 8 // bits)


def _bit_plane(high: UInt8) -> UInt8:
    """Bit j of each block's little-endian bit field: ``[blocks, bytes] -> [blocks, 8 * bytes]``."""
    return np.unpackbits(high, axis=1, bitorder="little")


def _decode_q4_0(blocks: Blocks) -> Float32:
    codes = _low_bits(blocks["codes"], 4, 16).astype(np.float32)
    return _scale(blocks, "d") * (codes - np.float32(8))


def _decode_q4_1(blocks: Blocks) -> Float32:
    codes = _low_bits(blocks["codes"], 4, 16).astype(np.float32)
    return _scale(blocks, "d") * codes + _scale(blocks, "m")


def _five_bit_codes(blocks: Blocks) -> Float32:
    return (_low_bits(blocks["codes"], 4, 16) | _bit_plane(blocks["high"]) << 4).astype(np.float32)


def _decode_q5_0(blocks: Blocks) -> Float32:
    return _scale(blocks, "d") * (_five_bit_codes(blocks) - np.float32(16))


def _decode_q5_1(blocks: Blocks) -> Float32:
    return _scale(blocks, "d") * _five_bit_codes(blocks) + _scale(blocks, "m")


def _decode_q8_0(blocks: Blocks) -> Float32:
    return _scale(blocks, "d") * blocks["codes"].astype(np.float32)


IQ4_NL_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.int8)
"""The codebook of IQ4_NL: a code selects one of these, times the block's scale."""


def _decode_iq4_nl(blocks: Blocks) -> Float32:
    values = IQ4_NL_VALUES.astype(np.float32)[_low_bits(blocks["codes"], 4, 16)]
    return _scale(blocks, "d") * values


# ---- super-blocks of 256: groups of 16 or 32 whose scales are codes themselves ---------------------------------------


def _grouped(per_group: Float32, codes: Float32) -> Float32:
    """Multiplies each group's codes by its scale: ``[blocks, groups], [blocks, 256] -> [blocks, groups, size]``."""
    return per_group[:, :, None] * codes.reshape(*per_group.shape, -1)


def _decode_q2_k(blocks: Blocks) -> Float32:
    scales = _scale(blocks, "d") * (blocks["scales"] & 0x0F).astype(np.float32)
    minimums = _scale(blocks, "dmin") * (blocks["scales"] >> 4).astype(np.float32)
    codes = _low_bits(blocks["codes"], 2, 32).astype(np.float32)
    return _grouped(scales, codes) - minimums[:, :, None]


def _decode_q3_k(blocks: Blocks) -> Float32:
    # 16 scales of 6 bits, offset 32: low nibbles in bytes 0-7, the upper two bits in bytes 8-11.
    packed = blocks["scales"]
    six_bits = _low_bits(packed[:, :8], 4, 8) | _low_bits(packed[:, 8:], 2, 4) << 4
    scales = _scale(blocks, "d") * (six_bits.astype(np.float32) - np.float32(32))
    # A third bit, inverted: where it is clear, 4 is subtracted. Plane i of the 32 bytes belongs to values 32 i ..
    clear = _low_bits(blocks["high"], 1, 32) ^ 1
    codes = _low_bits(blocks["codes"], 2, 32).astype(np.float32) - (clear << 2).astype(np.float32)
    return _grouped(scales, codes)


def _six_bit_scales_and_minimums(packed: UInt8) -> tuple[Float32, Float32]:
    """8 scales and 8 minimums of 6 bits in 12 bytes, as Q4_K and Q5_K hold them: ``[blocks, 12] -> 2 x [blocks, 8]``.

    Bytes 0-3 hold scales 0-3 and bytes 4-7 minimums 0-3 in their low 6 bits; bytes 8-11 hold scales 4-7 (low nibbles)
    and minimums 4-7 (high nibbles), whose upper two bits are the top bits of bytes 0-3 and 4-7.
    """
    first, second, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 0x3F, rest & 0x0F | first >> 6 << 4], axis=1)
    minimums = np.concatenate([second & 0x3F, rest >> 4 | second >> 6 << 4], axis=1)
    return scales.astype(np.float32), minimums.astype(np.float32)


def _with_minimums(blocks: Blocks, codes: UInt8) -> Float32:
    scales, minimums = _six_bit_scales_and_minimums(blocks["scales"])
    products = _grouped(_scale(blocks, "d") * scales, codes.astype(np.float32))
    return products - (_scale(blocks, "dmin") * minimums)[:, :, None]


def _decode_q4_k(blocks: Blocks) -> Float32:
    return _with_minimums(blocks, _low_bits(blocks["codes"], 4, 32))


def _decode_q5_k(blocks: Blocks) -> Float32:
    # Plane i of `high` (bit i of each of its 32 bytes) is the fifth bit of values 32 i .. 32 i + 31.
    high: UInt8 = _low_bits(blocks["high"], 1, 32) << np.uint8(4)
    return _with_minimums(blocks, _low_bits(blocks["codes"], 4, 32) | high)


def _decode_q6_k(blocks: Blocks) -> Float32:
    # Two halves of 128 values: 64 bytes of low nibbles and 32 bytes of upper bit pairs each.
    codes = _low_bits(blocks["low"], 4, 64) | _low_bits(blocks["high"], 2, 32) << 4
    scales = _scale(blocks, "d") * blocks["scales"].astype(np.float32)
    return _grouped(scales, codes.astype(np.float32) - np.float32(32))


_QUANTIZED: dict[TensorType, tuple[np.dtype[np.void], Callable[[Blocks], Float32]]] = {
    TensorType.Q4_0: (_layout(("d", "<f2"), ("codes", "u1", 16)), _decode_q4_0),
    TensorType.Q4_1: (_layout(("d", "<f2"), ("m", "<f2"), ("codes", "u1", 16)), _decode_q4_1),
    TensorType.Q5_0: (_layout(("d", "<f2"), ("high", "u1", 4), ("codes", "u1", 16)), _decode_q5_0),
    TensorType.Q5_1: (_layout(("d", "<f2"), ("m", "<f2"), ("high", "u1", 4), ("codes", "u1", 16)), _decode_q5_1),
    TensorType.Q8_0: (_layout(("d", "<f2"), ("codes", "i1", 32)), _decode_q8_0),
    TensorType.IQ4_NL: (_layout(("d", "<f2"), ("codes", "u1", 16)), _decode_iq4_nl),
    TensorType.Q2_K: (
        _layout(("scales", "u1", 16), ("codes", "u1", 64), ("d", "<f2"), ("dmin", "<f2")),
        _decode_q2_k,
    ),
    TensorType.Q3_K: (
        _layout(("high", "u1", 32), ("codes", "u1", 64), ("scales", "u1", 12), ("d", "<f2")),
        _decode_q3_k,
    ),
    TensorType.Q4_K: (
        _layout(("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("codes", "u1", 128)),
        _decode_q4_k,
    ),
    TensorType.Q5_K: (
        _layout(("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("high", "u1", 32), ("codes", "u1", 128)),
        _decode_q5_k,
    ),
    TensorType.Q6_K: (
        _layout(("low", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), ("d", "<f2")),
        _decode_q6_k,
    ),
}
