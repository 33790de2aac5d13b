"""The errors that Tokenmill raises on purpose."""

from __future__ import annotations


class TokenmillError(Exception):
    """Base of all errors that name their cause and say what to do."""


class UnsupportedModelError(TokenmillError):
    """The model is of a kind, or uses a feature, that Tokenmill does not run."""
