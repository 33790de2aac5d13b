"""What bytes a token stands for.

A vocabulary writes its tokens in one of two spellings. *Byte-level* vocabularies (GPT-2 and its descendants) write
each byte as one printable character. *SentencePiece* vocabularies write text with U+2581 for the space, and spell
bytes that have no piece of their own ``<0x00>`` to ``<0xFF>``. Control and user-defined tokens are written as they
read in both.
"""

from __future__ import annotations

import re
from functools import cache

SPACE_MARK = "▁"

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


@cache
def byte_level_alphabet() -> dict[str, int]:
    """The character of each byte in a byte-level vocabulary: printable Latin-1 stands for itself, the other 68 bytes
    for U+0100 onwards, in byte order (Radford et al., 2019, the GPT-2 release)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def byte_level_bytes(token: str) -> bytes:
    """The bytes of an ordinary token of a byte-level vocabulary. A token with characters outside the alphabet can
    only be text added as it reads, and stands for its UTF-8."""
    try:
        return token.translate(_byte_level_table()).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode("utf-8", "replace")


@cache
def _byte_level_table() -> dict[int, str]:
    """For ``str.translate``: characters of the alphabet become those of Latin-1, which stand for bytes, and all others
    of Latin-1 something that is none."""
    alphabet = byte_level_alphabet()
    others = {code: "\uffff" for code in range(256) if chr(code) not in alphabet}
    return others | {ord(character): chr(byte) for character, byte in alphabet.items()}


def sentencepiece_bytes(token: str) -> bytes:
    """The bytes of a token of a SentencePiece vocabulary."""
    if byte := _BYTE_PIECE.match(token):
        return bytes([int(byte.group(1), 16)])
    return token.replace(SPACE_MARK, " ").encode("utf-8", "replace")
