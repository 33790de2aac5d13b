"""A vocabulary as tables: spellings, kinds, and hash tables of tokens and merges, in memory or mapped from a file.

Building them from the strings of a model file takes up to seconds, mapping them takes none, so that they are kept in
the model's folder of the build cache. The file (little endian): a header of 64-byte units, then the tables, each at a
multiple of 64 bytes. The header holds a magic with the version of the tables, a digest of all that follows the header,
the modification time given to the finished file (while it stands nobody has written to the file, and the digest needs
no check) and the bytes of each table.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenmill import _native

_log = logging.getLogger("tokenmill.tokenizer")

_FILE_NAME = "vocabulary-1.tables"
_MAGIC = b"TMVOCAB1"
_HEADER = struct.Struct("<8s32sQ5Q")
_HEADER_BYTES = 128
_ALIGNMENT = 64

_Table = np.ndarray[Any, np.dtype[Any]]


class Vocabulary:
    """Tokens by id and by spelling, and the merges between them."""

    def __init__(self, types: _Table, starts: _Table, text: _Table, token_slots: _Table, merge_slots: _Table) -> None:
        """``types`` uint8 ``[tokens]``, ``starts`` uint32 ``[tokens + 1]``, ``text`` uint8, and the hash tables of
        ``_native.index_bpe``. Raises ValueError for tables that do not fit each other."""
        if len(starts) != len(types) + 1:
            raise ValueError("the tables of the vocabulary have sizes that do not fit each other")
        self.types: npt.NDArray[np.uint8] = types
        self._tables = (types, starts, text, token_slots, merge_slots)
        self._find = self.bpe().find

    @staticmethod
    def build(
        spellings: Sequence[str], types: Sequence[int], findable: Sequence[bool], merges: npt.NDArray[np.int32]
    ) -> Vocabulary:
        """Makes the tables. ``findable``: which tokens text may become; ``merges`` ``[merges, 2]``: ids of left and
        right parts, best first. Raises ValueError for a merge that joins to no token."""
        encoded = [spelling.encode("utf-8", "replace") for spelling in spellings]
        starts = np.zeros(len(encoded) + 1, np.uint32)
        np.cumsum([len(part) for part in encoded], out=starts[1:])
        text = np.frombuffer(b"".join(encoded), np.uint8)
        slots = _native.index_bpe(text, starts, np.array(findable, np.uint8), np.ascontiguousarray(merges))
        return Vocabulary(np.array(types, np.uint8), starts, text, *slots)

    def __len__(self) -> int:
        return len(self.types)

    def spelling(self, token_id: int) -> str:
        """How the vocabulary writes token ``token_id``, which lies in ``range(len(self))``."""
        _, starts, text, *_ = self._tables
        return text[starts[token_id] : starts[token_id + 1]].tobytes().decode("utf-8", "replace")

    def find(self, spelling: str) -> int | None:
        """The id of the token that text spelled so may become; None if there is none."""
        return self._find(spelling)

    def ids_of(self, types: Iterable[int]) -> list[int]:
        """The ids of all tokens of these types, ascending."""
        found: list[int] = np.flatnonzero(np.isin(self.types, [*types])).tolist()
        return found

    def bpe(
        self, *, ignore_merges: bool = False, byte_fallback: bool = False, unknown: int | None = None
    ) -> _native.Bpe:
        """The merges as a model: see ``BpeOptions`` in csrc/tokenizer/bpe.h."""
        _, starts, text, token_slots, merge_slots = self._tables
        return _native.Bpe(text, starts, token_slots, merge_slots, ignore_merges, byte_fallback, unknown)

    # ---- the file --------------------------------------------------------------------------------------------------

    @staticmethod
    def read(folder: Path) -> Vocabulary | None:
        """Maps the tables kept in ``folder``; None if there are none, or none that are whole."""
        path = folder / _FILE_NAME
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):  # missing, unreadable or empty
            return None
        if len(data) < _HEADER_BYTES:
            return None
        magic, digest, stamp, *sizes = _HEADER.unpack_from(data)
        places = _places(sizes)
        if magic != _MAGIC or places[-1] != len(data):
            return None
        if stamp != status.st_mtime_ns:
            with memoryview(data) as view:
                if _digest(view[_HEADER_BYTES:]) != digest:
                    return None
        types, starts, text, token_slots, merge_slots = (
            np.frombuffer(data, np.uint8, size, place) for size, place in zip(sizes, places, strict=False)
        )
        words = np.dtype("<u4")
        try:
            return Vocabulary(types, starts.view(words), text, token_slots.view(words), merge_slots.view(words))
        except ValueError:
            return None

    def write(self, folder: Path) -> None:
        """Keeps the tables in ``folder``: whole or not at all. If it cannot be written, a warning says so."""
        sizes = [table.nbytes for table in self._tables]
        body = bytearray(_places(sizes)[-1] - _HEADER_BYTES)
        for table, place in zip(self._tables, _places(sizes), strict=False):
            body[place - _HEADER_BYTES : place - _HEADER_BYTES + table.nbytes] = table.tobytes()
        partial = folder / f"{_FILE_NAME}.{os.getpid()}.partial"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                stamp = os.fstat(file.fileno()).st_mtime_ns
                header = _HEADER.pack(_MAGIC, _digest(memoryview(body)), stamp, *sizes)
                file.write(header.ljust(_HEADER_BYTES, b"\0"))
                file.write(body)
                file.flush()
                os.utime(file.fileno(), ns=(stamp, stamp))
            partial.replace(folder / _FILE_NAME)
        except OSError as error:
            _log.warning("the tokenizer's tables cannot be kept in %s (%s); going on without", folder, error)
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def _places(sizes: Sequence[int]) -> list[int]:
    """Where each table begins in the file, and the file's end."""
    places = [_HEADER_BYTES]
    for size in sizes:
        places.append(places[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    return places


def _digest(data: memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()
