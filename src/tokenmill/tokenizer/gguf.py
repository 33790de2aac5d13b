"""Tokenizers from the metadata of GGUF files.

A GGUF file carries a vocabulary, token types and merges or scores, but not the rules around them: those are implied
by ``tokenizer.ggml.model`` and ``tokenizer.ggml.pre``. The reference for what they imply is the tokenizer of the model
that the file was made from, as `transformers` runs it, and llama.cpp where the file is all there is. Where the two
differ, this is what is done here:

* text is brought into NFC for Qwen, as in the model's tokenizer; llama.cpp leaves it as it is;
* U+2581 in a text is a space to Gemma's runs of spaces, as in the model's tokenizer;
* a character that a byte-level vocabulary cannot spell is dropped before merging, as `tokenizers` does, not after;
* Phi-3 swallows all white space after a control token, as in the model's tokenizer; llama.cpp takes ASCII's;
* the patterns of ``tekken`` and ``gpt-4o`` are the models' own; llama.cpp's treat combining marks otherwise;
* the text of a control token never merges into the token unless control tokens are asked for, as in SentencePiece,
  even where the vocabulary has the pieces for it; llama.cpp merges on text alone;
* which tokens are control tokens is what the file says. It marks more so (fill-in-the-middle, unused ones) than
  ``tokenizer.json`` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from enum import IntEnum
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from tokenmill.errors import ModelFileError, UnsupportedModelError
from tokenmill.tokenizer.byte_level import BYTE_LEVEL_RULES
from tokenmill.tokenizer.chat_template import ChatTemplates
from tokenmill.tokenizer.end_tokens import end_tokens_by_text, turn_end_by_text
from tokenmill.tokenizer.pieces import SPACE_MARK, byte_level_bytes, sentencepiece_bytes
from tokenmill.tokenizer.sentencepiece import sentencepiece_merges
from tokenmill.tokenizer.tokenizer import Tokenizer, TokenizerParts

_PREFIX = "tokenizer.ggml."
_MODELS = ("gpt2", "llama")


class TokenType(IntEnum):
    """``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_SPECIAL = (TokenType.CONTROL, TokenType.UNKNOWN)


def tokenizer_from_gguf(metadata: Mapping[str, Any], path: Path, cache_dir: Path | None = None) -> Tokenizer:
    """The tokenizer that GGUF ``metadata`` (key to value; arrays as sequences) describes; ``path`` names the file in
    errors. Raises ``ModelFileError`` for broken metadata, ``UnsupportedModelError`` for an unknown kind."""
    return _GgufVocabulary(metadata, path).tokenizer(cache_dir)


class _Spelling:
    """The bytes of each token. Holds on to the vocabulary and nothing else of the file."""

    def __init__(self, tokens: Sequence[str], types: Sequence[int], byte_level: bool) -> None:
        self._tokens = tokens
        self._types = bytes(types)
        self._byte_level = byte_level

    def token_bytes(self, token_id: int) -> bytes:
        if token_id >= len(self._tokens) or self._types[token_id] == TokenType.UNUSED:
            return b""
        token = self._tokens[token_id]
        if not self._byte_level:
            return sentencepiece_bytes(token)
        ordinary = self._types[token_id] == TokenType.NORMAL
        return byte_level_bytes(token) if ordinary else token.encode("utf-8", "replace")


class _GgufVocabulary:
    """The tokenizer part of a file's metadata, checked."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        self.metadata = metadata
        self.path = path
        self.model = self._string("model")
        if self.model not in _MODELS:
            raise UnsupportedModelError(
                f"{path}: {_PREFIX}model is {self.model!r}; known tokenizer models: {', '.join(_MODELS)}"
            )
        self.tokens: list[str] = self._array("tokens", {str})
        if not self.tokens:
            raise self._broken("tokens", "is empty")
        self.types: list[int] = (
            self._array("token_type", {int}, len(self.tokens))
            if _PREFIX + "token_type" in metadata
            else [TokenType.NORMAL] * len(self.tokens)
        )
        if not set(self.types) <= set(TokenType):
            raise self._broken("token_type", f"has types outside {TokenType.NORMAL.value}..{TokenType.BYTE.value}")
        self.special = frozenset(i for i, kind in enumerate(self.types) if kind in _SPECIAL)

    def tokenizer(self, cache_dir: Path | None) -> Tokenizer:
        byte_level = self.model == "gpt2"
        if byte_level:
            add_bos, leading_spaces, backend = self._byte_level()
        else:
            add_bos, leading_spaces, backend = self._sentencepiece(cache_dir)
        default_ids = (None, None, None) if byte_level else (1, 2, 0)
        bos_id, eos_id, unk_id = (
            self._token_id(key, default) for key, default in zip(("bos", "eos", "unknown"), default_ids, strict=True)
        )
        control = {self.tokens[i]: i for i in self.special}
        eot_id, eom_id = self._token_id("eot"), self._token_id("eom")
        ends = end_tokens_by_text(control) | {i for i in (eos_id, eot_id, eom_id) if i is not None}
        return Tokenizer(
            TokenizerParts(
                backend=backend,
                token_bytes=_Spelling(self.tokens, self.types, byte_level).token_bytes,
                vocab_size=len(self.tokens),
                special_ids=self.special,
                prefix=self._surrounding("add_bos_token", add_bos, "bos_token_id", bos_id),
                suffix=self._surrounding("add_eos_token", False, "eos_token_id", eos_id),
                bos_id=bos_id,
                eos_id=eos_id,
                eot_id=turn_end_by_text(control) if eot_id is None else eot_id,
                pad_id=self._token_id("padding"),
                unk_id=unk_id,
                eos_ids=frozenset(ends),
                leading_spaces=leading_spaces,
                chat_templates=self._chat_templates(bos_id, eos_id, unk_id),
            )
        )

    def _byte_level(self) -> tuple[bool, int, Backend]:
        pre = self._string("pre") if _PREFIX + "pre" in self.metadata else "default"
        rules = BYTE_LEVEL_RULES.get(pre)
        if rules is None:
            known = ", ".join(BYTE_LEVEL_RULES)
            raise UnsupportedModelError(f"{self.path}: {_PREFIX}pre is {pre!r}; known pre-tokenizers: {known}")
        vocabulary = {token: i for i, token in enumerate(self.tokens) if self.types[i] != TokenType.UNUSED}
        entries = self._array("merges", {str})
        merges = [cast("tuple[str, str]", tuple(entry.split(" ", 1))) for entry in entries]
        if not set(map(len, merges)) <= {2}:
            number = next(i for i, parts in enumerate(merges) if len(parts) != 2)
            raise self._broken("merges", f"has an entry without a space: {entries[number]!r} (number {number})")
        backend = Backend(self._bpe("merges", vocabulary, merges, ignore_merges=rules.ignore_merges))
        normalizer = rules.normalizer()
        if normalizer is not None:
            backend.normalizer = normalizer
        backend.pre_tokenizer = rules.pre_tokenizer()
        backend.decoder = decoders.ByteLevel()
        self._add_tokens(backend, self.tokens)
        return rules.add_bos, 0, backend

    def _sentencepiece(self, cache_dir: Path | None) -> tuple[bool, int, Backend]:
        if _PREFIX + "scores" not in self.metadata:
            raise self._broken("scores", "is missing")
        scores: list[float] = self._array("scores", {int, float}, len(self.tokens))
        space_runs = self._space_runs()
        pieces = [SPACE_MARK * len(t) if i in space_runs else t for i, t in enumerate(self.tokens)]
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        never_merged = [i for i, kind in enumerate(self.types) if kind != TokenType.NORMAL and i not in space_runs]
        table = sentencepiece_merges(vocabulary, scores, never_merged, space_runs, cache_dir)
        left, right = ([pieces[i] for i in side] for side in table.T.tolist())
        merges = list(zip(left, right, strict=True))
        unk_id = self._token_id("unknown", 0)
        unknown = None if unk_id is None else pieces[unk_id]
        backend = Backend(self._bpe("scores", vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
        mark_spaces = normalizers.Replace(" ", SPACE_MARK)
        prefix_space = bool(self.metadata.get(_PREFIX + "add_space_prefix", True))
        backend.normalizer = (
            normalizers.Sequence([normalizers.Prepend(SPACE_MARK), mark_spaces]) if prefix_space else mark_spaces
        )
        self._add_tokens(backend, pieces)
        return True, int(prefix_space), backend

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

    def _bpe(self, key: str, vocabulary: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> models.BPE:
        try:
            return models.BPE(vocabulary, merges, **options)
        except Exception as error:  # the library raises plain Exception for an unknown part
            raise self._broken(key, f"does not fit the vocabulary: {error}") from error

    def _add_tokens(self, backend: Backend, spelled: Sequence[str]) -> None:
        """Control tokens and user-defined tokens are recognised in the text before it is normalized and cut."""
        # Phi-3 swallows the white space after a control token.
        swallows = self.metadata.get("general.architecture") == "phi3" and self.model == "llama"
        keeps_space = ("<unk>", "<s>", "<|endoftext|>")
        backend.add_tokens(
            [
                AddedToken(
                    spelled[i],
                    normalized=False,
                    special=kind in _SPECIAL,
                    rstrip=swallows and spelled[i] not in keeps_space,
                )
                for i, kind in enumerate(self.types)
                if kind in _SPECIAL or kind == TokenType.USER_DEFINED
            ]
        )
        if backend.get_vocab_size() > len(self.tokens):
            raise self._broken("tokens", "has control tokens that are not in the vocabulary")

    def _surrounding(self, flag: str, default: bool, key: str, token_id: int | None) -> tuple[int, ...]:
        if not self.metadata.get(_PREFIX + flag, default):
            return ()
        if token_id is None:
            if _PREFIX + flag not in self.metadata:
                return ()
            raise self._broken(flag, f"is true, but there is no {_PREFIX}{key}")
        return (token_id,)

    def _chat_templates(self, bos_id: int | None, eos_id: int | None, unk_id: int | None) -> ChatTemplates | None:
        single = "tokenizer.chat_template"
        sources = {  # by key, because reading a value may unpack a large array
            "default" if key == single else key.removeprefix(single + "."): self.metadata[key]
            for key in self.metadata
            if key == single or key.startswith(single + ".")
        }
        if not sources:
            return None
        for value in sources.values():
            if not isinstance(value, str):
                raise ModelFileError(self.path, "tokenizer.chat_template is not a string; the file is broken")
        named = {"bos_token": bos_id, "eos_token": eos_id, "unk_token": unk_id, "pad_token": self._token_id("padding")}
        return ChatTemplates(sources, {name: self.tokens[i] for name, i in named.items() if i is not None})

    def _token_id(self, name: str, default: int | None = None) -> int | None:
        key = f"{name}_token_id"
        value = self.metadata.get(_PREFIX + key)
        if value is None:
            return default if default is not None and default < len(self.tokens) else None
        if not isinstance(value, int) or not 0 <= value < len(self.tokens):
            raise self._broken(key, f"is {value!r}, outside the vocabulary of {len(self.tokens)} tokens")
        return value

    def _string(self, key: str) -> str:
        value = self.metadata.get(_PREFIX + key)
        if value is None:
            raise self._broken(key, "is missing")
        if not isinstance(value, str):
            raise self._broken(key, f"is no string but {type(value).__name__}")
        return value

    def _array(self, key: str, elements: Set[type], length: int | None = None) -> list[Any]:
        value = self.metadata.get(_PREFIX + key)
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
        return ModelFileError(self.path, f"{_PREFIX}{key} {what}; the file cannot be tokenized with")
