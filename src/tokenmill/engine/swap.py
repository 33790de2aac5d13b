"""Keeps the pages of preempted sequences in files, so that they need not be computed again.

Each swapped sequence has an unnamed file of its own: space comes back the moment it is closed, nothing needs to be
defragmented, and a crash leaves nothing behind. The space is reserved before the first byte is written, so that a full
disk is known at once and the sequence falls back to being computed again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence as Items
from io import FileIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import Protocol

import numpy as np

from tokenmill.backends.backend import UInt8
from tokenmill.program.step import Int32

_log = logging.getLogger("tokenmill.engine")


class PageMemory(Protocol):
    """Where pages are while they are not swapped (the backend)."""

    def read_page(self, group: int, page: int) -> tuple[UInt8, ...]: ...

    def write_page(self, group: int, page: int, planes: Items[UInt8]) -> None: ...


class SwappedPages:
    """The pages of one sequence in a file. ``computed``: slots that they hold."""

    __slots__ = ("_file", "_places", "_space", "computed", "nbytes")

    def __init__(
        self, space: SwapSpace, file: FileIO, computed: int, nbytes: int, places: dict[tuple[int, int], int]
    ) -> None:
        self._space = space
        self._file = file
        self._places = places
        """Offset in the file by (group, logical page)."""
        self.computed = computed
        self.nbytes = nbytes

    def load(self, missing: Items[tuple[int, int, int]]) -> bool:
        """Writes pages (group, logical page, page) back to memory. False, with a warning, if the file fails."""
        try:
            for group, logical, page in missing:
                self._space.read_page(self._file, self._places[group, logical], group, page)
        except OSError as error:
            self._space.warn("read", error)
            return False
        self._space.swapped_in += 1
        return True

    def close(self) -> None:
        """Gives the file's space back."""
        self._space.free(self.nbytes)
        self._file.close()


class SwapSpace:
    """At most ``limit`` bytes of files in ``folder``, which is made if it is missing."""

    def __init__(self, folder: Path, limit: int, groups: int, memory: PageMemory) -> None:
        self.limit = limit
        self.used = 0
        """Bytes of files."""
        self.swapped_out = 0
        """Sequences that were written, and read back, so far."""
        self.swapped_in = 0
        self._folder = folder
        self._page_bytes = [sum(map(len, memory.read_page(group, 0))) for group in range(groups)]
        self._memory = memory
        self._warned = False

    def store(self, tables: Items[Int32], computed: int) -> SwappedPages | None:
        """Keeps the pages of ``tables`` (one per group, -1 where there is none), which hold ``computed`` slots.

        None if they do not fit the limit, or the folder cannot be written: that gives a warning, once.
        """
        places: dict[tuple[int, int], int] = {}
        nbytes = 0
        for group, table in enumerate(tables):
            for logical, page in enumerate(table):
                if page >= 0:
                    places[group, logical] = nbytes
                    nbytes += self._page_bytes[group]
        if self.used + nbytes > self.limit:
            return None
        file = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
            os.posix_fallocate(file.fileno(), 0, nbytes)
            for (group, logical), place in places.items():
                _write(file, place, self._memory.read_page(group, int(tables[group][logical])))
        except OSError as error:
            if file is not None:
                file.close()
            self.warn("write", error)
            return None
        self.used += nbytes
        self.swapped_out += 1
        return SwappedPages(self, file, computed, nbytes, places)

    def read_page(self, file: FileIO, place: int, group: int, page: int) -> None:
        """Reads one page from a file into memory. Raises OSError."""
        data = bytearray(self._page_bytes[group])
        view = memoryview(data)
        while view:
            count = os.preadv(file.fileno(), [view], place)
            if count == 0:
                raise OSError(f"the swap file ends at byte {place}")
            view, place = view[count:], place + count
        planes = []
        begin = 0
        for plane in self._memory.read_page(group, page):
            planes.append(np.frombuffer(data, np.uint8, len(plane), begin))
            begin += len(plane)
        self._memory.write_page(group, page, planes)

    def free(self, nbytes: int) -> None:
        self.used -= nbytes

    def warn(self, what: str, error: OSError) -> None:
        """Says once that swapping fails."""
        if not self._warned:
            self._warned = True
            _log.warning(
                "cannot %s the swap file in %s (%s); preempted requests are computed again instead",
                what,
                self._folder,
                error,
            )


def _write(file: FileIO, place: int, planes: Items[UInt8]) -> None:
    for plane in planes:
        view = plane.data
        while view:
            count = os.pwrite(file.fileno(), view, place)
            view, place = view[count:], place + count
