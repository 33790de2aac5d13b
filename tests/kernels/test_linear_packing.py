"""Packing keeps every bit of the file, and decoding a packed row equals the format's reference decoding."""

from __future__ import annotations

import numpy as np
import pytest
from gguf_blocks import (
    ELEMENT_FORMATS,
    QUANTIZED_FORMATS,
    SUPER_BLOCK_FORMATS,
    U8,
    adversarial_rows,
    block_size,
    random_rows,
    reference_decode,
)

from tokenmill import _native
from tokenmill.program.ops import WeightFormat


def pack(weight_format: WeightFormat, rows: U8, k: int, threads: int = 1) -> U8:
    n = rows.shape[0]
    out = np.full(_native.packed_bytes(weight_format, n, k), 0xA5, np.uint8)
    _native.pack_matrix(weight_format, rows.reshape(-1), n, k, out, threads)
    return out


def bits(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint32)


def widths(weight_format: WeightFormat) -> tuple[int, ...]:
    if weight_format in SUPER_BLOCK_FORMATS:
        return (256, 1536)
    return (1, 33, 255, 256, 576) if weight_format in ELEMENT_FORMATS else (32, 96, 256, 576, 640, 896)


@pytest.mark.parametrize("weight_format", list(WeightFormat), ids=lambda f: f.name)
def test_decoding_equals_the_reference_bit_for_bit(weight_format: WeightFormat, isa: str) -> None:
    for k in widths(weight_format):
        for n in (1, 16, 37):
            rows = random_rows(weight_format, n, k)
            packed = pack(weight_format, rows, k)
            decoded = _native.decode_packed_rows(weight_format, packed, n, k, np.arange(n, dtype=np.int32))
            assert np.array_equal(bits(decoded), bits(reference_decode(weight_format, rows))), (isa, n, k)


@pytest.mark.parametrize("weight_format", QUANTIZED_FORMATS, ids=lambda f: f.name)
def test_decoding_is_exact_for_extreme_scales(weight_format: WeightFormat, isa: str) -> None:
    k = 256
    rows = adversarial_rows(weight_format, k)
    packed = pack(weight_format, rows, k)
    order = np.random.default_rng(1).permutation(rows.shape[0]).astype(np.int32)
    decoded = _native.decode_packed_rows(weight_format, packed, rows.shape[0], k, order)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = reference_decode(weight_format, rows)[order]
    assert np.array_equal(bits(decoded), bits(expected)), isa


def test_quantized_by_the_reference_and_packed_decodes_to_what_the_reference_decodes() -> None:
    import gguf

    values = np.random.default_rng(2).standard_normal((19, 640)).astype(np.float32)
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16"):
        weight_format = WeightFormat[name]
        rows = gguf.quantize(values, gguf.GGMLQuantizationType[name]).view(np.uint8).reshape(19, -1)
        decoded = _native.decode_packed_rows(
            weight_format, pack(weight_format, rows, 640), 19, 640, np.arange(19, dtype=np.int32)
        )
        assert np.array_equal(bits(decoded), bits(reference_decode(weight_format, rows)))


@pytest.mark.parametrize("weight_format", QUANTIZED_FORMATS, ids=lambda f: f.name)
def test_every_bit_of_the_file_is_kept_exactly_once(weight_format: WeightFormat) -> None:
    k, size = block_size(weight_format)
    rows = random_rows(weight_format, 16, k)
    packed = pack(weight_format, rows, k)
    seen = set()
    row = 5
    for bit in range(8 * size):
        flipped = rows.copy()
        flipped[row, bit // 8] ^= 1 << (bit % 8)
        changed = np.unpackbits(pack(weight_format, flipped, k) ^ packed).nonzero()[0]
        assert changed.size == 1, f"bit {bit} of the block changes {changed.size} bits of the packed block"
        seen.add(int(changed[0]))
    assert len(seen) == 8 * size


@pytest.mark.parametrize("weight_format", list(WeightFormat), ids=lambda f: f.name)
def test_packed_size_is_the_file_size_with_rows_padded_to_16(weight_format: WeightFormat) -> None:
    k = widths(weight_format)[-1]
    row_bytes = random_rows(weight_format, 1, k).shape[1]
    assert _native.packed_bytes(weight_format, 32, k) == 32 * row_bytes
    assert _native.packed_bytes(weight_format, 33, k) == 48 * row_bytes


@pytest.mark.parametrize("weight_format", list(WeightFormat), ids=lambda f: f.name)
def test_thread_count_does_not_change_the_packed_bytes(weight_format: WeightFormat) -> None:
    k = widths(weight_format)[-1]
    rows = random_rows(weight_format, 131, k)
    one = pack(weight_format, rows, k)
    for threads in (2, 3, 7):
        assert np.array_equal(pack(weight_format, rows, k, threads), one)


def test_bad_sizes_are_refused_by_name() -> None:
    rows = random_rows(WeightFormat.Q4_K, 16, 256).reshape(-1)
    out = np.empty(_native.packed_bytes(WeightFormat.Q4_K, 16, 256), np.uint8)
    with pytest.raises(ValueError, match="multiple of 256"):
        _native.packed_bytes(WeightFormat.Q4_K, 16, 288)
    with pytest.raises(ValueError, match="multiple of 32"):
        _native.packed_bytes(WeightFormat.Q8_0, 16, 48)
    with pytest.raises(ValueError, match="at least one row"):
        _native.packed_bytes(WeightFormat.Q4_K, 0, 256)
    with pytest.raises(ValueError, match="unknown weight format number 99"):
        _native.packed_bytes(99, 16, 256)
    with pytest.raises(ValueError, match=r"source has 2303 bytes, expected 2304"):
        _native.pack_matrix(WeightFormat.Q4_K, rows[:-1], 16, 256, out, 1)
    with pytest.raises(ValueError, match=r"out has 2303 bytes, expected 2304"):
        _native.pack_matrix(WeightFormat.Q4_K, rows, 16, 256, out[:-1], 1)
    with pytest.raises(ValueError, match=r"rows\[1\] = 16 is not a row of a matrix of 16 rows"):
        _native.decode_packed_rows(WeightFormat.Q4_K, out, 16, 256, np.array([0, 16], np.int32))
