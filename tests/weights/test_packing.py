"""From checkpoint to packed weights: shapes are checked, rows are sliced, every format keeps its bytes."""

import dataclasses
import struct

import numpy as np
import pytest
from model_files import CopyingPacker, GgufFile, bind, bind_all, finite_blocks, small_model, tensor

from tokenmill.errors import ModelFileError, UnsupportedModelError
from tokenmill.program.ops import WeightFormat
from tokenmill.weights import packing
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.formats import TensorType
from tokenmill.weights.inspect import summarize
from tokenmill.weights.packing import LoadProgress, load_weights


@pytest.fixture
def checkpoint(tmp_path):
    """Matrices ``matrix.<TYPE>`` [5, 512] of each type."""
    return open_checkpoint(small_model().write(tmp_path / "small.gguf"))


@pytest.fixture
def vectors(tmp_path):
    """Vectors in three types, and a fused matrix of 48 rows."""
    rng = np.random.default_rng(0)
    file = GgufFile()
    for name, tensor_type in (("f32", TensorType.F32), ("f16", TensorType.F16), ("bf16", TensorType.BF16)):
        file.data += b"\0" * (-len(file.data) % 32)
        file.tensors.append(tensor(name, (40,), tensor_type, len(file.data)))
        file.data += finite_blocks(rng, tensor_type, 40).tobytes()
    file.data += b"\0" * (-len(file.data) % 32)
    file.tensors.append(tensor("qkv", (64, 48), TensorType.Q8_0, len(file.data)))
    file.data += finite_blocks(rng, TensorType.Q8_0, 64 * 48).tobytes()
    return open_checkpoint(file.write(tmp_path / "vectors.gguf"))


def load(checkpoint, bound, tmp_path, **options):
    return load_weights(checkpoint, bound, tmp_path / "cache", packer=CopyingPacker(), **options)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "memory"])
def test_matrices_keep_their_format_and_bytes(checkpoint, tmp_path, use_cache):
    weights = load(checkpoint, bind_all(checkpoint), tmp_path, use_cache=use_cache)
    assert weights.origin == ("packed" if use_cache else "memory")
    assert set(weights.formats.values()) == set(WeightFormat)
    for name, info in checkpoint.tensors.items():
        matrix = weights.matrix(name)
        assert (matrix.n, matrix.k) == info.shape
        assert matrix.format.name == info.tensor_type.name
        assert matrix.data.ctypes.data % 64 == 0
        np.testing.assert_array_equal(matrix.data[: info.nbytes], checkpoint.raw(name))
        np.testing.assert_array_equal(weights.decoded(name), checkpoint.decode(name))


def test_the_cached_file_opens_with_the_safetensors_package(checkpoint, tmp_path):
    from safetensors.numpy import load_file

    weights = load(checkpoint, bind_all(checkpoint), tmp_path)
    (path,) = tmp_path.glob("cache/packed/*/weights-*.safetensors")
    stored = load_file(path)
    for name in checkpoint.tensors:
        np.testing.assert_array_equal(stored[name], weights.matrix(name).data)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "memory"])
def test_vectors_become_fp32(vectors, tmp_path, use_cache):
    bound = bind({f"norm.{name}": ((40,), name, None) for name in ("f32", "f16", "bf16")})
    weights = load(vectors, bound, tmp_path, use_cache=use_cache)
    for name in ("f32", "f16", "bf16"):
        vector = weights.vector(f"norm.{name}")
        assert vector.dtype == np.float32
        np.testing.assert_array_equal(vector, vectors.decode(name))


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "memory"])
def test_row_slices_of_a_fused_tensor(vectors, tmp_path, use_cache):
    slices = {"q": (0, 32), "k": (32, 40), "v": (40, 48)}
    bound = bind(
        {name: ((last - first, 64), "qkv", (first, last)) for name, (first, last) in slices.items()}
        | {"half": ((20,), "f16", (20, 40))}
    )
    weights = load(vectors, bound, tmp_path, use_cache=use_cache)
    for name, rows in slices.items():
        np.testing.assert_array_equal(weights.matrix(name).data[: (rows[1] - rows[0]) * 68], vectors.raw("qkv", rows))
        np.testing.assert_array_equal(weights.decoded(name), vectors.decode("qkv", rows))
    np.testing.assert_array_equal(weights.vector("half"), vectors.decode("f16")[20:])


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "memory"])
def test_a_matrix_packed_in_parts_equals_one_packed_whole(vectors, tmp_path, monkeypatch, use_cache):
    bound = bind({"qkv": ((48, 64), "qkv", None), "tail": ((39, 64), "qkv", (9, 48))})
    whole = load(vectors, bound, tmp_path, use_cache=False)
    monkeypatch.setattr(packing, "PART_BYTES", 1)  # a row block at a time
    parts = load(vectors, bound, tmp_path, use_cache=use_cache)
    for name in ("qkv", "tail"):
        np.testing.assert_array_equal(parts.matrix(name).data, whole.matrix(name).data)


def test_progress_ends_at_the_total(checkpoint, tmp_path):
    seen: list[LoadProgress] = []
    weights = load(checkpoint, bind_all(checkpoint), tmp_path, progress=seen.append)
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert {p.stage for p in seen} == {"packing"}
    assert len(seen) == len(checkpoint.tensors)
    assert seen[-1].done == seen[-1].total == sum(weights.matrix(name).data.size for name in weights.formats)


def test_unknown_names_are_key_errors(checkpoint, tmp_path):
    weights = load(checkpoint, bind_all(checkpoint), tmp_path)
    for read in (weights.matrix, weights.vector, weights.decoded):
        with pytest.raises(KeyError, match="absent"):
            read("absent")
    with pytest.raises(KeyError, match=r"no vector 'matrix.F32'"):
        weights.vector("matrix.F32")


def test_closed_weights_refuse_and_views_survive(checkpoint, tmp_path):
    weights = load(checkpoint, bind_all(checkpoint), tmp_path)
    matrix = weights.matrix("matrix.Q4_K")
    weights.close()
    checkpoint.close()
    assert matrix.data.any()
    with pytest.raises(ValueError, match="closed"):
        weights.matrix("matrix.Q4_K")


# ---- what a checkpoint may lack ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("needed", "message"),
    [
        (((5, 512), "absent", None), r"lacks tensor 'absent' \(w needs shape \[5, 512\]\)"),
        (((6, 512), "matrix.Q4_0", None), r"'matrix.Q4_0' has shape \[5, 512\]; w needs shape \[6, 512\]"),
        (((5, 256), "matrix.Q4_0", None), r"'matrix.Q4_0' has shape \[5, 512\]; w needs shape \[5, 256\]"),
        (((512,), "matrix.Q4_0", None), r"'matrix.Q4_0' has shape \[5, 512\]; w needs shape \[512\]"),
        (((3, 512), "matrix.Q4_0", (3, 6)), r"'matrix.Q4_0' has shape .*; w needs shape \[3, 512\] from rows 3 to 6"),
        (((3, 512), "matrix.Q4_0", (0, 2)), r"'matrix.Q4_0' has shape .*; w needs shape \[3, 512\] from rows 0 to 2"),
    ],
)
def test_missing_or_mis_shaped_tensor_is_named(checkpoint, tmp_path, needed, message):
    with pytest.raises(ModelFileError, match=message):
        load(checkpoint, bind({"w": needed}), tmp_path)
    assert not (tmp_path / "cache").exists()


def test_a_weight_of_three_dimensions_is_refused(checkpoint, tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"w of shape \[1, 5, 512\] is neither vector nor matrix"):
        load(checkpoint, bind({"w": ((1, 5, 512), "matrix.Q4_0", None)}), tmp_path)


def test_a_format_that_no_kernel_takes_is_named(checkpoint, tmp_path):
    class Refusing(CopyingPacker):
        def packed_bytes(self, format, n, k):
            raise ValueError("k must be a multiple of 1024")

    with pytest.raises(
        UnsupportedModelError, match=r"'matrix.F32' of shape \[5, 512\] has no packed form as F32 \(k must"
    ):
        load_weights(checkpoint, bind_all(checkpoint), tmp_path / "cache", packer=Refusing())


def test_summary_counts_parameters_and_bytes_by_type(checkpoint):
    summary = summarize(checkpoint)
    assert summary.parameters == 14 * 5 * 512
    assert summary.nbytes == sum(info.nbytes for info in checkpoint.tensors.values())
    assert [share.tensor_type for share in summary.types][:1] == [TensorType.F32]
    assert {share.tensor_type.name: share.bits_per_value for share in summary.types}["Q4_K"] == 4.5
    assert summary.largest == checkpoint.tensors["matrix.F32"]
    assert [dataclasses.astuple(info) for info in summary.tensors] == [
        dataclasses.astuple(info) for info in checkpoint.tensors.values()
    ]


def test_nothing_in_the_packed_file_depends_on_stale_buffers(tmp_path, monkeypatch):
    # A small matrix after a large one: its padding rows must not show the former part.
    rng = np.random.default_rng(0)
    file = GgufFile(
        tensors=[tensor("large", (32, 64), TensorType.Q8_0, 0), tensor("small", (32, 1), TensorType.Q8_0, 64 * 34)],
        data=finite_blocks(rng, TensorType.Q8_0, 32 * 64).tobytes() + struct.pack("<e", 1) + b"\1" * 32,
    )
    checkpoint = open_checkpoint(file.write(tmp_path / "m.gguf"))
    bound = bind(
        {f"{name}.{i}": (checkpoint.tensors[name].shape, name, None) for i in range(2) for name in ("large", "small")}
    )
    data = load(checkpoint, bound, tmp_path).matrix("small.1").data
    np.testing.assert_array_equal(data[:34], checkpoint.raw("small"))
    assert not data[34:].any()
