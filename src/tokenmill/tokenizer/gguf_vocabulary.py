"""The vocabulary arrays in the metadata of GGUF files: checked, and made into tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenmill.errors import ModelFileError
from tokenmill.tokenizer.pieces import SPACE_MARK
from tokenmill.tokenizer.sentencepiece import sentencepiece_merges
from tokenmill.tokenizer.vocabulary import Vocabulary

PREFIX = "tokenizer.ggml."


class TokenType(IntEnum):
    """``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class VocabularyArrays:
    """Tokens and their types, with the merges of a byte-level vocabulary or the scores of a SentencePiece one."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        """Raises ModelFileError, naming ``path``, for arrays that are missing or broken, as the methods do."""
        self.metadata = metadata
        self.path = path
        self.tokens: list[str] = self._array("tokens", {str})
        if not self.tokens:
            raise self._broken("tokens", "is empty")
        self.types: list[int] = (
            self._array("token_type", {int}, len(self.tokens))
            if PREFIX + "token_type" in metadata
            else [TokenType.NORMAL] * len(self.tokens)
        )
        if not set(self.types) <= set(TokenType):
            raise self._broken("token_type", f"has types outside {TokenType.NORMAL.value}..{TokenType.BYTE.value}")

    def byte_level(self) -> Vocabulary:
        """The tables of a vocabulary with a merge list."""
        findable = [kind != TokenType.UNUSED for kind in self.types]
        ids = {token: i for i, token in enumerate(self.tokens) if findable[i]}
        entries = self._array("merges", {str})
        merges = np.empty((len(entries), 2), np.int32)
        for number, entry in enumerate(entries):
            left, space, right = entry.partition(" ")
            if not space:
                raise self._broken("merges", f"has an entry without a space: {entry!r} (number {number})")
            try:
                merges[number] = ids[left], ids[right]
            except KeyError as error:
                raise self._broken("merges", f"does not fit the vocabulary: {error} is no token") from None
        return self._tables("merges", self.tokens, findable, merges)

    def sentencepiece(self) -> Vocabulary:
        """The tables of a vocabulary whose merges follow from scores."""
        if PREFIX + "scores" not in self.metadata:
            raise self._broken("scores", "is missing")
        scores: list[float] = self._array("scores", {int, float}, len(self.tokens))
        space_runs = self._space_runs()
        pieces = [SPACE_MARK * len(t) if i in space_runs else t for i, t in enumerate(self.tokens)]
        never_merged = [i for i, kind in enumerate(self.types) if kind != TokenType.NORMAL and i not in space_runs]
        merges = sentencepiece_merges({piece: i for i, piece in enumerate(pieces)}, scores, never_merged, space_runs)
        return self._tables("scores", pieces, [True] * len(pieces), merges)

    def _space_runs(self) -> frozenset[int]:
        """User-defined runs of spaces. Gemma has one of each length from 2 to 31. SentencePiece takes user-defined
        pieces out of the text first; for runs of every length that is the same as merging them before anything else,
        which also finds them in runs of U+2581."""
        runs = {
            i: len(token)
            for i, token in enumerate(self.tokens)
            if self.types[i] == TokenType.USER_DEFINED and token.strip(" ") == ""
        }
        every_length = sorted(runs.values()) == list(range(2, 2 + len(runs)))
        return frozenset(runs) if every_length and SPACE_MARK in self.tokens else frozenset()

    def _tables(
        self, key: str, spellings: Sequence[str], findable: Sequence[bool], merges: npt.NDArray[np.int32]
    ) -> Vocabulary:
        try:
            return Vocabulary.build(spellings, self.types, findable, merges)
        except ValueError as error:
            raise self._broken(key, f"does not fit the vocabulary: {error}") from error

    def _array(self, key: str, elements: Set[type], length: int | None = None) -> list[Any]:
        value = self.metadata.get(PREFIX + key)
        if value is None:
            raise self._broken(key, "is missing")
        if isinstance(value, str) or not hasattr(value, "__len__"):
            raise self._broken(key, f"is no array but {type(value).__name__}")
        if length is not None and len(value) != length:
            raise self._broken(key, f"has {len(value)} entries for {length} tokens")
        entries = value.tolist() if hasattr(value, "tolist") else list(value)
        if not set(map(type, entries)) <= elements:
            raise self._broken(key, "has entries of another type")
        return entries

    def _broken(self, key: str, what: str) -> ModelFileError:
        return ModelFileError(self.path, f"{PREFIX}{key} {what}; the file cannot be tokenized with")
