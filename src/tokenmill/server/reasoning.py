"""Reasoning in a model's answer: ``<think>`` text ``</think>`` before what it says.

Qwen3 writes both marks; the templates of DeepSeek-R1 and others write the first one themselves, so that the answer
begins inside. Marks anywhere else are text.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto

from tokenmill.tokenizer import Tokenizer

_BEGIN = "<think>"
_END = "</think>"


class ReasoningParser(Enum):
    """How reasoning is found; the names of parsers are vLLM's."""

    AUTO = "auto"
    """Like QWEN3 if the chat template knows the marks, else like NONE."""
    NONE = "none"
    QWEN3 = "qwen3"
    """The answer or the prompt's end has the first mark."""
    DEEPSEEK_R1 = "deepseek_r1"
    """Every answer begins with reasoning, marked or not."""

    def reader(self, template: str | None, prompt: str) -> ReasoningReader | None:
        """Reads an answer to ``prompt``, which ``template`` gave; None if there is no reasoning to be found."""
        match self:
            case ReasoningParser.NONE:
                return None
            case ReasoningParser.AUTO if _BEGIN not in (template or "") and _END not in (template or ""):
                return None
            case ReasoningParser.DEEPSEEK_R1:
                return ReasoningReader(begun=True)
        return ReasoningReader(begun=prompt.rstrip().endswith(_BEGIN))


class _Place(Enum):
    BEFORE = auto()
    INSIDE = auto()
    AFTER = auto()


class ReasoningReader:
    """Separates the text of one output, which comes in pieces, into reasoning and the rest, without the white space
    around either. ``begun``: the output begins inside."""

    def __init__(self, *, begun: bool) -> None:
        self._begun = begun
        self._found = begun
        self._place = _Place.INSIDE if begun else _Place.BEFORE
        self._held = ""
        """What may be white space at an end, or the beginning of a mark."""
        self._spoke = False
        """True once the place that we are at has given text."""

    def push(self, text: str) -> tuple[str, str]:
        """The reasoning and the rest that are certain."""
        self._held += text
        if self._place is _Place.BEFORE:
            begun = self._held.lstrip()
            if _BEGIN.startswith(begun):
                return "", ""
            if begun.startswith(_BEGIN):
                self._place, self._held, self._found = _Place.INSIDE, begun, True
            else:
                self._place, self._spoke = _Place.AFTER, True  # no reasoning, no white space cut
        reasoning = self._inside() if self._place is _Place.INSIDE else ""
        return reasoning, self._after() if self._place is _Place.AFTER else ""

    def flush(self) -> tuple[str, str]:
        """The rest, when no more text comes."""
        held, self._held = self._held, ""
        if self._place is _Place.INSIDE:
            return held if self._spoke or held.strip() else "", ""
        return "", held

    def tokens(self, tokenizer: Tokenizer, token_ids: Iterable[int]) -> int:
        """How many of an output's tokens, up to now, are reasoning, its marks included."""
        reader, detokenizer = ReasoningReader(begun=self._begun), tokenizer.detokenizer(continues=True)
        count = 0
        for token_id in token_ids:
            count += 1
            reader.push(detokenizer.push(token_id))
            if reader._place is _Place.AFTER:
                break
        return count if reader._found else 0

    def _inside(self) -> str:
        if not self._spoke:
            self._held = self._held.lstrip().removeprefix(_BEGIN).lstrip()
        found, mark, rest = self._held.partition(_END)
        if mark:
            self._place, self._held, self._spoke = _Place.AFTER, rest, False
            return found.rstrip()
        marks = (_END, _BEGIN) if not self._spoke else (_END,)
        keep = max((n for mark in marks for n in range(1, len(mark)) if found.endswith(mark[:n])), default=0)
        certain = found[: len(found) - keep].rstrip()
        self._held = found[len(certain) :]
        self._spoke |= bool(certain)
        return certain

    def _after(self) -> str:
        text, self._held = self._held if self._spoke else self._held.lstrip(), ""
        self._spoke |= bool(text)
        return text
