"""The build cache: one folder per checkpoint, found again by the checkpoint's path and file status.

::

    <cache>/packed/<model>-<digest of its path>/
        lock                            held while this folder is written
        weights-<digest>.safetensors    packed weights (packed_file.py)
        sidecars/<identity>/<name>/     whatever else is slow to derive from the checkpoint
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenmill.cache_folder import cache_folder
from tokenmill.weights.checkpoint import Checkpoint

_DIGEST_CHARACTERS = 16
_LOCK_SECONDS = 0.2
"""Between two looks at a lock that another process holds."""


def source_identity(checkpoint: Checkpoint) -> str:
    """Path, and size, modification time and inode of each tensor file, as JSON: stands for the contents at a start.

    A checkpoint that was copied, moved or touched is packed again, which costs no more than hashing it would.
    """
    files = [
        (mapped.path.name, mapped.status.st_size, mapped.status.st_mtime_ns, mapped.status.st_ino)
        for mapped in checkpoint.files
    ]
    return json.dumps({"path": str(checkpoint.path.resolve()), "files": files})


def short_digest(text: str) -> str:
    """Enough of a digest for a file name."""
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_CHARACTERS]


class CacheEntry:
    """The cache's folder for one checkpoint. Nothing is created before it is needed; writing methods raise OSError."""

    def __init__(self, checkpoint: Checkpoint, cache_dir: Path | None = None) -> None:
        path = checkpoint.path.resolve()
        self.identity = source_identity(checkpoint)
        root = cache_folder() if cache_dir is None else cache_dir
        name = path.stem if checkpoint.kind == "gguf" else path.name
        self.folder = root / "packed" / f"{name}-{short_digest(str(path))}"

    def weights_path(self, structure: str) -> Path:
        """The packed file of a program with this structure (programs of one checkpoint may name different weights)."""
        return self.folder / f"weights-{short_digest(structure)}.safetensors"

    def sidecar(self, name: str) -> Path:
        """A folder for derived data other than weights; its path changes when the checkpoint does.

        Created if missing. Who writes there does so under a temporary name and renames.
        """
        folder = self._sidecars / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def _sidecars(self) -> Path:
        return self.folder / "sidecars" / short_digest(self.identity)

    @contextmanager
    def lock(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Creates the folder and holds its lock; calls ``waiting`` again and again while another process has it.

        The kernel drops the lock with its holder, so a killed process blocks nobody.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            while not _locked(descriptor):
                waiting()
                time.sleep(_LOCK_SECONDS)
            yield
        finally:
            os.close(descriptor)

    def remove_leftovers(self) -> None:
        """Removes partial files of killed processes and sidecars of former contents. Call with the lock held."""
        for partial in self.folder.glob("*.partial"):
            partial.unlink(missing_ok=True)
        current = self._sidecars
        for sidecars in current.parent.glob("*"):
            if sidecars != current:
                shutil.rmtree(sidecars, ignore_errors=True)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
