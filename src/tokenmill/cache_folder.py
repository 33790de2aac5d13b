"""The folder that Tokenmill fills with what it can make or fetch again: pulled models and packed weights."""

from __future__ import annotations

import os
from pathlib import Path

from tokenmill.errors import UsageError


def cache_folder() -> Path:
    """``$TOKENMILL_CACHE``, or ``tokenmill`` in ``$XDG_CACHE_HOME`` (by default ``~/.cache``). May not exist yet.

    Raises UsageError if that takes a home folder and the user has none.
    """
    if chosen := os.environ.get("TOKENMILL_CACHE"):
        return expand_home(chosen)
    return expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tokenmill"


def expand_home(path: str | Path) -> Path:
    """``path`` with a leading ``~`` replaced. Raises UsageError if there is no home folder to replace it with."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(
            f"{path} needs a home folder that does not exist: set HOME, or TOKENMILL_CACHE to a folder for models and "
            f"packed weights"
        ) from error
