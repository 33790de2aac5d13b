"""What a user gets back, and how tokens become text: detokenizing, stop strings, what must be held back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from tokenmill.engine.messages import Finished, FinishReason, Timings, TokenLogprobs, TokenOutput
from tokenmill.sampling import SamplingParams


class Detokenizer(Protocol):
    """Text of a sequence of tokens, one at a time (``tokenmill.tokenizer.IncrementalDetokenizer``)."""

    def push(self, token_id: int, /) -> str: ...

    def flush(self) -> str: ...


class Detokenizes(Protocol):
    """A tokenizer, as far as outputs need one."""

    def detokenizer(self, skip_special: bool = True, continues: bool = False) -> Detokenizer: ...


@dataclass(slots=True)
class CompletionOutput:
    """One output of a request."""

    index: int
    text: str = ""
    """Without special tokens and cut before the stop string, unless the parameters want them."""
    token_ids: list[int] = field(default_factory=list)
    """All generated tokens, the end token or those of the stop string included."""
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    """"stop" (end token, stop token, stop string), "length" (max_tokens or the context's end) or "abort"."""
    stop_reason: int | str | None = None
    """The stop string or token that ended the output."""
    timings: Timings | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """Sum of the tokens' log-probabilities, if they were asked for."""
        return None if self.logprobs is None else sum(item.logprob for item in self.logprobs)


@dataclass(slots=True)
class RequestOutput:
    """A request's outputs. The properties are those of the first, of which there usually is only one."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One entry per prompt token; the first is None, nothing comes before it."""

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        return self.outputs[0].logprobs

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[0].finish_reason

    @property
    def timings(self) -> Timings | None:
        return self.outputs[0].timings


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """What one step adds to an output. Joined, the texts of an output are its text."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    """Set on an output's last chunk."""


class StopText:
    """Finds stop strings in text that comes in pieces, and holds back what may be the beginning of one."""

    def __init__(self, stops: tuple[str, ...], *, include: bool = False) -> None:
        """``include``: the stop string that is found is part of the text."""
        self._stops = stops
        self._include = include
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The text that is certain not to belong to a stop string. After a match (``found``) always empty."""
        if self.found is not None:
            return ""
        self._held += text
        matches = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if matches:
            at, self.found = min(matches, key=lambda match: match[0])
            certain, self._held = self._held[: at + len(self.found) * self._include], ""
            return certain
        keep = self._longest_beginning()
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return certain

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        rest, self._held = self._held, ""
        return rest

    def _longest_beginning(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = min(len(self._held), max((len(stop) for stop in self._stops), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


class OutputBuilder:
    """Turns the events of one output into its text and its :class:`CompletionOutput`."""

    def __init__(self, index: int, params: SamplingParams, tokenizer: Detokenizes) -> None:
        self.output = CompletionOutput(index, logprobs=None if params.logprobs is None else [])
        self._params = params
        self._detokenizer = tokenizer.detokenizer(params.skip_special_tokens, continues=True)
        self._stop = StopText(params.stop_strings, include=params.include_stop_str_in_output)

    @property
    def done(self) -> bool:
        return self.output.finish_reason is not None

    def token(self, event: TokenOutput) -> StreamChunk:
        """Adds a token. The output is ``done`` if its text now holds a stop string."""
        output = self.output
        output.token_ids.append(event.token_id)
        if output.logprobs is not None and event.logprobs is not None:
            output.logprobs.append(event.logprobs)
        silent = event.stops and not self._params.include_stop_str_in_output
        text = "" if silent else self._detokenizer.push(event.token_id)
        if len(output.token_ids) > self._params.min_tokens:
            text = self._stop.push(text)
        output.text += text
        if self._stop.found is not None:
            output.finish_reason, output.stop_reason = FinishReason.STOP.value, self._stop.found
        logprobs = None if event.logprobs is None else [event.logprobs]
        return StreamChunk(output.index, text, [event.token_id], logprobs, output.finish_reason)

    def finish(self, event: Finished) -> StreamChunk:
        """Ends the output, unless a stop string has."""
        output = self.output
        output.timings = event.timings
        if self.done:
            return StreamChunk(output.index, "", [], None, output.finish_reason)
        text = self._stop.push(self._detokenizer.flush())
        if self._stop.found is None:
            text += self._stop.flush()
            output.finish_reason, output.stop_reason = event.reason.value, event.stop_token
        else:
            output.finish_reason, output.stop_reason = FinishReason.STOP.value, self._stop.found
        output.text += text
        return StreamChunk(output.index, text, [], None, output.finish_reason)
