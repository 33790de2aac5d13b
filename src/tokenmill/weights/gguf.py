"""Reads GGUF files, versions 2 and 3: header, metadata and tensor table, from a mapping.

Layout (little endian): magic ``GGUF``, u32 version, u64 tensor count, u64 metadata count; metadata entries (key, u32
type, value); tensor entries (name, u32 number of dimensions, u64 extents with the row's length first, u32 type, u64
offset); padding to ``general.alignment``; tensor data. A string is a u64 length and UTF-8 bytes; an array is u32 type,
u64 count, elements.

The file is untrusted: every count, length and offset is compared with the bytes that are left before anything is
allocated for it, so that a corrupt file costs an error, not memory or time.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NoReturn

import numpy as np

from tokenmill import _native
from tokenmill.errors import ModelFileError, UnsupportedModelError
from tokenmill.weights.checkpoint import Checkpoint, TensorInfo, TensorPlace
from tokenmill.weights.formats import SUPPORTED_TYPES, TensorType
from tokenmill.weights.mapped_file import MappedFile

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 65535
"""Keys may be this long by the specification; tensor names are far shorter in practice."""

Scalar = bool | int | float | str
MetadataValue = Scalar | list[bool] | list[int] | list[float] | list[str]


class ValueType(IntEnum):
    """Metadata value types by their GGUF number."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


class Metadata(Mapping[str, MetadataValue]):
    """GGUF metadata in plain Python values. Arrays become lists on first use: vocabularies have 10^5 entries, and a
    start from the build cache needs none of them."""

    def __init__(self, path: Path, values: Mapping[str, Scalar | PackedArray]) -> None:
        self._path = path
        self._values: dict[str, MetadataValue | PackedArray] = dict(values)

    def __getitem__(self, key: str) -> MetadataValue:
        """Raises ModelFileError if the value is an array of strings that are not UTF-8."""
        value = self._values[key]
        if isinstance(value, PackedArray):
            try:
                value = value.unpack()
            except UnicodeDecodeError as error:
                raise ModelFileError(
                    self._path,
                    f"metadata {key!r} holds a string that is not UTF-8 ({error.reason}); the file is corrupt",
                ) from None
            self._values[key] = value
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values


@dataclass(frozen=True, slots=True)
class PackedArray:
    """An array of the metadata in the file's bytes; its extent has been checked."""

    element: ValueType
    count: int
    data: bytes

    def unpack(self) -> list[bool] | list[int] | list[float] | list[str]:
        if self.element is not ValueType.STRING:
            values: list[int] = np.frombuffer(self.data, dtype=_NUMBERS[self.element]).tolist()
            return [value != 0 for value in values] if self.element is ValueType.BOOL else values
        strings, position, data, unpack_length = [], 0, self.data, _U64.unpack_from
        for _ in range(self.count):
            start = position + 8
            position = start + unpack_length(data, position)[0]
            strings.append(str(data[start:position], "utf-8"))
        return strings


_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_NUMBERS: dict[ValueType, str] = {
    ValueType.UINT8: "<u1",
    ValueType.INT8: "<i1",
    ValueType.UINT16: "<u2",
    ValueType.INT16: "<i2",
    ValueType.UINT32: "<u4",
    ValueType.INT32: "<i4",
    ValueType.FLOAT32: "<f4",
    ValueType.BOOL: "<u1",
    ValueType.UINT64: "<u8",
    ValueType.INT64: "<i8",
    ValueType.FLOAT64: "<f8",
}

# The least a metadata entry and a tensor entry can take, which bounds their counts.
_MIN_ENTRY_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8

# Sampling parameters that a file may recommend, in generation_config.json's names.
_GENERATION_KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


def read_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file and checks its whole structure.

    Raises ModelFileError if it is unreadable, truncated or corrupt, and UnsupportedModelError for versions, byte orders
    and tensor types that are not supported.
    """
    file = MappedFile(path)
    try:
        return _Reader(file).read()
    except BaseException:
        file.close()
        raise


class _Reader:
    """One pass over the header; ``position`` is the next unread byte."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.path = file.path
        self.data = file.data
        self.bytes = file.view(0, file.size)
        self.size = file.size
        self.position = 0

    def read(self) -> Checkpoint:
        if self.data[:4] != MAGIC:
            self.fail("is not a GGUF file (it does not start with 'GGUF')")
        self.position = 4
        version = self.u32("the version")
        if version & 0xFFFF == 0:
            raise UnsupportedModelError(f"{self.path}: is a big-endian GGUF file; convert it to little endian")
        if version not in VERSIONS:
            raise UnsupportedModelError(f"{self.path}: is GGUF version {version}; versions 2 and 3 are supported")
        tensor_count = self.count("the tensor count", _MIN_TENSOR_BYTES)
        entry_count = self.count("the metadata count", _MIN_ENTRY_BYTES)
        metadata = self.metadata(entry_count)
        if int(self.scalar(metadata, "split.count", 1)) > 1:
            raise UnsupportedModelError(
                f"{self.path}: is one part of a split model; merge the parts first (llama-gguf-split --merge)"
            )
        alignment = int(self.scalar(metadata, "general.alignment", DEFAULT_ALIGNMENT))
        if alignment <= 0 or alignment & (alignment - 1):
            self.fail(f"metadata 'general.alignment' is {alignment}, not a power of two; the file is corrupt")
        tensors, offsets = self.tensor_table(tensor_count, alignment)
        data_start = -(-self.position // alignment) * alignment
        self.check_extents(tensors, offsets, data_start)
        return Checkpoint(
            path=self.path,
            kind="gguf",
            metadata=Metadata(self.path, metadata),
            tensors=tensors,
            places={name: TensorPlace(self.file, data_start + offset) for name, offset in offsets.items()},
            files=(self.file,),
            generation_defaults={
                name: metadata[key]
                for key, name in _GENERATION_KEYS.items()
                if isinstance(metadata.get(key), int | float)
            },
        )

    # ---- metadata --------------------------------------------------------------------------------------------------

    def metadata(self, count: int) -> dict[str, Scalar | PackedArray]:
        metadata: dict[str, Scalar | PackedArray] = {}
        for index in range(count):
            key = self.string(f"the key of metadata entry {index}", MAX_NAME_BYTES)
            if key in metadata:
                self.fail(f"metadata {key!r} appears twice; the file is corrupt")
            what = f"metadata {key!r}"
            kind = self.value_type(what)
            metadata[key] = self.array(what) if kind is ValueType.ARRAY else self.value(kind, what)
        return metadata

    def value_type(self, what: str) -> ValueType:
        number = self.u32(f"the type of {what}")
        try:
            return ValueType(number)
        except ValueError:
            self.fail(f"{what} has the unknown value type {number}; the file is corrupt or newer than this reader")

    def value(self, kind: ValueType, what: str) -> Scalar:
        if kind is ValueType.STRING:
            return self.string(what, self.size)
        dtype = np.dtype(_NUMBERS[kind])
        number: int | float = np.frombuffer(self.take(dtype.itemsize, what), dtype=dtype)[0].item()
        if kind is ValueType.BOOL:
            if number > 1:
                self.fail(f"{what} is a truth value of {number}; the file is corrupt")
            return number == 1
        return number

    def array(self, what: str) -> PackedArray:
        element = self.value_type(f"the elements of {what}")
        if element is ValueType.ARRAY:
            self.fail(f"{what} is an array of arrays, which no known model uses; the file is corrupt")
        if element is not ValueType.STRING:
            width = np.dtype(_NUMBERS[element]).itemsize
            count = self.count(f"the length of {what}", width)
            return PackedArray(element, count, self.take(count * width, what))
        count = self.count(f"the length of {what}", 8)
        # Vocabularies have 10^5 strings; only their lengths are looked at.
        start, position = self.position, _native.skip_strings(self.bytes, self.position, count)
        if position < 0:
            self.fail(f"ends inside the strings of {what}; the file is truncated or corrupt, fetch it again")
        self.position = position
        return PackedArray(element, count, self.data[start:position])

    def scalar(self, metadata: Mapping[str, Scalar | PackedArray], key: str, default: int) -> int:
        value = metadata.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            self.fail(f"metadata {key!r} is not an integer; the file is corrupt")
        return value

    # ---- tensors ---------------------------------------------------------------------------------------------------

    def tensor_table(self, count: int, alignment: int) -> tuple[dict[str, TensorInfo], dict[str, int]]:
        """Tensors by name, and their offsets from the start of the data."""
        tensors: dict[str, TensorInfo] = {}
        offsets: dict[str, int] = {}
        for index in range(count):
            name = self.string(f"the name of tensor {index}", MAX_NAME_BYTES)
            if name in tensors:
                self.fail(f"tensor {name!r} appears twice; the file is corrupt")
            tensors[name] = self.tensor_info(name)
            offset = self.u64(f"the offset of tensor {name!r}")
            if offset % alignment:
                self.fail(f"tensor {name!r} starts at {offset}, not at a multiple of {alignment}; the file is corrupt")
            offsets[name] = offset
        return tensors, offsets

    def tensor_info(self, name: str) -> TensorInfo:
        dimensions = self.u32(f"the dimensions of tensor {name!r}")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            self.fail(f"tensor {name!r} has {dimensions} dimensions, not 1 to {MAX_DIMENSIONS}; the file is corrupt")
        extents = [self.u64(f"the shape of tensor {name!r}") for _ in range(dimensions)]
        shape = tuple(reversed(extents))
        number = self.u32(f"the type of tensor {name!r}")
        if number not in _TYPES:
            raise UnsupportedModelError(f"{self.path}: tensor {name!r} has the unknown type {number}; {_TYPE_ADVICE}")
        tensor_type = _TYPES[number]
        if not tensor_type.supported:
            raise UnsupportedModelError(
                f"{self.path}: tensor {name!r} has the unsupported type {tensor_type.name}; {_TYPE_ADVICE}"
            )
        if 0 in shape:
            self.fail(f"tensor {name!r} has the shape {list(shape)}, which holds nothing; the file is corrupt")
        if shape[-1] % tensor_type.block_size:
            self.fail(
                f"tensor {name!r} has rows of {shape[-1]} values, not a multiple of the {tensor_type.block_size} in a "
                f"block of {tensor_type.name}; the file is corrupt"
            )
        # Python integers do not overflow, so an absurd shape gives an absurd size, which the extents check refuses.
        nbytes = tensor_type.row_bytes(shape[-1])
        for extent in shape[:-1]:
            nbytes *= extent
        if nbytes > self.size:
            self.fail(
                f"tensor {name!r} of shape {list(shape)} would take {nbytes} bytes, more than the file's {self.size}; "
                "the file is truncated or corrupt, fetch it again"
            )
        return TensorInfo(name, shape, tensor_type, nbytes)

    def check_extents(self, tensors: Mapping[str, TensorInfo], offsets: Mapping[str, int], data_start: int) -> None:
        """Tensors lie inside the file and do not overlap."""
        previous, previous_end = "", 0
        for name in sorted(tensors, key=offsets.__getitem__):
            begin, end = offsets[name], offsets[name] + tensors[name].nbytes
            if begin < previous_end:
                self.fail(f"tensors {previous!r} and {name!r} overlap; the file is corrupt")
            if data_start + end > self.size:
                self.fail(
                    f"tensor {name!r} ends at byte {data_start + end}, beyond the file's {self.size}; "
                    "the file is truncated, fetch it again"
                )
            previous, previous_end = name, end

    # ---- primitives ------------------------------------------------------------------------------------------------

    def take(self, length: int, what: str) -> bytes:
        if length > self.size - self.position:
            self.fail(f"ends inside {what}; the file is truncated or corrupt, fetch it again")
        start = self.position
        self.position += length
        return self.data[start : self.position]

    def u32(self, what: str) -> int:
        number: int = _U32.unpack(self.take(4, what))[0]
        return number

    def u64(self, what: str) -> int:
        number: int = _U64.unpack(self.take(8, what))[0]
        return number

    def count(self, what: str, least_bytes: int) -> int:
        """A u64 count of items that take at least ``least_bytes`` each."""
        count = self.u64(what)
        if count * least_bytes > self.size - self.position:
            self.fail(
                f"{what} is {count}, more than the file could hold; the file is truncated or corrupt, fetch it again"
            )
        return count

    def string(self, what: str, limit: int) -> str:
        length = self.u64(what)
        if length > limit:
            self.fail(f"{what} claims {length} bytes; the file is corrupt")
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8; the file is corrupt")

    def fail(self, message: str) -> NoReturn:
        raise ModelFileError(self.path, message)


_TYPES = {int(t): t for t in TensorType}
_TYPE_ADVICE = f"use a file made of {', '.join(t.name for t in SUPPORTED_TYPES)} (for instance Q4_K_M or Q8_0)"
