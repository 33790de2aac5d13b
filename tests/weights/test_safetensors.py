"""Model folders: safetensors files by the safetensors package, and one test for each way a folder can be wrong."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
from model_files import CopyingPacker, bind_all
from safetensors.numpy import save_file

from tokenmill.errors import ModelFileError, UnsupportedModelError
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.formats import TensorType
from tokenmill.weights.packing import load_weights

RNG = np.random.default_rng(0)
TENSORS = {
    "model.embed_tokens.weight": RNG.standard_normal((7, 32)).astype(ml_dtypes.bfloat16),
    "model.layers.0.mlp.up_proj.weight": RNG.standard_normal((5, 32)).astype(np.float16),
    "model.norm.weight": RNG.standard_normal(32).astype(np.float32),
}
CONFIG = {"model_type": "llama", "hidden_size": 32}


@pytest.fixture
def folder(tmp_path):
    """A folder with one file."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    """A folder with two shards and an index."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    placed = {}
    for index, names in enumerate((list(TENSORS)[:1], list(TENSORS)[1:])):
        shard = f"model-{index + 1:05}-of-00002.safetensors"
        save_file({name: TENSORS[name] for name in names}, tmp_path / shard)
        placed |= dict.fromkeys(names, shard)
    write_index(tmp_path, placed)
    return tmp_path


def write_index(folder, placed):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def read_index(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


@pytest.mark.parametrize("kind", ["folder", "sharded"])
def test_reads_what_the_safetensors_package_wrote(kind, request):
    with open_checkpoint(request.getfixturevalue(kind)) as checkpoint:
        assert checkpoint.kind == "hf"
        assert checkpoint.metadata == CONFIG
        assert checkpoint.tensors.keys() == TENSORS.keys()
        types = [checkpoint.tensors[name].tensor_type for name in TENSORS]
        assert types == [TensorType.BF16, TensorType.F16, TensorType.F32]
        for name, values in TENSORS.items():
            assert checkpoint.tensors[name].shape == values.shape
            np.testing.assert_array_equal(checkpoint.decode(name), values.astype(np.float32))
            np.testing.assert_array_equal(checkpoint.raw(name), values.reshape(-1).view(np.uint8))


def test_generation_defaults_and_tokenizer_files(folder):
    (folder / "generation_config.json").write_text('{"temperature": 0.7, "eos_token_id": [1, 2]}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("none of ours")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.generation_defaults == {"temperature": 0.7, "eos_token_id": [1, 2]}
    assert checkpoint.tokenizer_files == {"tokenizer.json": folder / "tokenizer.json"}


def test_a_sharded_folder_goes_through_the_build_cache(sharded, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")

    def load():
        checkpoint = open_checkpoint(sharded)
        return load_weights(checkpoint, bind_all(checkpoint), cache, packer=CopyingPacker())

    assert [load().origin, load().origin] == ["packed", "mapped"]
    weights = load()
    assert [weights.formats[name].name for name in list(TENSORS)[:2]] == ["BF16", "F16"]
    for name in list(TENSORS)[:2]:
        np.testing.assert_array_equal(weights.decoded(name), TENSORS[name].astype(np.float32))
    np.testing.assert_array_equal(weights.vector("model.norm.weight"), TENSORS["model.norm.weight"])
    os.utime(sharded / "model-00002-of-00002.safetensors", ns=(1, 1))
    assert load().origin == "packed"


# ---- bad folders ---------------------------------------------------------------------------------------------------


def test_folder_without_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ModelFileError, match=r"has no config.json; name a .gguf file or a folder"):
        open_checkpoint(folder)


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"has neither model.safetensors nor"):
        open_checkpoint(folder)


def test_folder_with_pickled_weights_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match=r"pytorch_model.bin: convert it to safetensors"):
        open_checkpoint(folder)


def test_unreadable_folder(folder, unprivileged):
    inner = folder / "inner"
    inner.mkdir(mode=0)
    with unprivileged(), pytest.raises(ModelFileError, match=r"^inner: cannot be read: Permission denied"):
        open_checkpoint("inner")


def test_the_weights_file_instead_of_its_folder(folder):
    with pytest.raises(ModelFileError, match="name the folder"):
        open_checkpoint(folder / "model.safetensors")


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"a": 1, "a": 2}', "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\xff"]
)
def test_config_that_is_no_json_object(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelFileError, match=r"config.json: is not"):
        open_checkpoint(folder)


def test_quantized_safetensors_are_refused_by_scheme(folder):
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UnsupportedModelError, match="quantized with 'gptq'"):
        open_checkpoint(folder)


def test_unsupported_dtype_is_refused_by_tensor(folder):
    save_file({**TENSORS, "position_ids": np.arange(4)}, folder / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="tensor 'position_ids' has the unsupported type I64"):
        open_checkpoint(folder)


def test_missing_shard(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"model-00002-of-00002.safetensors: no such file"):
        open_checkpoint(sharded)


def test_index_that_names_an_absent_tensor(sharded):
    write_index(sharded, {**read_index(sharded), "model.extra": "model-00001-of-00002.safetensors"})
    with pytest.raises(ModelFileError, match=r"model-00001-of-00002.safetensors: lacks tensor 'model.extra'"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "config.json", "a/b.safetensors"])
def test_index_that_leads_out_of_the_folder(sharded, shard):
    write_index(sharded, {**read_index(sharded), "model.extra": shard})
    with pytest.raises(ModelFileError, match="is no safetensors file of the folder"):
        open_checkpoint(sharded)


def test_index_without_a_map(sharded):
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(ModelFileError, match="has no weight_map"):
        open_checkpoint(sharded)


def test_tensor_in_two_shards(sharded):
    save_file(TENSORS, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(ModelFileError, match=r"holds tensor 'model.embed_tokens.weight', which model-00001"):
        open_checkpoint(sharded)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BAD_HEADERS = {
    "length beyond the file": (struct.pack("<Q", 2**40) + b"{}", "claims a header of 1099511627776 bytes"),
    "length of 2^64 - 1": (b"\xff" * 8 + b"{}", "claims a header of"),
    "seven bytes": (b"\0" * 7, "has 7 bytes"),
    "no json": (b"{no", "has a header that is not JSON"),
    "no object": ([], "has a header that is not a JSON object"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, "metadata that is not a map of strings"),
    "entry of text": ({"t": "F32"}, "describes tensor 't'"),
    "unknown dtype": ({"t": entry("F7")}, "gives tensor 't' the unknown dtype 'F7'"),
    "dtype no text": ({"t": entry([])}, "gives tensor 't' the unknown dtype"),
    "negative extent": ({"t": entry(shape=(-2,))}, "gives tensor 't' a shape"),
    "truth as extent": ({"t": entry(shape=(True, 2))}, "gives tensor 't' a shape"),
    "one offset": ({"t": entry(offsets=(8,))}, "gives tensor 't' data_offsets"),
    "size and shape differ": ({"t": entry(shape=(3,))}, r"gives tensor 't' 8 bytes, where F32 \[3\] takes 12"),
    "absurd shape": ({"t": entry(shape=(2**62, 2**62))}, "gives tensor 't' 8 bytes"),
    "beyond the end": ({"t": entry(shape=(4,), offsets=(0, 16))}, "has tensor 't' end at byte"),
    "overlap": ({"t": entry(), "u": entry()}, "has tensor 'u' start at byte"),
    "hole": ({"t": entry(shape=(1,), offsets=(4, 8))}, "has tensor 't' start at byte"),
    "bytes left over": ({"t": entry(shape=(1,), offsets=(0, 4))}, "has 4 bytes after its last tensor"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_corrupt_header_is_refused(folder, case):
    header, message = BAD_HEADERS[case]
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    if case not in ("length beyond the file", "length of 2^64 - 1", "seven bytes"):
        header = struct.pack("<Q", len(header)) + header + bytes(8)
    (folder / "model.safetensors").write_bytes(header)
    with pytest.raises(ModelFileError, match=message):
        open_checkpoint(folder)


def test_truncated_file(folder):
    whole = (folder / "model.safetensors").read_bytes()
    for length in (0, 5, 40, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(ModelFileError, match=r"model.safetensors: (is empty|has|claims)"):
            open_checkpoint(folder)
