"""The native packing functions as the loader uses them: exact, whatever the parts, on whatever buffer."""

import numpy as np
import pytest
from model_files import bind_all, finite_blocks

from tokenmill import _native
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.formats import SUPPORTED_TYPES, decode_blocks
from tokenmill.weights.packing import ROW_BLOCK, load_weights

N, K = 37, 512


def aligned(count: int, fill: int = 0) -> np.ndarray:
    buffer = np.full(count + 64, fill, dtype=np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + count]


def pack(weight_format, source, n, fill=0):
    out = aligned(_native.packed_bytes(int(weight_format), n, K), fill)
    _native.pack_matrix(int(weight_format), source, n, K, out, 1)
    return out


@pytest.fixture(params=SUPPORTED_TYPES, ids=lambda t: t.name)
def matrix(request):
    """A tensor type and the bytes of N rows of it."""
    return request.param, finite_blocks(np.random.default_rng(0), request.param, N * K).view(np.uint8)


def test_packed_rows_decode_to_the_reference_bits(matrix):
    tensor_type, source = matrix
    packed = pack(tensor_type.weight_format, source, N)
    decoded = _native.decode_packed_rows(int(tensor_type.weight_format), packed, N, K, np.arange(N, dtype=np.int32))
    expected = decode_blocks(tensor_type, source).reshape(N, K)
    assert np.array_equal(decoded.view(np.uint32), expected.view(np.uint32))


def test_row_blocks_packed_one_by_one_equal_the_whole(matrix):
    tensor_type, source = matrix
    row_bytes = tensor_type.row_bytes(K)
    parts = [
        pack(
            tensor_type.weight_format,
            source[first * row_bytes : (first + ROW_BLOCK) * row_bytes],
            min(ROW_BLOCK, N - first),
        )
        for first in range(0, N, ROW_BLOCK)
    ]
    assert np.array_equal(np.concatenate(parts), pack(tensor_type.weight_format, source, N))


def test_packed_bytes_do_not_depend_on_what_the_buffer_held(matrix):
    tensor_type, source = matrix
    assert np.array_equal(
        pack(tensor_type.weight_format, source, N, 0), pack(tensor_type.weight_format, source, N, 255)
    )


def test_no_format_grows_but_for_padded_rows(matrix):
    tensor_type, _ = matrix
    assert _native.packed_bytes(
        int(tensor_type.weight_format), 2 * ROW_BLOCK, K
    ) <= 2 * ROW_BLOCK * tensor_type.row_bytes(K)


def test_the_real_model_packs_exactly(smollm2_path, tmp_path):
    checkpoint = open_checkpoint(smollm2_path)
    for _ in range(2):
        weights = load_weights(checkpoint, bind_all(checkpoint), tmp_path)
        rng = np.random.default_rng(0)
        for name, weight_format in weights.formats.items():
            matrix = weights.matrix(name)
            row = int(rng.integers(0, matrix.n - 32))
            rows = np.arange(row, row + 32, dtype=np.int32)
            decoded = _native.decode_packed_rows(int(weight_format), matrix.data, matrix.n, matrix.k, rows)
            assert np.array_equal(decoded, checkpoint.decode(name, (row, row + 32))), name
    assert weights.origin == "mapped"
