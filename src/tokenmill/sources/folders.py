"""Where models are kept on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from tokenmill.cache_folder import cache_folder, expand_home
from tokenmill.sources.catalogue import CatalogueModel


def models_folder() -> Path:
    """``$TOKENMILL_MODELS``, or ``models`` in the cache folder. May not exist yet."""
    if chosen := os.environ.get("TOKENMILL_MODELS"):
        return expand_home(chosen)
    return cache_folder() / "models"


def partial_folder(model: CatalogueModel) -> Path:
    """Holds what an unfinished pull of ``model`` has so far; removed when the pull is done."""
    return models_folder() / ".partial" / model.name


def local_path(model: CatalogueModel) -> Path:
    """Where the file of ``model`` lies once it is pulled."""
    return models_folder() / model.file_name
