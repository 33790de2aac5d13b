"""Tokenmill: LLM inference on CPUs.

``from tokenmill import LLM, SamplingParams`` is the front door. Both are loaded at first use: importing the package
itself costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenmill.llm import LLM
    from tokenmill.sampling import SamplingParams
    from tokenmill.structured import StructuredOutputs

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "StructuredOutputs", "__version__"]

_LAZY = {"LLM": "tokenmill.llm", "SamplingParams": "tokenmill.sampling", "StructuredOutputs": "tokenmill.structured"}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
