"""What a model's text is made of: reasoning, prose and tool calls; and these as a list of blocks that grows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from tokenmill.server.reasoning import ReasoningReader
from tokenmill.server.structure import ForcedCalls
from tokenmill.server.tool_calls import ToolCall, ToolCallReader
from tokenmill.tokenizer import Tokenizer


@dataclass(slots=True)
class Parts:
    """A piece of an output, or all of it, taken apart."""

    reasoning: str = ""
    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)


class AnswerReader:
    """Takes the text of one output apart, which comes in pieces. Without readers all of it is prose."""

    def __init__(
        self, reasoning: ReasoningReader | None = None, calls: ToolCallReader | ForcedCalls | None = None
    ) -> None:
        self._reasoning = reasoning
        self._calls = calls
        self._after_call = False

    @property
    def called(self) -> bool:
        """True once there was a call."""
        return self._calls is not None and bool(self._calls.calls)

    def reasoning_tokens(self, tokenizer: Tokenizer, token_ids: Sequence[int]) -> int:
        """How many tokens of the output are reasoning."""
        return 0 if self._reasoning is None else self._reasoning.tokens(tokenizer, token_ids)

    def push(self, text: str, *, last: bool) -> Parts:
        """What is certain; of the ``last`` piece everything."""
        parts = Parts(text=text)
        if self._reasoning is not None:
            parts.reasoning, parts.text = self._reasoning.push(text)
            if last:
                thought, rest = self._reasoning.flush()
                parts.reasoning, parts.text = parts.reasoning + thought, parts.text + rest
        if self._calls is not None:
            parts.text, parts.calls = self._calls.push(parts.text)
            if last:
                rest, calls = self._calls.flush()
                parts.text, parts.calls = parts.text + rest, parts.calls + calls
        self._after_call |= bool(parts.calls)
        if self._after_call:
            parts.text = parts.text.lstrip()  # the line breaks around calls
            self._after_call = not parts.text
        return parts


class BlockKind(Enum):
    REASONING = auto()
    TEXT = auto()
    CALL = auto()


@dataclass(slots=True)
class Block:
    """``text`` is that of a call's arguments too."""

    kind: BlockKind
    index: int
    text: str = ""
    call: ToolCall | None = None


class Change(Enum):
    OPENED = auto()
    GREW = auto()
    CLOSED = auto()


@dataclass(frozen=True, slots=True)
class BlockChange:
    """What happened to a block; ``delta`` is what it grew by."""

    change: Change
    block: Block
    delta: str = ""


class AnswerBlocks:
    """An answer as the list of its blocks, in order. One of them is open at a time, the last."""

    def __init__(self, reader: AnswerReader) -> None:
        self.blocks: list[Block] = []
        self._reader = reader
        self._open: Block | None = None

    @property
    def called(self) -> bool:
        """True once there was a call."""
        return self._reader.called

    def read(self, text: str) -> None:
        """Takes all of an answer at once."""
        for _ in self.push(text, last=True):
            pass

    def push(self, text: str, *, last: bool) -> Iterator[BlockChange]:
        """What a piece of text, with ``last`` the end of it all, changes. An answer has a block at least."""
        parts = self._reader.push(text, last=last)
        yield from self._grow(BlockKind.REASONING, parts.reasoning)
        yield from self._grow(BlockKind.TEXT, parts.text)
        for call in parts.calls:
            yield from self._close()
            yield self._begin(BlockKind.CALL, call)
            yield self._add(call.arguments)
        if last:
            if not self.blocks:
                yield self._begin(BlockKind.TEXT)
            yield from self._close()

    def _grow(self, kind: BlockKind, delta: str) -> Iterator[BlockChange]:
        if not delta:
            return
        if self._open is None or self._open.kind is not kind:
            yield from self._close()
            yield self._begin(kind)
        yield self._add(delta)

    def _begin(self, kind: BlockKind, call: ToolCall | None = None) -> BlockChange:
        self._open = Block(kind, len(self.blocks), call=call)
        self.blocks.append(self._open)
        return BlockChange(Change.OPENED, self._open)

    def _add(self, delta: str) -> BlockChange:
        assert self._open is not None
        self._open.text += delta
        return BlockChange(Change.GREW, self._open, delta)

    def _close(self) -> Iterator[BlockChange]:
        if self._open is not None:
            yield BlockChange(Change.CLOSED, self._open)
            self._open = None
