"""A read-only mapping of a model file, whose resident pages can be given back."""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from pathlib import Path

import numpy as np

from tokenmill.errors import ModelFileError
from tokenmill.weights.formats import UInt8

_MAPPED_AROUND = 2 << 20
"""Bytes around a touched page that the kernel may map with it: up to a huge page, where the page cache holds the file
in large pieces. That depends on how the file was written: in 1 MiB pieces on ext4, half of a model stayed mapped."""


class MappedFile:
    """A regular, non-empty file mapped read-only. Views stay valid for as long as they are referenced."""

    def __init__(self, path: Path) -> None:
        """Raises ModelFileError if ``path`` is missing, unreadable, empty or not a regular file."""
        self.path = path
        try:
            # A named pipe would block the open below for ever.
            if not stat.S_ISREG(path.stat().st_mode):
                raise ModelFileError(path, "is not a regular file")
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ModelFileError(path, "no such file") from None
        except OSError as error:
            raise ModelFileError(path, f"cannot be read: {error.strerror}") from error
        try:
            self.status = os.fstat(descriptor)
            self.size = self.status.st_size
            if self.size == 0:
                raise ModelFileError(path, "is empty; fetch it again")
            self.data = mmap.mmap(descriptor, self.size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelFileError(path, f"cannot be mapped: {error.strerror}") from error
        finally:
            os.close(descriptor)

    def view(self, offset: int, length: int) -> UInt8:
        """Bytes [offset, offset + length), without a copy. The caller has checked the range."""
        return np.frombuffer(self.data, dtype=np.uint8, count=length, offset=offset)

    def prefetch(self, offset: int, length: int) -> None:
        """Asks the kernel to start reading a range."""
        self._advise(mmap.MADV_WILLNEED, offset, length)

    def release(self, offset: int, length: int) -> None:
        """Drops the range's pages, and what was mapped around them, from this process.

        They stay in the page cache and fault in again when touched.
        """
        begin = max(0, offset - _MAPPED_AROUND)
        end = min(self.size, offset + length + _MAPPED_AROUND)
        self._advise(mmap.MADV_DONTNEED, begin, end - begin)

    def _advise(self, advice: int, offset: int, length: int) -> None:
        begin = offset // mmap.PAGESIZE * mmap.PAGESIZE
        self.data.madvise(advice, begin, offset + length - begin)

    def close(self) -> None:
        """Unmaps, unless views are still referenced: then the mapping goes with them and this object."""
        with contextlib.suppress(BufferError):  # arrays still point into the mapping
            self.data.close()
