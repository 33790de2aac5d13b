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
  ``tokenizer.json`` does; llama.cpp adds ordinary tokens that read like one, such as the word ``</s>`` of Qwen's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, normalizers

from tokenmill.errors import ModelFileError, UnsupportedModelError
from tokenmill.tokenizer.byte_level import BYTE_LEVEL_RULES, ByteLevelRules
from tokenmill.tokenizer.chat_template import ChatTemplates
from tokenmill.tokenizer.encoder import BpeEncoder
from tokenmill.tokenizer.end_tokens import end_tokens_by_text, turn_end_by_text
from tokenmill.tokenizer.gguf_vocabulary import PREFIX, TokenType, VocabularyArrays
from tokenmill.tokenizer.pieces import SPACE_MARK, byte_level_bytes, sentencepiece_bytes
from tokenmill.tokenizer.tokenizer import Tokenizer, TokenizerParts
from tokenmill.tokenizer.vocabulary import Vocabulary

_MODELS = ("gpt2", "llama")
_SPECIAL = (TokenType.CONTROL, TokenType.UNKNOWN)


def tokenizer_from_gguf(metadata: Mapping[str, Any], path: Path, cache: Path | None = None) -> Tokenizer:
    """The tokenizer that GGUF ``metadata`` (key to value; arrays as sequences) describes; ``path`` names the file in
    errors, ``cache`` is a folder for this file's contents alone. Raises ``ModelFileError`` for broken metadata,
    ``UnsupportedModelError`` for an unknown kind."""
    return _GgufTokenizer(metadata, path, cache).tokenizer()


class _Spelling:
    """The bytes of each token. Holds on to the vocabulary and nothing else of the file."""

    def __init__(self, vocabulary: Vocabulary, byte_level: bool) -> None:
        self._vocabulary = vocabulary
        self._byte_level = byte_level

    def token_bytes(self, token_id: int) -> bytes:
        if token_id >= len(self._vocabulary):
            return b""
        kind = int(self._vocabulary.types[token_id])  # numpy takes ten times as long to compare with an enum
        if kind == TokenType.UNUSED:
            return b""
        token = self._vocabulary.spelling(token_id)
        if not self._byte_level:
            return sentencepiece_bytes(token)
        return byte_level_bytes(token) if kind == TokenType.NORMAL else token.encode("utf-8", "replace")


class _GgufTokenizer:
    """The tokenizer part of a file's metadata, checked. Reading the arrays in it is slow: with the vocabulary's tables
    in the cache, none is."""

    def __init__(self, metadata: Mapping[str, Any], path: Path, cache: Path | None) -> None:
        self.metadata = metadata
        self.path = path
        self.model = self._string("model")
        if self.model not in _MODELS:
            raise UnsupportedModelError(
                f"{path}: {PREFIX}model is {self.model!r}; known tokenizer models: {', '.join(_MODELS)}"
            )
        self.rules = self._rules() if self.model == "gpt2" else None
        """None for SentencePiece."""
        self.vocabulary = self._vocabulary(cache)
        self.special = frozenset(self.vocabulary.ids_of(_SPECIAL))

    def tokenizer(self) -> Tokenizer:
        default_ids = (1, 2, 0) if self.rules is None else (None, None, None)
        bos_id, eos_id, unk_id = (
            self._token_id(key, default) for key, default in zip(("bos", "eos", "unknown"), default_ids, strict=True)
        )
        if self.rules is None:
            prefix_space = bool(self.metadata.get(PREFIX + "add_space_prefix", True))
            encoder, add_bos = self._sentencepiece(unk_id, prefix_space), True
        else:
            prefix_space = False
            encoder, add_bos = self._byte_level(self.rules), self.rules.add_bos
        control = {self.vocabulary.spelling(i): i for i in self.special}
        eot_id, eom_id = self._token_id("eot"), self._token_id("eom")
        ends = end_tokens_by_text(control) | {i for i in (eos_id, eot_id, eom_id) if i is not None}
        return Tokenizer(
            TokenizerParts(
                encoder=encoder,
                token_bytes=_Spelling(self.vocabulary, self.rules is not None).token_bytes,
                vocab_size=len(self.vocabulary),
                special_ids=self.special,
                prefix=self._surrounding("add_bos_token", add_bos, "bos_token_id", bos_id),
                suffix=self._surrounding("add_eos_token", False, "eos_token_id", eos_id),
                bos_id=bos_id,
                eos_id=eos_id,
                eot_id=turn_end_by_text(control) if eot_id is None else eot_id,
                pad_id=self._token_id("padding"),
                unk_id=unk_id,
                eos_ids=frozenset(ends),
                leading_spaces=int(prefix_space),
                chat_templates=self._chat_templates(bos_id, eos_id, unk_id),
            )
        )

    def _vocabulary(self, cache: Path | None) -> Vocabulary:
        if cache is not None and (kept := Vocabulary.read(cache)) is not None:
            return kept
        arrays = VocabularyArrays(self.metadata, self.path)
        vocabulary = arrays.sentencepiece() if self.rules is None else arrays.byte_level()
        if cache is not None:
            vocabulary.write(cache)
        return vocabulary

    def _rules(self) -> ByteLevelRules:
        pre = self._string("pre") if PREFIX + "pre" in self.metadata else "default"
        rules = BYTE_LEVEL_RULES.get(pre)
        if rules is None:
            known = ", ".join(BYTE_LEVEL_RULES)
            raise UnsupportedModelError(f"{self.path}: {PREFIX}pre is {pre!r}; known pre-tokenizers: {known}")
        return rules

    def _byte_level(self, rules: ByteLevelRules) -> BpeEncoder:
        bpe = self.vocabulary.bpe(ignore_merges=rules.ignore_merges)
        return BpeEncoder(bpe, rules.normalizer(), rules.pre_tokenizer(), self._added_tokens())

    def _sentencepiece(self, unk_id: int | None, prefix_space: bool) -> BpeEncoder:
        normalizer: normalizers.Normalizer = normalizers.Replace(" ", SPACE_MARK)
        if prefix_space:
            normalizer = normalizers.Sequence([normalizers.Prepend(SPACE_MARK), normalizer])
        bpe = self.vocabulary.bpe(byte_fallback=True, unknown=unk_id)
        return BpeEncoder(bpe, normalizer, None, self._added_tokens())

    def _added_tokens(self) -> dict[AddedToken, int]:
        """Control tokens and user-defined tokens are recognised in the text before it is normalized and cut."""
        # Phi-3 swallows the white space after a control token.
        swallows = self.metadata.get("general.architecture") == "phi3" and self.rules is None
        keeps_space = ("<unk>", "<s>", "<|endoftext|>")
        added = {}
        for token_id in self.vocabulary.ids_of((*_SPECIAL, TokenType.USER_DEFINED)):
            text = self.vocabulary.spelling(token_id)
            special = token_id in self.special
            token = AddedToken(text, normalized=False, special=special, rstrip=swallows and text not in keeps_space)
            found = self.vocabulary.find(text)
            added[token] = token_id if found is None else found
        return added

    def _surrounding(self, flag: str, default: bool, key: str, token_id: int | None) -> tuple[int, ...]:
        if not self.metadata.get(PREFIX + flag, default):
            return ()
        if token_id is None:
            if PREFIX + flag not in self.metadata:
                return ()
            raise self._broken(flag, f"is true, but there is no {PREFIX}{key}")
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
        return ChatTemplates(sources, {name: self.vocabulary.spelling(i) for name, i in named.items() if i is not None})

    def _token_id(self, name: str, default: int | None = None) -> int | None:
        key = f"{name}_token_id"
        value = self.metadata.get(PREFIX + key)
        if value is None:
            return default if default is not None and default < len(self.vocabulary) else None
        if not isinstance(value, int) or not 0 <= value < len(self.vocabulary):
            raise self._broken(key, f"is {value!r}, outside the vocabulary of {len(self.vocabulary)} tokens")
        return value

    def _string(self, key: str) -> str:
        value = self.metadata.get(PREFIX + key)
        if value is None:
            raise self._broken(key, "is missing")
        if not isinstance(value, str):
            raise self._broken(key, f"is no string but {type(value).__name__}")
        return value

    def _broken(self, key: str, what: str) -> ModelFileError:
        return ModelFileError(self.path, f"{PREFIX}{key} {what}; the file cannot be tokenized with")
