"""Checkpoints: what a model file holds, in one interface for GGUF files and safetensors folders."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tokenmill.errors import ModelFileError
from tokenmill.weights.formats import Float32, TensorType, UInt8, decode_blocks
from tokenmill.weights.mapped_file import MappedFile

DECODE_PART_VALUES = 1 << 20
"""Values decoded at a time, which bounds working memory to about 16 MB beyond the result."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a checkpoint. ``shape`` is row-major, ``[n, k]`` for a matrix of n rows of k values."""

    name: str
    shape: tuple[int, ...]
    tensor_type: TensorType
    nbytes: int

    @property
    def values(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Values of one row."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """Rows, all leading dimensions taken together; 1 for a vector."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.tensor_type.row_bytes(self.width)


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor's bytes lie."""

    file: MappedFile
    offset: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open model file or folder: metadata, tensors by name, and their bytes and values on demand."""

    path: Path
    kind: Literal["gguf", "hf"]
    metadata: Mapping[str, Any]
    """GGUF metadata, or the contents of config.json."""
    tensors: Mapping[str, TensorInfo]
    places: Mapping[str, TensorPlace]
    files: tuple[MappedFile, ...]
    """The files that hold the tensors."""
    generation_defaults: Mapping[str, Any] = field(default_factory=dict)
    """Sampling parameters recommended by the model's authors, in generation_config.json's names."""
    tokenizer_files: Mapping[str, Path] = field(default_factory=dict)
    """Tokenizer files by file name (empty for GGUF, where the tokenizer lies in ``metadata``)."""

    def info(self, name: str) -> TensorInfo:
        """Raises ModelFileError if there is no tensor ``name``."""
        try:
            return self.tensors[name]
        except KeyError:
            raise ModelFileError(self.path, f"has no tensor {name!r}") from None

    def raw(self, name: str, rows: tuple[int, int] | None = None) -> UInt8:
        """The tensor's bytes as stored, or those of rows [first, last): a flat read-only view of the file.

        Raises ModelFileError for an unknown tensor and IndexError for rows out of range.
        """
        offset, length = self._range(name, rows)
        return self.places[name].file.view(offset, length)

    def decode(self, name: str, rows: tuple[int, int] | None = None) -> Float32:
        """The tensor's values in fp32, in its own shape; of rows [first, last), ``[last - first, width]``.

        Raises as :meth:`raw` does.
        """
        info = self.info(name)
        data = self.raw(name, rows)
        first, last = (0, info.rows) if rows is None else rows
        decoded = np.empty((last - first) * info.width, dtype=np.float32)
        blocks = max(1, DECODE_PART_VALUES // info.tensor_type.block_size)
        step_bytes, step = blocks * info.tensor_type.block_bytes, blocks * info.tensor_type.block_size
        for part in range(-(-decoded.size // step)):
            decoded[part * step : (part + 1) * step] = decode_blocks(
                info.tensor_type, data[part * step_bytes : (part + 1) * step_bytes]
            )
        return decoded.reshape(info.shape if rows is None else (last - first, info.width))

    def prefetch(self, name: str) -> None:
        """Asks the kernel to start reading a tensor."""
        offset, length = self._range(name, None)
        if length:
            self.places[name].file.prefetch(offset, length)

    def release(self, name: str, rows: tuple[int, int] | None = None) -> None:
        """Gives back the tensor's resident pages (they fault in again when touched)."""
        offset, length = self._range(name, rows)
        if length:
            self.places[name].file.release(offset, length)

    def _range(self, name: str, rows: tuple[int, int] | None) -> tuple[int, int]:
        info = self.info(name)
        offset = self.places[name].offset
        if rows is None:
            return offset, info.nbytes
        first, last = rows
        if not 0 <= first <= last <= info.rows:
            raise IndexError(f"rows [{first}, {last}) of tensor {name!r}, which has {info.rows}")
        return offset + first * info.row_bytes, (last - first) * info.row_bytes

    def content_digest(self) -> str:
        """SHA-256 of the tensor file as hex; of several, SHA-256 of their lines as ``sha256sum`` prints them."""
        digests = {mapped.path.name: file_digest(mapped.path) for mapped in self.files}
        if len(digests) == 1:
            return next(iter(digests.values()))
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def close(self) -> None:
        """Drops the mappings; metadata stays usable. Views taken before keep theirs alive."""
        for mapped in self.files:
            mapped.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as hex. Raises ModelFileError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelFileError(path, f"cannot be read: {error.strerror}") from error


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a ``.gguf`` file, or a folder with config.json and safetensors.

    Reads headers and metadata only. Raises ModelFileError for what is missing, unreadable, truncated or corrupt, and
    UnsupportedModelError for well-formed files in formats that are not supported.
    """
    from tokenmill.weights.gguf import read_gguf
    from tokenmill.weights.safetensors import read_folder

    path = Path(path).expanduser()
    try:
        is_folder = path.is_dir()
        exists = path.exists()
    except OSError as error:
        raise ModelFileError(path, f"cannot be read: {error.strerror}") from error
    if not exists:
        raise ModelFileError(path, "no such file or folder")
    if is_folder:
        return read_folder(path)
    if path.suffix == ".safetensors":
        raise ModelFileError(path, "name the folder that holds this file and config.json, not the file itself")
    return read_gguf(path)
