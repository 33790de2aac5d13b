"""What a result file says beside its figures, so that a stranger can repeat them."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from tokenmill.errors import TokenmillError

_PACKAGES = ("numpy", "torch", "transformers", "tokenizers")
_SETTINGS = ("TOKENMILL_ISA", "TOKENMILL_PIN", "OMP_NUM_THREADS", "OPENBLAS_CORETYPE")


class ResultFileError(TokenmillError):
    """A result file that cannot be read, or that is of another kind than expected."""


def record(kind: str, figures: Mapping[str, object], model: Path | None = None) -> dict[str, object]:
    """``figures`` with versions, processor, settings, model checksum, date and command line.

    ``kind`` is the verb that measured. Figures stay at the top level. Raises ModelFileError if ``model`` is unreadable.
    """
    from tokenmill import __version__

    return {
        "kind": kind,
        **figures,
        **({} if model is None else _model(model)),
        "tokenmill": __version__,
        "python": platform.python_version(),
        "packages": _versions(),
        "machine": processor_name(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": sorted(os.sched_getaffinity(0)),
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": ["tokenmill", *sys.argv[1:]],
    }


def write_record(path: Path, record: Mapping[str, object]) -> None:
    """Writes a record as indented JSON."""
    path.write_text(json.dumps(record, indent=2) + "\n")


def read_record(path: Path) -> dict[str, object]:
    """A result file's contents. Raises ResultFileError if it is none."""
    try:
        loaded = json.loads(path.read_text())
    except OSError as error:
        raise ResultFileError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ResultFileError(f"{path} is no JSON: {error}") from error
    if not isinstance(loaded, dict) or "kind" not in loaded:
        raise ResultFileError(f'{path} is no result file: it has no "kind"')
    return loaded


def processor_name() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _model(path: Path) -> dict[str, object]:
    from tokenmill.weights.checkpoint import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        return {
            "model_sha256": checkpoint.content_digest(),
            "model_bytes": sum(info.nbytes for info in checkpoint.tensors.values()),
        }


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
