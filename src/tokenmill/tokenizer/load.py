"""One door to a model's tokenizer, whichever kind of checkpoint carries it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tokenmill.errors import UnsupportedModelError
from tokenmill.tokenizer.gguf import tokenizer_from_gguf
from tokenmill.tokenizer.huggingface import tokenizer_from_folder
from tokenmill.tokenizer.tokenizer import Tokenizer


class TokenizerCheckpoint(Protocol):
    """What a tokenizer needs to know of a checkpoint."""

    @property
    def kind(self) -> str:
        """``"gguf"`` or ``"hf"``."""

    @property
    def path(self) -> str | os.PathLike[str]:
        """The ``.gguf`` file, or the model folder."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """GGUF metadata by key, or the contents of ``config.json``."""


def load_tokenizer(checkpoint: TokenizerCheckpoint, cache: str | os.PathLike[str] | None = None) -> Tokenizer:
    """Builds the tokenizer of ``checkpoint``.

    ``cache`` is a folder that belongs to the contents of this checkpoint alone; what is slow to derive from a GGUF
    file's vocabulary is kept there (without it, derived each time). Raises ``ModelFileError`` for files that are
    missing or broken and ``UnsupportedModelError`` for tokenizers this version does not know, naming those it does.
    """
    path = Path(checkpoint.path)
    if checkpoint.kind == "gguf":
        return tokenizer_from_gguf(checkpoint.metadata, path, None if cache is None else Path(cache))
    if checkpoint.kind == "hf":
        return tokenizer_from_folder(path, checkpoint.metadata)
    raise UnsupportedModelError(f"{path}: no tokenizer for a checkpoint of kind {checkpoint.kind!r} (known: gguf, hf)")
