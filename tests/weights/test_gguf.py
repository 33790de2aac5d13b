"""The GGUF reader: files of the gguf package, a real model, and one test for each way a file can be wrong."""

import os
import struct
import time

import gguf
import numpy as np
import pytest
from model_files import GgufFile, array, entry, number, small_model, string, strings, tensor

from tokenmill.errors import ModelFileError, UnsupportedModelError
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.formats import TensorType
from tokenmill.weights.gguf import ValueType


@pytest.fixture
def written(tmp_path):
    """A file by the gguf package (version 3), with its tensors."""
    path = tmp_path / "written.gguf"
    rng = np.random.default_rng(0)
    tensors = {
        "token_embd.weight": rng.standard_normal((8, 64), dtype=np.float32),
        "half": rng.standard_normal((3, 32)).astype(np.float16),
        "norm": rng.standard_normal(64, dtype=np.float32),
        "experts": rng.standard_normal((2, 3, 32), dtype=np.float32),
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(128)
    writer.add_context_length(2048)
    writer.add_rope_freq_base(10000.0)
    writer.add_add_bos_token(True)
    writer.add_token_list(["a", "日本", "Ġthe"])
    writer.add_token_types([1, 1, 3])
    writer.add_token_scores([0.0, -1.5, -2.0])
    writer.add_chat_template("{{ messages }}")
    writer.add_float32("general.sampling.temp", 0.5)
    writer.add_int32("general.sampling.top_k", 20)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    quantized = gguf.quants.quantize(tensors["token_embd.weight"], gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("quantized", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, tensors, quantized


def test_reads_what_the_gguf_package_wrote(written):
    path, tensors, quantized = written
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.kind == "gguf"
        metadata = checkpoint.metadata
        assert metadata["general.architecture"] == "llama"
        assert metadata["llama.context_length"] == 2048
        assert metadata["llama.rope.freq_base"] == 10000.0
        assert metadata["tokenizer.ggml.add_bos_token"] is True
        assert metadata["tokenizer.ggml.tokens"] == ["a", "日本", "Ġthe"]
        assert metadata["tokenizer.ggml.token_type"] == [1, 1, 3]
        assert metadata["tokenizer.ggml.scores"] == [0.0, -1.5, -2.0]
        assert metadata["tokenizer.chat_template"] == "{{ messages }}"
        assert checkpoint.generation_defaults == {"temperature": 0.5, "top_k": 20}
        assert "absent" not in metadata
        for name, values in tensors.items():
            assert checkpoint.tensors[name].shape == values.shape
            np.testing.assert_array_equal(checkpoint.decode(name), values.astype(np.float32))
        assert checkpoint.tensors["quantized"].tensor_type is TensorType.Q8_0
        assert checkpoint.tensors["quantized"].nbytes == quantized.nbytes
        np.testing.assert_array_equal(checkpoint.raw("quantized"), quantized.reshape(-1))


def test_version_2_reads_as_version_3(tmp_path):
    file = small_model()
    three = open_checkpoint(file.write(tmp_path / "three.gguf"))
    file.version = struct.pack("<I", 2)
    two = open_checkpoint(file.write(tmp_path / "two.gguf"))
    assert dict(two.metadata) == dict(three.metadata)
    assert two.tensors == three.tensors
    for name in two.tensors:
        np.testing.assert_array_equal(two.decode(name), three.decode(name))


def test_every_kind_of_metadata_value(tmp_path):
    metadata = open_checkpoint(small_model().write(tmp_path / "m.gguf")).metadata
    assert metadata["number.bool"] is True
    assert all(metadata[f"number.{kind.name.lower()}"] == 1 for kind in ValueType if kind not in (8, 9))
    assert metadata["list.words"] == ["a", "", "Ġthe", "日本", "x" * 300]
    assert metadata["list.numbers"] == [-1, 0, 7]
    assert metadata["list.floats"] == [0.5, -2.0]
    assert metadata["list.truths"] == [True, False]


def test_metadata_outlives_the_mapping(tmp_path):
    checkpoint = open_checkpoint(small_model().write(tmp_path / "m.gguf"))
    checkpoint.close()
    assert checkpoint.metadata["list.words"][2] == "Ġthe"


def test_rows_are_slices_of_the_whole(tmp_path):
    checkpoint = open_checkpoint(small_model().write(tmp_path / "m.gguf"))
    for name, info in checkpoint.tensors.items():
        whole = checkpoint.decode(name)
        np.testing.assert_array_equal(checkpoint.decode(name, (1, 4)), whole[1:4])
        assert checkpoint.decode(name, (2, 2)).shape == (0, 512)
        assert checkpoint.raw(name, (1, 4)).size == 3 * info.row_bytes
        checkpoint.release(name)
        np.testing.assert_array_equal(checkpoint.decode(name), whole)
        with pytest.raises(IndexError, match="rows"):
            checkpoint.raw(name, (3, 6))


def test_long_tensors_decode_in_parts_to_the_same_values(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(small_model().write(tmp_path / "m.gguf"))
    whole = {name: checkpoint.decode(name) for name in checkpoint.tensors}
    monkeypatch.setattr("tokenmill.weights.checkpoint.DECODE_PART_VALUES", 3 * 256)
    for name, values in whole.items():
        np.testing.assert_array_equal(checkpoint.decode(name), values)


def test_the_real_model_decodes_as_the_gguf_package_does(smollm2_path):
    reader = gguf.GGUFReader(smollm2_path)
    with open_checkpoint(smollm2_path) as checkpoint:
        assert {t.name for t in reader.tensors} == set(checkpoint.tensors)
        for theirs in reader.tensors:
            info = checkpoint.tensors[theirs.name]
            assert info.shape == tuple(int(extent) for extent in reversed(theirs.shape))
            expected = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
            ours = checkpoint.decode(theirs.name)
            assert np.array_equal(ours.view(np.uint32), expected.view(np.uint32)), theirs.name
        tokens = reader.fields["tokenizer.ggml.tokens"]
        assert checkpoint.metadata["tokenizer.ggml.tokens"] == [bytes(tokens.parts[i]).decode() for i in tokens.data]


def test_a_vocabulary_of_150000_tokens_opens_in_well_under_300_ms(tmp_path):
    words = [f"token{i}" for i in range(150_000)]
    file = GgufFile([entry("tokenizer.ggml.tokens", ValueType.ARRAY, strings(words))]).write(tmp_path / "v.gguf")
    spent = []
    for _ in range(3):
        start = time.process_time()
        checkpoint = open_checkpoint(file)
        spent.append(time.process_time() - start)
    assert min(spent) < 0.15
    assert checkpoint.metadata["tokenizer.ggml.tokens"] == words


# ---- bad input -----------------------------------------------------------------------------------------------------

F32 = TensorType.F32
ONE = bytes(32 * 4)


def words_with_length(length: int) -> bytes:
    return entry("words", ValueType.ARRAY, array(ValueType.STRING, 2, string("ok") + struct.pack("<Q", length) + b"no"))


CORRUPT = {
    "magic": (GgufFile(magic=b"GGML"), "is not a GGUF file"),
    "tensor count": (GgufFile(tensor_count=2**63), "the tensor count is 9223372036854775808, more than"),
    "metadata count": (GgufFile(entry_count=2**40), "the metadata count is 1099511627776, more than"),
    "key length": (GgufFile([struct.pack("<Q", 2**60) + b"key"]), "the key of metadata entry 0 claims"),
    "key not utf-8": (
        GgufFile([entry(b"\xff\xfe", ValueType.UINT8, b"\0")]),
        "the key of metadata entry 0 is not UTF-8",
    ),
    "key twice": (GgufFile([number("a", ValueType.UINT8, 1)] * 2), "metadata 'a' appears twice"),
    "value type": (GgufFile([entry("a", 77, b"\0" * 8)]), "metadata 'a' has the unknown value type 77"),
    "string length": (GgufFile([entry("a", ValueType.STRING, struct.pack("<Q", 2**62))]), "metadata 'a' claims"),
    "string truncated": (GgufFile([entry("a", ValueType.STRING, struct.pack("<Q", 60))]), "ends inside metadata 'a'"),
    "truth value": (GgufFile([entry("a", ValueType.BOOL, b"\7")]), "metadata 'a' is a truth value of 7"),
    "array count": (
        GgufFile([entry("a", ValueType.ARRAY, array(ValueType.UINT32, 2**62, b""))]),
        "the length of metadata 'a' is 4611686018427387904, more than",
    ),
    "string array count": (
        GgufFile([entry("a", ValueType.ARRAY, array(ValueType.STRING, 2**61, b""))]),
        "the length of metadata 'a' is 2305843009213693952, more than",
    ),
    "string in array beyond the end": (
        GgufFile([words_with_length(1000)]),
        "ends inside the strings of metadata 'words'",
    ),
    "string in array of 2^64 - 1": (
        GgufFile([words_with_length(2**64 - 1)]),
        "ends inside the strings of metadata 'words'",
    ),
    "array of arrays": (
        GgufFile([entry("a", ValueType.ARRAY, array(ValueType.ARRAY, 1, array(ValueType.UINT8, 1, b"\1")))]),
        "metadata 'a' is an array of arrays",
    ),
    "array of unknown": (
        GgufFile([entry("a", ValueType.ARRAY, array(99, 1, b"\1"))]),
        "the elements of metadata 'a' has",
    ),
    "alignment 0": (GgufFile([number("general.alignment", ValueType.UINT32, 0)]), "'general.alignment' is 0"),
    "alignment 24": (GgufFile([number("general.alignment", ValueType.UINT32, 24)]), "'general.alignment' is 24"),
    "alignment a string": (
        GgufFile([entry("general.alignment", ValueType.STRING, string("32"))]),
        "'general.alignment' is not an integer",
    ),
    "tensor twice": (
        GgufFile(tensors=[tensor("t", (32,), F32, 0), tensor("t", (32,), F32, 128)], data=ONE * 2),
        "'t' appears twice",
    ),
    "tensor name length": (GgufFile(tensors=[struct.pack("<Q", 2**33)], data=ONE), "the name of tensor 0 claims"),
    "no dimensions": (GgufFile(tensors=[tensor("t", (), F32, 0)], data=ONE), "tensor 't' has 0 dimensions"),
    "many dimensions": (GgufFile(tensors=[tensor("t", (1,) * 9, F32, 0)], data=ONE), "tensor 't' has 9 dimensions"),
    "empty dimension": (
        GgufFile(tensors=[tensor("t", (32, 0), F32, 0)], data=ONE),
        r"tensor 't' has the shape \[0, 32\]",
    ),
    "overflowing shape": (
        GgufFile(tensors=[tensor("t", (2**32,) * 4, F32, 0)], data=ONE),
        "tensor 't' of shape .* would take",
    ),
    "shape that wraps to 0": (
        GgufFile(tensors=[tensor("t", (2**62, 4), F32, 0)], data=ONE),
        "tensor 't' of shape .* would take",
    ),
    "partial block": (
        GgufFile(tensors=[tensor("t", (33,), TensorType.Q8_0, 0)], data=ONE),
        "tensor 't' has rows of 33 values",
    ),
    "misaligned": (
        GgufFile(tensors=[tensor("t", (8,), F32, 16)], data=ONE),
        "tensor 't' starts at 16, not at a multiple of 32",
    ),
    "overlap": (
        GgufFile(tensors=[tensor("t", (32,), F32, 0), tensor("u", (32,), F32, 64)], data=ONE * 2),
        "'t' and 'u' overlap",
    ),
    "beyond the end": (
        GgufFile(tensors=[tensor("t", (32,), F32, 32)], data=ONE),
        "tensor 't' ends at byte .* truncated",
    ),
    "offset of 2^64": (GgufFile(tensors=[tensor("t", (32,), F32, 2**64 - 32)], data=ONE), "tensor 't' ends at byte"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_file_is_refused(tmp_path, case):
    file, message = CORRUPT[case]
    path = file.write(tmp_path / "bad.gguf")
    with pytest.raises(ModelFileError, match=message) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")


UNSUPPORTED = {
    "version 1": (GgufFile(version=struct.pack("<I", 1)), "is GGUF version 1; versions 2 and 3"),
    "version 4": (GgufFile(version=struct.pack("<I", 4)), "is GGUF version 4"),
    "big endian": (GgufFile(version=struct.pack(">I", 3)), "big-endian"),
    "split": (GgufFile([number("split.count", ValueType.UINT16, 3)]), "one part of a split model"),
    "unknown type": (
        GgufFile(tensors=[tensor("t", (32,), 1234, 0)], data=ONE),
        "tensor 't' has the unknown type 1234; use",
    ),
    "unsupported type": (
        GgufFile(tensors=[tensor("t", (256,), 23, 0)], data=ONE * 2),
        "'t' has the unsupported type IQ4_XS; use",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_file_is_refused(tmp_path, case):
    file, message = UNSUPPORTED[case]
    with pytest.raises(UnsupportedModelError, match=message):
        open_checkpoint(file.write(tmp_path / "other.gguf"))


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = small_model().bytes()
    path = tmp_path / "cut.gguf"
    cuts = [*range(0, 900, 7), *np.random.default_rng(0).integers(900, len(whole), 100), len(whole) - 1]
    for length in cuts:
        path.write_bytes(whole[:length])
        with pytest.raises(ModelFileError):
            open_checkpoint(path)


def test_a_string_that_is_not_utf8_is_named_when_it_is_used(tmp_path):
    words = array(ValueType.STRING, 2, string("ok") + string(b"\xc3"))
    checkpoint = open_checkpoint(GgufFile([entry("words", ValueType.ARRAY, words)]).write(tmp_path / "m.gguf"))
    with pytest.raises(ModelFileError, match="metadata 'words' holds a string that is not UTF-8"):
        checkpoint.metadata["words"]


def test_missing_file(tmp_path):
    with pytest.raises(ModelFileError, match="no such file or folder"):
        open_checkpoint(tmp_path / "absent.gguf")


def test_empty_file(tmp_path):
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(ModelFileError, match="is empty"):
        open_checkpoint(tmp_path / "empty.gguf")


def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelFileError, match="not a regular file"):
        open_checkpoint(tmp_path / "pipe.gguf")


def test_unreadable_file(tmp_path, unprivileged):
    small_model().write(tmp_path / "secret.gguf").chmod(0)
    with unprivileged(), pytest.raises(ModelFileError, match=r"^secret.gguf: cannot be read: Permission denied"):
        open_checkpoint("secret.gguf")


def test_an_unknown_tensor_is_named(tmp_path):
    checkpoint = open_checkpoint(small_model().write(tmp_path / "m.gguf"))
    with pytest.raises(ModelFileError, match="has no tensor 'absent'"):
        checkpoint.decode("absent")
