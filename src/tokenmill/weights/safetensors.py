"""Reads safetensors files and the model folders made of them.

A file is a u64 header length, a JSON header (name -> dtype, shape, data_offsets; ``__metadata__`` of strings), and the
data. The header is checked here rather than through the safetensors package because tensors are used as views of a
mapping whose pages are given back while weights are packed; the package is the oracle in the tests.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from tokenmill.errors import ModelFileError, UnsupportedModelError
from tokenmill.weights.checkpoint import Checkpoint, TensorInfo, TensorPlace
from tokenmill.weights.formats import TensorType
from tokenmill.weights.mapped_file import MappedFile

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
MAX_JSON_BYTES = 100_000_000
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_TENSOR_TYPES = {"F32": TensorType.F32, "F16": TensorType.F16, "BF16": TensorType.BF16}

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """A tensor of a safetensors file; ``offset`` counts from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(file: MappedFile) -> tuple[dict[str, HeaderEntry], dict[str, str]]:
    """Tensors and ``__metadata__`` of a safetensors file, checked against its size.

    Raises ModelFileError if the file is truncated or corrupt.
    """
    return _HeaderReader(file).read()


class _HeaderReader:
    def __init__(self, file: MappedFile) -> None:
        self.file = file

    def fail(self, message: str) -> NoReturn:
        raise ModelFileError(self.file.path, f"{message}; the file is truncated or corrupt, fetch it again")

    def read(self) -> tuple[dict[str, HeaderEntry], dict[str, str]]:
        size = self.file.size
        if size < 8:
            self.fail(f"has {size} bytes, too few for a safetensors header")
        length = struct.unpack("<Q", self.file.data[:8])[0]
        if length > min(size - 8, MAX_HEADER_BYTES):
            self.fail(f"claims a header of {length} bytes")
        try:
            header = parse_json(self.file.data[8 : 8 + length])
        except ValueError as error:
            self.fail(f"has a header that is not JSON ({error})")
        if not isinstance(header, dict):
            self.fail("has a header that is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            self.fail("has metadata that is not a map of strings")
        entries = {name: self.entry(name, fields, 8 + length) for name, fields in header.items()}
        self.check_extents(entries, 8 + length)
        return entries, metadata

    def entry(self, name: str, fields: object, data_start: int) -> HeaderEntry:
        if not isinstance(fields, dict):
            self.fail(f"describes tensor {name!r} by something else than a JSON object")
        dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            self.fail(f"gives tensor {name!r} the unknown dtype {dtype!r}")
        if not _is_counts(shape):
            self.fail(f"gives tensor {name!r} a shape that is no list of counts")
        if not _is_counts(offsets) or len(offsets) != 2:
            self.fail(f"gives tensor {name!r} data_offsets that are no pair of offsets")
        begin, end = offsets
        nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
        if end - begin != nbytes:
            self.fail(f"gives tensor {name!r} {end - begin} bytes, where {dtype} {list(shape)} takes {nbytes}")
        if data_start + end > self.file.size:
            self.fail(f"has tensor {name!r} end at byte {data_start + end}, beyond the file's {self.file.size}")
        return HeaderEntry(dtype, tuple(shape), data_start + begin, nbytes)

    def check_extents(self, entries: Mapping[str, HeaderEntry], data_start: int) -> None:
        """The data is covered without overlap or hole, as the format demands."""
        position = data_start
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
            if entry.offset != position:
                self.fail(f"has tensor {name!r} start at byte {entry.offset} where the one before ends at {position}")
            position += entry.nbytes
        if position != self.file.size:
            self.fail(f"has {self.file.size - position} bytes after its last tensor")


def _is_counts(value: object) -> TypeGuard[list[int]]:
    # type() rather than isinstance(): true and false are no counts.
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def parse_json(data: bytes) -> Any:
    """JSON without duplicate keys. Raises ValueError for anything else (text, nesting or numbers out of bounds)."""
    try:
        return json.loads(data, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return result


# ---- model folders -------------------------------------------------------------------------------------------------


def read_folder(folder: Path) -> Checkpoint:
    """Opens a folder with config.json and model.safetensors, or shards listed by model.safetensors.index.json.

    Raises ModelFileError if a file is missing, unreadable, truncated or corrupt, and UnsupportedModelError for tensor
    types and quantization schemes that are not supported.
    """
    try:
        present = set(os.listdir(folder))
    except OSError as error:
        raise ModelFileError(folder, f"cannot be read: {error.strerror}") from error
    if "config.json" not in present:
        raise ModelFileError(
            folder, "has no config.json; name a .gguf file or a folder with config.json and safetensors"
        )
    config = _read_json_object(folder / "config.json")
    if (scheme := config.get("quantization_config")) is not None:
        method = scheme.get("quant_method", "unknown") if isinstance(scheme, dict) else "unknown"
        raise UnsupportedModelError(
            f"{folder}: is quantized with {method!r}, which is not supported in safetensors; "
            "use the model's F16 or BF16 checkpoint, or a GGUF file"
        )
    generation_defaults = {}
    if "generation_config.json" in present:
        generation_defaults = _read_json_object(folder / "generation_config.json")
    shards, listed = _shards(folder, present)
    files: list[MappedFile] = []
    tensors: dict[str, TensorInfo] = {}
    places: dict[str, TensorPlace] = {}
    try:
        for shard in shards:
            file = MappedFile(folder / shard)
            files.append(file)
            for name, entry in read_header(file)[0].items():
                if name in tensors:
                    raise ModelFileError(
                        file.path,
                        f"holds tensor {name!r}, which {places[name].file.path.name} holds too; fetch the folder again",
                    )
                if entry.dtype not in _TENSOR_TYPES:
                    raise UnsupportedModelError(
                        f"{file.path}: tensor {name!r} has the unsupported type {entry.dtype}; "
                        "use a checkpoint in F32, F16 or BF16"
                    )
                tensors[name] = TensorInfo(name, entry.shape, _TENSOR_TYPES[entry.dtype], entry.nbytes)
                places[name] = TensorPlace(file, entry.offset)
        for name, shard in listed.items():
            if name not in tensors or places[name].file.path.name != shard:
                raise ModelFileError(
                    folder / shard, f"lacks tensor {name!r}, which {INDEX_FILE} places there; fetch it again"
                )
    except BaseException:
        for file in files:
            file.close()
        raise
    return Checkpoint(
        path=folder,
        kind="hf",
        metadata=config,
        tensors=tensors,
        places=places,
        files=tuple(files),
        generation_defaults=generation_defaults,
        tokenizer_files={name: folder / name for name in TOKENIZER_FILES if name in present},
    )


def _shards(folder: Path, present: set[str]) -> tuple[list[str], dict[str, str]]:
    """File names, and the index's placement of tensors (empty without an index)."""
    if INDEX_FILE in present:
        index_path = folder / INDEX_FILE
        listed = _read_json_object(index_path).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(shard, str) for shard in listed.values()):
            raise ModelFileError(index_path, "has no weight_map from tensors to files; fetch it again")
        shards = sorted(set(listed.values()))
        for shard in shards:
            # A shard is a file of this folder; the index must not lead elsewhere.
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise ModelFileError(
                    index_path, f"names {shard!r}, which is no safetensors file of the folder; fetch it again"
                )
        return shards, listed
    if SINGLE_FILE in present:
        return [SINGLE_FILE], {}
    other = sorted(name for name in present if name.endswith((".bin", ".pth", ".pt")))
    found = f" (it has {other[0]}: convert it to safetensors)" if other else ""
    raise ModelFileError(folder, f"has neither {SINGLE_FILE} nor {INDEX_FILE}{found}")


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelFileError(path, f"is larger than {MAX_JSON_BYTES} bytes, which no model's is")
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise ModelFileError(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelFileError(path, f"is not JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise ModelFileError(path, "is not a JSON object; fetch it again")
    return content
