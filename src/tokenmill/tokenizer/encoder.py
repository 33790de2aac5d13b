"""Text to token ids: by a model of the `tokenizers` library, or by the native one.

Both recognise the added tokens of a vocabulary first and then normalize, cut and merge what lies between them. The
library builds its model from the vocabulary's strings, which takes a second for the largest; the native one reads
tables that are mapped from a file.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Protocol

from tokenizers import AddedToken
from tokenizers import Tokenizer as Library
from tokenizers.models import WordLevel
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from tokenmill import _native


class Encoder(Protocol):
    """Token ids of texts. Safe to use from many threads at once."""

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """The ids of ``text``, nothing added around them; ``parse_special`` says whether the text of a control token
        becomes that token. Raises UnicodeEncodeError or TypeError for what is no Unicode text."""


class LibraryEncoder:
    """A whole tokenizer of the `tokenizers` library; its post-processor is not used."""

    def __init__(self, backend: Library) -> None:
        self._parsing = backend
        self._plain: Library | None = None
        self._lock = threading.Lock()

    def encode(self, text: str, parse_special: bool) -> list[int]:
        backend = self._parsing if parse_special else self._without_parsing()
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids

    def _without_parsing(self) -> Library:
        """A second front on the same model that takes the text of control tokens as text. Whether a `tokenizers`
        tokenizer does so is a switch on the object, and throwing it for one call would hit every thread's calls."""
        with self._lock:
            if self._plain is None:
                self._plain = _share_without_parsing(self._parsing)
            return self._plain


def _share_without_parsing(parsing: Library) -> Library:
    plain = Library(parsing.model)  # shares the vocabulary and the merges
    if parsing.normalizer is not None:
        plain.normalizer = parsing.normalizer
    if parsing.pre_tokenizer is not None:
        plain.pre_tokenizer = parsing.pre_tokenizer
    added = parsing.get_added_tokens_decoder()
    plain.add_tokens([added[token_id] for token_id in sorted(added)])
    if plain.get_added_tokens_decoder() != added:  # ids with gaps; only a full copy keeps them
        plain = Library.from_str(parsing.to_str())
    plain.encode_special_tokens = True
    return plain


class BpeEncoder:
    """Native byte-pair encoding between the library's rules for added tokens, normalizing and cutting."""

    def __init__(
        self,
        bpe: _native.Bpe,
        normalizer: Normalizer | None,
        pre_tokenizer: PreTokenizer | None,
        added: Mapping[AddedToken, int],
    ) -> None:
        """``added``: tokens that are recognised in the text as it is, and their ids."""
        self._bpe = bpe
        self._normalizer = normalizer
        self._pre_tokenizer = pre_tokenizer
        self._added = added
        self._scanners: dict[bool, _AddedTokens] = {}
        self._lock = threading.Lock()

    def encode(self, text: str, parse_special: bool) -> list[int]:
        ids: list[int] = []
        for piece in self._scanner(parse_special).split(text):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += self._bpe.encode(self._fragments(piece))
        return ids

    def _fragments(self, text: str) -> list[str]:
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text)
        if self._pre_tokenizer is None:
            return [text]
        return [fragment for fragment, _ in self._pre_tokenizer.pre_tokenize_str(text)]

    def _scanner(self, parse_special: bool) -> _AddedTokens:
        with self._lock:
            if parse_special not in self._scanners:
                self._scanners[parse_special] = _AddedTokens(self._added, parse_special)
            return self._scanners[parse_special]


class _AddedTokens:
    """Finds added tokens in a text, by a library tokenizer that knows nothing else."""

    def __init__(self, added: Mapping[AddedToken, int], parse_special: bool) -> None:
        # No token is spelled "", so id 0 is what lies between the added ones.
        self._library = Library(WordLevel({"": 0}, unk_token=""))
        self._library.add_tokens(list(added))
        self._library.encode_special_tokens = not parse_special
        self._ids = {self._library.token_to_id(token.content): token_id for token, token_id in added.items()}

    def split(self, text: str) -> list[int | str]:
        """The parts of ``text`` in order: ids of added tokens, and the text between them."""
        encoding = self._library.encode(text, add_special_tokens=False)
        return [
            text[start:end] if number == 0 else self._ids[number]
            for number, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
        ]
