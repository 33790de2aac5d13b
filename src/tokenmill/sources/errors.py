"""Errors of finding and fetching models."""

from __future__ import annotations

from collections.abc import Sequence

from tokenmill.errors import TokenmillError


class SourceError(TokenmillError):
    """One source could not deliver a model; the message is the reason."""


class ModelUnavailableError(TokenmillError):
    """No source delivered the model. Says what was tried, why each failed and what to do."""

    def __init__(self, model: str, failures: Sequence[tuple[str, str]], advice: str) -> None:
        tried = "\n".join(f"  - {source}: {reason}" for source, reason in failures)
        super().__init__(
            f"model {model!r} is not on this machine and no source delivered it. Tried:\n{tried}\n{advice}"
        )
        self.failures = tuple(failures)


class ChecksumError(TokenmillError):
    """A file's SHA-256 is not the expected one."""

    def __init__(self, what: str, expected: str, actual: str) -> None:
        super().__init__(f"{what}: SHA-256 is {actual}, expected {expected}")


class DiskSpaceError(TokenmillError):
    """The models folder's disk is too small for a pull."""
