"""Token ids to text, one token at a time."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection


class IncrementalDetokenizer:
    """Turns a stream of token ids into a stream of text.

    The pieces that ``push`` and the final ``flush`` return, joined, are what ``Tokenizer.decode`` gives for the whole
    sequence, whatever the sequence. A character whose bytes have not all arrived is held back (at most three bytes),
    so no piece ends in half a character; bytes that can no longer become one come out as U+FFFD, one for each maximal
    part of a character as the Unicode standard (chapter 3, U+FFFD substitution) recommends. Each push costs the bytes
    of its token, independent of what came before.

    Not thread-safe: one detokenizer serves one sequence.
    """

    __slots__ = ("_decoder", "_leading_spaces", "_skip", "_token_bytes")

    def __init__(self, token_bytes: Callable[[int], bytes], skip: Collection[int], leading_spaces: int) -> None:
        """``skip``: ids that leave no text. ``leading_spaces``: how many spaces at the very start the vocabulary's
        own prefix put there, to be taken off again."""
        self._token_bytes = token_bytes
        self._skip = skip
        self._leading_spaces = leading_spaces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes; empty while a character is unfinished."""
        if token_id in self._skip:
            return ""
        data = self._token_bytes(token_id)
        while self._leading_spaces and data:
            if data.startswith(b" "):
                data = data[1:]
                self._leading_spaces -= 1
            else:
                self._leading_spaces = 0
        return self._decoder.decode(data)

    def flush(self) -> str:
        """The rest: U+FFFD if the sequence ended inside a character, else nothing. The detokenizer is then as after
        creation, except that no leading space is taken off."""
        self._leading_spaces = 0
        return self._decoder.decode(b"", final=True)
