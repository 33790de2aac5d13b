"""The build cache's file: packed weights in a safetensors container, written once and mapped ever after.

Each weight is one tensor at a multiple of 64 bytes (matrices as U8 in the kernels' layout, vectors as F32; the format
allows no holes, so tensors named ``padding.*`` fill them). The file's metadata holds ``key``, which says what was
packed from what, ``checksums``, the CRC-32 of each weight (against accidents: whoever can write the cache can replace
the weights), and ``stamp``, the modification time given to the finished file: while it stands, nobody has written to
the file since, and the checksums need no check.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokenmill.errors import ModelFileError
from tokenmill.weights.formats import UInt8
from tokenmill.weights.mapped_file import MappedFile
from tokenmill.weights.safetensors import HeaderEntry, parse_json, read_header

ALIGNMENT = 64
_STAMP_DIGITS = 20
_PIECE = 4 << 20
"""Bytes of one write, at multiples of them. What is written in whole pieces of 2 MiB or more, Linux keeps in huge pages
of the page cache (ext4 since 6.16, XFS since 5.18) and maps by huge pages: decoding reads weights a tenth faster."""


@dataclass(frozen=True, slots=True)
class PackedEntry:
    """A weight of the file, ``nbytes`` long at ``offset`` from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where each weight lies. The same offsets serve the file's data and a copy in memory."""

    entries: dict[str, PackedEntry]
    paddings: tuple[PackedEntry, ...]
    nbytes: int

    @staticmethod
    def of(weights: Sequence[tuple[str, str, tuple[int, ...], int]]) -> PackedLayout:
        """Lays out (name, dtype, shape, bytes) one after the other."""
        entries: dict[str, PackedEntry] = {}
        paddings: list[PackedEntry] = []
        position = 0
        for name, dtype, shape, nbytes in weights:
            if gap := -position % ALIGNMENT:
                paddings.append(PackedEntry(f"padding.{len(paddings)}", "U8", (gap,), position, gap))
                position += gap
            entries[name] = PackedEntry(name, dtype, shape, position, nbytes)
            position += nbytes
        return PackedLayout(entries, tuple(paddings), position)

    def header(self, key: str, checksums: dict[str, str], stamp: int) -> bytes:
        """The file's first bytes up to the data; their length depends on the layout and the key alone."""
        tensors = {
            entry.name: {
                "dtype": entry.dtype,
                "shape": entry.shape,
                "data_offsets": (entry.offset, entry.offset + entry.nbytes),
            }
            for entry in (*self.entries.values(), *self.paddings)
        }
        metadata = {
            "key": key,
            "checksums": json.dumps({name: checksums.get(name, _checksum_text(0)) for name in self.entries}),
            "stamp": f"{stamp:0{_STAMP_DIGITS}d}",
        }
        header = json.dumps({"__metadata__": metadata, **tensors}, separators=(",", ":")).encode()
        header += b" " * (-(8 + len(header)) % ALIGNMENT)
        return struct.pack("<Q", len(header)) + header


class PackedFileWriter:
    """Writes a packed file beside ``path`` and moves it there when it is complete and on disk.

    A context manager: leaving it without :meth:`finish` removes what was written. Methods raise OSError, above all when
    the disk is full, which the preallocation in ``__enter__`` finds out first where the file system can tell.
    """

    def __init__(self, path: Path, layout: PackedLayout, key: str) -> None:
        self._path = path
        self._partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        self._layout = layout
        self._key = key
        self._data_start = len(layout.header(key, {}, 0))
        self._checksums = dict.fromkeys(layout.entries, 0)
        self._descriptor = -1
        self._piece = bytearray(_PIECE)
        self._end = 0
        """Offset in the file after the last byte that was staged; the pieces before its own are written."""

    def __enter__(self) -> PackedFileWriter:
        self._descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            os.posix_fallocate(self._descriptor, 0, self._data_start + self._layout.nbytes)
        except BaseException:
            self.__exit__()
            raise
        return self

    def write(self, name: str, offset: int, part: UInt8) -> None:
        """Writes the next part of a weight; weights come in the layout's order, and so do the parts of each."""
        # Not through a mapping, whose dirty pages would count as this process's memory until they are on disk.
        self._checksums[name] = zlib.crc32(part.data, self._checksums[name])
        self._stage(bytes(self._data_start + self._layout.entries[name].offset + offset - self._end))
        self._stage(part.data)

    def finish(self) -> None:
        """Makes the file durable and visible under its name."""
        self._write_at(self._end // _PIECE * _PIECE, memoryview(self._piece)[: self._end % _PIECE])
        stamp = int(time.time()) * 1_000_000_000
        checksums = {name: _checksum_text(value) for name, value in self._checksums.items()}
        self._write_at(0, memoryview(self._layout.header(self._key, checksums, stamp)))
        os.utime(self._descriptor, ns=(stamp, stamp))
        os.fsync(self._descriptor)
        os.replace(self._partial, self._path)
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def __exit__(self, *exception: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._partial.unlink(missing_ok=True)

    def _stage(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            at = self._end % _PIECE
            taken = rest[: _PIECE - at]
            self._piece[at : at + len(taken)] = taken
            self._end += len(taken)
            rest = rest[len(taken) :]
            if self._end % _PIECE == 0:
                self._write_at(self._end - _PIECE, memoryview(self._piece))

    def _write_at(self, offset: int, data: memoryview) -> None:
        while data:
            written = os.pwrite(self._descriptor, data, offset)
            data, offset = data[written:], offset + written


def open_packed(path: Path, layout: PackedLayout, key: str, verify: bool) -> PackedStore | None:
    """Maps a packed file; None if there is none for this key.

    Header and length are always checked. So are the checksums if ``verify``, or if the file was written to, copied or
    touched since it was finished. Raises ModelFileError naming the damage.
    """
    if not path.exists():
        return None
    file = MappedFile(path)
    try:
        entries, metadata = read_header(file)
        if metadata.get("key") != key:
            file.close()
            return None
        data_start = len(layout.header(key, {}, 0))
        for expected in layout.entries.values():
            place = HeaderEntry(expected.dtype, expected.shape, data_start + expected.offset, expected.nbytes)
            if entries.get(expected.name) != place:
                raise ModelFileError(path, f"does not hold {expected.name!r} where it belongs")
        stamp = metadata.get("stamp", "")
        if len(stamp) != _STAMP_DIGITS or not (stamp.isascii() and stamp.isdigit()):
            raise ModelFileError(path, "has no stamp")
        untouched = int(stamp) == file.status.st_mtime_ns
        if verify or not untouched:
            _verify_checksums(file, layout, data_start, metadata.get("checksums", ""))
        if not untouched:
            with contextlib.suppress(OSError):  # a read-only cache is verified at each start
                os.utime(path, ns=(int(stamp), int(stamp)))
    except BaseException:
        file.close()
        raise
    file.prefetch(0, file.size)
    return PackedStore(layout, file.data, data_start)


def _verify_checksums(file: MappedFile, layout: PackedLayout, data_start: int, recorded: str) -> None:
    try:
        checksums = parse_json(recorded.encode())
    except ValueError:
        checksums = None
    if not isinstance(checksums, dict):
        raise ModelFileError(file.path, "has no checksums of its weights")
    for entry in layout.entries.values():
        begin = data_start + entry.offset
        actual = _checksum_text(zlib.crc32(file.view(begin, entry.nbytes).data))
        file.release(begin, entry.nbytes)
        if checksums.get(entry.name) != actual:
            raise ModelFileError(file.path, f"has damaged data in {entry.name!r}")


def _checksum_text(value: int) -> str:
    return f"{value:08x}"


class PackedStore:
    """The data of a layout in memory: a mapped file (read-only), or private pages."""

    def __init__(self, layout: PackedLayout, data: mmap.mmap, data_start: int) -> None:
        self.layout = layout
        self._data: mmap.mmap | None = data
        self._data_start = data_start

    @staticmethod
    def in_memory(layout: PackedLayout) -> PackedStore:
        """Zeroed pages, allocated when touched. Raises MemoryError or OSError if there is no address space."""
        data = mmap.mmap(-1, max(layout.nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            data.madvise(mmap.MADV_HUGEPAGE)
        return PackedStore(layout, data, 0)

    def view(self, name: str) -> UInt8:
        """The bytes of a weight, 64-byte aligned. Raises KeyError for an unknown name, ValueError once closed."""
        if self._data is None:
            raise ValueError("the weights are closed")
        entry = self.layout.entries[name]
        return np.frombuffer(self._data, dtype=np.uint8, count=entry.nbytes, offset=self._data_start + entry.offset)

    def close(self) -> None:
        """Drops the mapping; it goes when the last view does."""
        self._data = None
