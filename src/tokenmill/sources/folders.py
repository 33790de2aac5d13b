"""Where models are kept on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from tokenmill.sources.catalogue import CatalogueModel


def cache_folder() -> Path:
    """``$TOKENMILL_CACHE``, or ``tokenmill`` in ``$XDG_CACHE_HOME`` (by default ``~/.cache``). May not exist yet."""
    if chosen := os.environ.get("TOKENMILL_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "tokenmill"


def models_folder() -> Path:
    """``$TOKENMILL_MODELS``, or ``models`` in the cache folder. May not exist yet."""
    if chosen := os.environ.get("TOKENMILL_MODELS"):
        return Path(chosen).expanduser()
    return cache_folder() / "models"


def partial_folder(model: CatalogueModel) -> Path:
    """Holds what an unfinished pull of ``model`` has so far; removed when the pull is done."""
    return models_folder() / ".partial" / model.name


def local_path(model: CatalogueModel) -> Path:
    """Where the file of ``model`` lies once it is pulled."""
    return models_folder() / model.file_name
