"""The tokenizer of one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from tokenmill.errors import TokenmillError, UsageError
from tokenmill.tokenizer.chat_template import ChatTemplateError, ChatTemplates
from tokenmill.tokenizer.detokenizer import IncrementalDetokenizer
from tokenmill.tokenizer.encoder import Encoder

_TOKENS_KEPT = 4096
"""Tokens whose bytes are at hand. Text consists of few tokens, most of the time; keeping all that ever came would have
a server grow for days, by some 200 bytes a token."""


class TokenizerError(TokenmillError):
    """Text that cannot be tokenized, or ids that are none."""


@dataclass(frozen=True, slots=True)
class TokenizerParts:
    """What a reader of tokenizer files hands over."""

    encoder: Encoder
    """Text to ids, without ``prefix`` and ``suffix``."""
    token_bytes: Callable[[int], bytes]
    """The bytes of any id of the vocabulary; empty for an id that pads it."""
    vocab_size: int
    special_ids: frozenset[int]
    """Control tokens: recognised in text only when asked for, left out of decoded text."""
    prefix: tuple[int, ...]
    """Ids that ``add_special`` puts before the text, BOS for most models that have one."""
    suffix: tuple[int, ...]
    bos_id: int | None
    eos_id: int | None
    eot_id: int | None
    pad_id: int | None
    unk_id: int | None
    eos_ids: frozenset[int]
    leading_spaces: int
    """How many spaces the normalizer puts before the text (0 or 1), taken off again by decoding."""
    chat_templates: ChatTemplates | None


class Tokenizer:
    """Text to token ids and back, for one model. Safe to use from many threads at once.

    Text is a Python string. One with lone surrogates is no Unicode text, has no UTF-8 and is refused.
    Decoding is defined by bytes: the text of a sequence is the joined bytes of its tokens as UTF-8, with U+FFFD for
    what is not UTF-8.
    """

    def __init__(self, parts: TokenizerParts) -> None:
        self._parts = parts
        self._token_bytes = lru_cache(_TOKENS_KEPT)(parts.token_bytes)

    @property
    def vocab_size(self) -> int:
        """Number of token ids; all lie in ``range(vocab_size)``. A model may have more rows than that (padding)."""
        return self._parts.vocab_size

    @property
    def bos_id(self) -> int | None:
        """Beginning of sequence; ``None`` if the model has none."""
        return self._parts.bos_id

    @property
    def eos_id(self) -> int | None:
        """The end-of-sequence token the metadata names; ``None`` if it names none. Generation stops at ``eos_ids``."""
        return self._parts.eos_id

    @property
    def eot_id(self) -> int | None:
        """The end of a chat turn, where the metadata names it or the vocabulary has an established one."""
        return self._parts.eot_id

    @property
    def pad_id(self) -> int | None:
        """Padding; ``None`` if the model has none."""
        return self._parts.pad_id

    @property
    def unk_id(self) -> int | None:
        """The token for text that the vocabulary cannot spell; ``None`` if the model has none."""
        return self._parts.unk_id

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends an answer: of the document, of the turn, of the message."""
        return self._parts.eos_ids

    @property
    def special_ids(self) -> frozenset[int]:
        """Control tokens; ``decode(skip_special=True)`` leaves them out."""
        return self._parts.special_ids

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """The token ids of ``text``.

        ``add_special`` adds the tokens that the model wants around a text (usually BOS before it). With
        ``parse_special`` the text of a control token, ``<|im_end|>`` say, becomes that token; without it, ordinary
        tokens that spell it, which is what text from a stranger deserves. Added tokens that are not control tokens
        (``<think>``, runs of spaces) are recognised either way.

        Raises ``TokenizerError`` for a lone surrogate, naming its place.
        """
        try:
            ids = self._parts.encoder.encode(text, parse_special)
        except (UnicodeEncodeError, TypeError) as error:
            raise _not_text(text) from error
        return [*self._parts.prefix, *ids, *self._parts.suffix] if add_special else ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ``ids``; control tokens are left out with ``skip_special`` and written out without it."""
        skip = self._parts.special_ids if skip_special else frozenset()
        data = b"".join([self.token_bytes(token_id) for token_id in ids if token_id not in skip])
        for _ in range(self._parts.leading_spaces):
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, which need not be whole characters; control tokens give their text, ids that only
        pad the vocabulary give nothing. Raises ``TokenizerError`` for a negative id."""
        if token_id < 0:
            raise TokenizerError(f"token id {token_id} is negative; ids lie in 0..{self.vocab_size - 1}")
        return self._token_bytes(token_id) if token_id < self.vocab_size else b""

    def detokenizer(self, skip_special: bool = True, continues: bool = False) -> IncrementalDetokenizer:
        """A new incremental detokenizer. ``continues`` says that its ids continue a text (a completion after its
        prompt), so that a leading space is part of the text and stays."""
        skip = self._parts.special_ids if skip_special else frozenset[int]()
        return IncrementalDetokenizer(self.token_bytes, skip, 0 if continues else self._parts.leading_spaces)

    @property
    def chat_template(self) -> str | None:
        """The source of the default chat template; ``None`` if the model has none."""
        return None if self._parts.chat_templates is None else self._parts.chat_templates.source()

    def with_chat_template(self, source: str) -> Tokenizer:
        """This tokenizer with ``source`` as its only chat template."""
        if self._parts.chat_templates is not None:
            special = self._parts.chat_templates.special_tokens
        else:
            ids = {"bos_token": self.bos_id, "eos_token": self.eos_id}
            special = {name: self.token_bytes(token).decode() for name, token in ids.items() if token is not None}
        return Tokenizer(replace(self._parts, chat_templates=ChatTemplates({"default": source}, special)))

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt text of a conversation; see ``ChatTemplates.render``."""
        if self._parts.chat_templates is None:
            raise ChatTemplateError(
                "this model has no chat template: give it a plain prompt, or use a model tuned for chat"
            )
        return self._parts.chat_templates.render(
            messages, tools, documents, add_generation_prompt, chat_template, **kwargs
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """The prompt ids of a conversation. The tokens that belong before a text (BOS) are there exactly once,
        whether or not the template writes them; none are added at the end."""
        text = self.apply_chat_template(messages, tools, documents, add_generation_prompt, chat_template, **kwargs)
        return self.with_prefix(self.encode(text, add_special=False))

    def with_prefix(self, ids: list[int]) -> list[int]:
        """``ids`` with the tokens that belong before a text (BOS), unless they are there."""
        prefix = list(self._parts.prefix)
        return ids if ids[: len(prefix)] == prefix else prefix + ids


def _not_text(text: str) -> TokenmillError:
    if not isinstance(text, str):
        return UsageError(f"expected a string to tokenize, got {type(text).__name__}")
    for place, character in enumerate(text):
        if "\ud800" <= character <= "\udfff":
            return TokenizerError(
                f"the text has a lone surrogate U+{ord(character):04X} at character {place}: it is not Unicode text; "
                "decode the source as UTF-8 or replace it first"
            )
    return TokenizerError("the text cannot be encoded as UTF-8")
