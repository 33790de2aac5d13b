"""The errors a user may see. Each message names the file, tensor or parameter at fault and says what to do.

The command line prints ``str(error)`` without a traceback and exits with the class's ``exit_code``.
"""

from __future__ import annotations

import os
from typing import ClassVar


class TokenmillError(Exception):
    """Base of all errors raised on purpose."""

    exit_code: ClassVar[int] = 1


class UsageError(TokenmillError):
    """A parameter, option or combination of them that makes no sense."""

    exit_code = 2


class ModelFileError(TokenmillError):
    """A model file that is missing, unreadable, truncated or corrupt.

    ``path`` is the file (or folder), ``message`` names the tensor or metadata key and says what to do.
    """

    def __init__(self, path: str | os.PathLike[str], message: str) -> None:
        super().__init__(os.fspath(path), message)
        self.path = os.fspath(path)
        self.message = message

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


class UnsupportedModelError(TokenmillError):
    """A well-formed model that this version cannot run: unknown architecture, tensor type or feature."""


class MemoryLimitError(TokenmillError):
    """The memory budget does not hold what was asked for."""
