"""Decoding of every tensor type, against the gguf package."""

import gguf
import numpy as np
import pytest

from tokenmill.program.ops import WeightFormat
from tokenmill.weights.formats import SUPPORTED_TYPES, TensorType, decode_blocks

PROMISED = {
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
}  # fmt: skip


def oracle(tensor_type: TensorType, data: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(data.reshape(1, -1), gguf.GGMLQuantizationType[tensor_type.name]).reshape(-1)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.array_equal(a.view(np.uint32), b.view(np.uint32)))


def test_every_promised_type_is_supported_and_has_a_packed_format():
    assert {t.name for t in SUPPORTED_TYPES} == PROMISED
    assert {t.weight_format for t in SUPPORTED_TYPES} == set(WeightFormat)


@pytest.mark.parametrize("tensor_type", SUPPORTED_TYPES, ids=lambda t: t.name)
def test_type_numbers_and_sizes_are_those_of_gguf(tensor_type):
    assert gguf.GGMLQuantizationType[tensor_type.name] == tensor_type
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor_type)] == (
        tensor_type.block_size,
        tensor_type.block_bytes,
    )


@pytest.mark.parametrize("tensor_type", SUPPORTED_TYPES, ids=lambda t: t.name)
def test_random_blocks_decode_to_the_reference_bits(tensor_type):
    # Random bytes as scales reach infinities, NaN, subnormal numbers and both signs.
    data = np.random.default_rng(1).integers(0, 256, 5000 * tensor_type.block_bytes, dtype=np.uint8)
    assert same_bits(decode_blocks(tensor_type, data), oracle(tensor_type, data))


def test_decoding_accepts_unaligned_views():
    data = np.random.default_rng(3).integers(0, 256, 1 + 8 * 144, dtype=np.uint8)
    assert same_bits(decode_blocks(TensorType.Q4_K, data[1:]), oracle(TensorType.Q4_K, data[1:].copy()))
    assert same_bits(decode_blocks(TensorType.F32, data[1:]), data[1:].copy().view(np.float32))


def test_a_partial_block_is_refused():
    with pytest.raises(ValueError, match="whole number of Q4_0 blocks"):
        decode_blocks(TensorType.Q4_0, np.zeros(19, dtype=np.uint8))
    with pytest.raises(ValueError, match="33 values are not a whole number of Q8_0 blocks"):
        TensorType.Q8_0.row_bytes(33)


def test_an_unsupported_type_is_refused_by_name():
    with pytest.raises(ValueError, match="IQ4_XS"):
        decode_blocks(TensorType.IQ4_XS, np.zeros(136, dtype=np.uint8))
