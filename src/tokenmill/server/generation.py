"""The prompts of one HTTP request on their way through the engine, and the text that comes back."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tokenmill.backends.backend import Float32
from tokenmill.engine.messages import (
    AddRequest,
    Embedded,
    EngineError,
    EngineOverloadedError,
    Event,
    Failed,
    FailureKind,
    Finished,
    FinishReason,
    PromptScored,
    TokenLogprobs,
    TokenOutput,
)
from tokenmill.engine.outputs import CompletionOutput, OutputBuilder, StreamChunk
from tokenmill.engine.process import EngineProcess, EventStream
from tokenmill.program.step import Int32
from tokenmill.server.errors import RequestError, StoppedError, log_text
from tokenmill.server.metrics import Metrics
from tokenmill.server.request_log import RequestRecord
from tokenmill.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """What has come for one output of one prompt since the last look."""

    prompt: int
    chunk: StreamChunk


class Generation:
    """Prompts that run together with the same parameters. Follow it with :meth:`pieces` or :meth:`finish`.

    A long list of them has a bounded number of outputs in the engine at a time; the others follow as these end.
    Whatever ends the following early (an error, a client that left) takes the rest out of the engine.
    """

    def __init__(
        self,
        engine: EngineProcess,
        tokenizer: Tokenizer,
        metrics: Metrics,
        record: RequestRecord,
        requests: Sequence[AddRequest],
        most_places: int,
        on_end: Callable[[Generation], None] = lambda _: None,
    ) -> None:
        """``requests`` have the same parameters, one each prompt. At most ``most_places`` outputs are in the engine at
        once; those of one prompt must fit. Raises EngineDeadError."""
        self.record = record
        self.prompts = [request.prompt for request in requests]
        self.params = requests[0].params
        self.scores: list[list[TokenLogprobs]] = [[] for _ in requests]
        """Log-probabilities of each prompt's tokens from the second on, if asked for."""
        self.embeddings: dict[int, Float32] = {}
        """By the number of the prompt, if asked for."""
        self._engine = engine
        self._requests = requests
        self._metrics = metrics
        self._on_end = on_end
        self._ended = False
        self._numbers = {request.request_id: number for number, request in enumerate(requests)}
        self._builders = {
            (request.request_id, index): OutputBuilder(index, request.params, tokenizer)
            for request in requests
            for index in range(request.outputs)
        }
        self._last_token: dict[tuple[int, int], float] = {}
        self._open = set(self._builders)
        self._most_places = most_places
        self._unsent = deque(requests)
        self._events = EventStream()
        self._feed()
        record.params = self.params
        record.prompt_tokens = sum(map(len, self.prompts))
        for prompt in self.prompts:
            metrics.request_arrived(len(prompt), self.params)

    @property
    def request_ids(self) -> list[int]:
        """The engine's numbers of the requests, in the order of the prompts."""
        return [request.request_id for request in self._requests]

    @property
    def open_outputs(self) -> int:
        """Outputs that have not ended."""
        return len(self._open)

    @property
    def places(self) -> int:
        """Outputs that it may have in the engine from now on."""
        return min(self.open_outputs, self._most_places)

    @property
    def prompt_tokens(self) -> int:
        return self.record.prompt_tokens

    @property
    def output_tokens(self) -> int:
        """Generated tokens so far, of all outputs."""
        return sum(len(builder.output.token_ids) for builder in self._builders.values())

    def outputs(self, prompt: int) -> list[CompletionOutput]:
        """The outputs of a prompt so far."""
        request = self._requests[prompt]
        return [self._builders[request.request_id, index].output for index in range(request.outputs)]

    async def finish(self) -> None:
        """Follows the outputs to their end. Raises EngineError."""
        async for _ in self.pieces():
            pass

    async def pieces(self, idle: float | None = None) -> AsyncIterator[list[Piece]]:
        """Pieces as they come, at most one an output at a time; an empty list after ``idle`` seconds without any.

        Raises EngineError if a request fails, and after :meth:`stop` the error that it was given.
        """
        try:
            while self._open:
                events = await self._events.next_events(idle)
                merged: dict[tuple[int, int], StreamChunk] = {}
                for now, event in events:
                    chunk = self._take(now, event)
                    if chunk is not None:
                        key = (event.request_id, chunk.index)
                        merged[key] = _joined(merged[key], chunk) if key in merged else chunk
                self._feed()
                if merged or not events:
                    yield [Piece(self._numbers[key[0]], chunk) for key, chunk in merged.items()]
        except EngineError as error:
            self.record.error = log_text(error)
            self._metrics.outputs_lost("abort" if isinstance(error, StoppedError) else "error", len(self._open))
            raise
        finally:
            self.end()

    def stop(self, error: EngineError) -> None:
        """Takes the requests out of the engine; whoever follows them gets ``error``."""
        if self._open:
            self._events.fail(error)
        self.end()

    def end(self) -> None:
        """Takes out of the engine what has not ended and settles the accounts. Safe to call twice."""
        if self._ended:
            return
        self._ended = True
        for request_id in {request_id for request_id, _ in self._open}:
            self._engine.forget(request_id)
        self.record.output_tokens = self.output_tokens
        self._metrics.request_ended(max((len(b.output.token_ids) for b in self._builders.values()), default=0))
        self._on_end(self)

    def _feed(self) -> None:
        """Hands in as many of the prompts that are left as there are places for. Raises EngineDeadError."""
        each = self._requests[0].outputs
        running = self.open_outputs - each * len(self._unsent)
        free = (self._most_places - running) // each
        batch = [self._unsent.popleft() for _ in range(min(free, len(self._unsent)))]
        if batch:
            self._engine.submit(batch, self._events)

    def _take(self, now: float, event: Event) -> StreamChunk | None:
        """What an event adds to its output."""
        match event:
            case TokenOutput():
                key = (event.request_id, event.index)
                builder = self._builders[key]
                self._count_token(now, key)
                if builder.done:
                    return None  # sampled before the engine heard of the stop string
                chunk = builder.token(event)
                if builder.done:
                    self._engine.cancel(event.request_id, event.index)
                return chunk
            case Finished():
                return self._finished(event)
            case PromptScored():
                self.scores[self._numbers[event.request_id]] += event.logprobs
            case Embedded():
                self.embeddings[self._numbers[event.request_id]] = event.vector
            case Failed():
                which = "" if len(self._numbers) == 1 else f"prompt {self._numbers[event.request_id]}: "
                raise failure(event, which + event.error)
        return None

    def _finished(self, event: Finished) -> StreamChunk | None:
        key = (event.request_id, event.index)
        self._open.discard(key)
        builder = self._builders[key]
        told = builder.done
        chunk = builder.finish(event)
        reason = builder.output.finish_reason or FinishReason.ABORT.value
        first = event.index == 0
        if first:
            self.record.cached_tokens += event.timings.cached_tokens
            self.record.started = self.record.started or event.timings.started
        self.record.finish_reasons.append(reason)
        prompt_tokens = len(self.prompts[self._numbers[event.request_id]])
        tokens = len(builder.output.token_ids)
        self._metrics.output_ended(reason, event.timings, prompt_tokens, tokens, first)
        return None if told else chunk

    def _count_token(self, now: float, key: tuple[int, int]) -> None:
        last = self._last_token.get(key)
        self._last_token[key] = now
        if last is not None:
            self._metrics.next_token(now - last)
            return
        self._metrics.first_token(now - self.record.arrival)
        self.record.first_token = self.record.first_token or now


def failure(event: Failed, message: str) -> EngineError:
    """What went wrong with a request, as an error that knows whose fault it is."""
    match event.kind:
        case FailureKind.REQUEST:
            return RequestError(message)
        case FailureKind.OVERLOADED:
            return EngineOverloadedError(message, event.retry_after or 1.0)
    return EngineError(message)


def prompt_array(token_ids: Sequence[int]) -> Int32:
    return np.array(token_ids, dtype=np.int32)


def _joined(first: StreamChunk, second: StreamChunk) -> StreamChunk:
    logprobs = None
    if first.logprobs is not None or second.logprobs is not None:
        logprobs = [*(first.logprobs or ()), *(second.logprobs or ())]
    return replace(
        second,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=logprobs,
    )


def new_record(request_id: str, method: str, path: str, client: str) -> RequestRecord:
    """A record of a request that arrives now."""
    return RequestRecord(request_id, method, path, client, time.monotonic())
