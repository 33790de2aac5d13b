"""The step loop: messages in, one step of the backend over all scheduled tokens, events out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from tokenmill import _native
from tokenmill.backends.backend import Backend, Float32
from tokenmill.engine.admission import WaitingBound, problem_of
from tokenmill.engine.beam_search import BeamGroup, Hypothesis
from tokenmill.engine.grammar import Grammar, GrammarError, Grammars, compiled, wait_for_any
from tokenmill.engine.kv_cache import KvCache, PoolUsage
from tokenmill.engine.messages import (
    AbortRequest,
    AddRequest,
    Embedded,
    Event,
    Failed,
    FailureKind,
    Finished,
    FinishReason,
    Message,
    PromptScored,
    TokenLogprobs,
    TokenOutput,
)
from tokenmill.engine.policies import FirstComeFirstServed, SchedulingPolicy
from tokenmill.engine.readout import NOTHING_ALLOWED, BadRow, Readout, token_logprobs
from tokenmill.engine.scheduler import Chunk, Scheduler, SchedulerLimits
from tokenmill.engine.sequence import Sequence
from tokenmill.engine.statistics import EngineSnapshot, StepRecord, StepStatistics
from tokenmill.engine.step_plan import PlanWriter
from tokenmill.engine.swap import SwapSpace
from tokenmill.program.hidden_rows import HIDDEN_ROWS
from tokenmill.program.step import StepPlan


@runtime_checkable
class Diagnoses(Protocol):
    """A backend that can say where a row stopped being finite."""

    def diagnose(self, plan: StepPlan, row: int) -> str | None:
        """Name of the first op that gave NaN or infinity on the way to row ``row`` of ``plan``, the step run last. May
        run it again."""


@dataclass(slots=True)
class _Request:
    message: AddRequest
    number: int
    """How many came before it."""
    arrived: float
    sequences: list[Sequence] = field(default_factory=list)
    """Outputs that wait or run. Output 0 computes the prompt; the others are forked off right after it."""
    beams: BeamGroup | None = None
    hypotheses: dict[Sequence, Hypothesis] = field(default_factory=dict)
    """What the beams have generated."""
    forked: int = 0
    """Beams that were forked off others so far."""
    nexts: dict[Sequence, TokenLogprobs] = field(default_factory=dict)
    """The likeliest next tokens of the beams that know them."""

    @property
    def started_all(self) -> bool:
        """True once there is no output that waits for output 0."""
        first = self.sequences[0]
        return not self.message.generates or first.index > 0 or first.output_length > 0


class EngineCore:
    """Runs requests over a backend. Driven only by :meth:`handle` and :meth:`step`; not thread-safe.

    ``kv_pages`` are the backend's pages per KV group, ``limits.context`` the most tokens of a sequence. ``max_waiting``
    bounds the requests that wait for a start besides those that could start at once; more are refused. Preempted
    sequences go to ``swap``, or are computed again. Tokens are picked on the threads of ``pool`` between two steps, so
    it may be the backend's; None: on the caller's. ``clock`` gives seconds.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        vocab_size: int,
        kv_pages: Items[int],
        limits: SchedulerLimits,
        prefix_caching: bool = True,
        pool: _native.ThreadPool | None = None,
        policy: SchedulingPolicy | None = None,
        max_waiting: int | None = None,
        swap: SwapSpace | None = None,
        grammars: Grammars | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backend = backend
        self._vocab_size = vocab_size
        self._limits = limits
        self.cache = KvCache(backend.kv_groups, kv_pages, prefix_caching=prefix_caching, copy_page=backend.copy_page)
        needed = self.cache.pages_needed(limits.context, limits.tokens)
        for group, (has, needs) in enumerate(zip(kv_pages, needed, strict=True)):
            if has < needs:
                raise ValueError(
                    f"KV group {group} has {has} pages; a sequence of {limits.context} tokens needs {needs}"
                )
        self.scheduler = Scheduler(self.cache, limits, swap)
        self.statistics = StepStatistics()
        self._plans = PlanWriter(self.cache.groups)
        self._readout = Readout(vocab_size, pool or _native.ThreadPool(1))
        self._grammars = grammars
        self._compiling: set[Sequence] = set()
        self._requests: dict[int, _Request] = {}
        self._arrivals = 0
        self._policy: SchedulingPolicy = policy or FirstComeFirstServed()
        self._bound = WaitingBound(max_waiting)
        self._clock = clock

    @property
    def busy(self) -> bool:
        """True while a request waits or runs."""
        return self.scheduler.busy

    def usage(self) -> list[PoolUsage]:
        """Pages of each KV group."""
        return self.cache.usage()

    def scratch_bytes(self) -> int:
        """Bytes of the sampler's working memory."""
        return self._readout.scratch_bytes()

    def handle(self, message: Message) -> list[Event]:
        """Takes a request in, or stops one. What is wrong with a request is an event, not an exception."""
        return self._counted(self._add(message) if isinstance(message, AddRequest) else self._abort(message))

    def step(self) -> list[Event]:
        """Runs one step. No events and no work if nothing waits."""
        return self._counted(self._step())

    def reset_prefix_cache(self) -> None:
        """Forgets all cached prefixes: no request that starts later finds what was computed so far."""
        self.cache.reset()

    def snapshot(self) -> EngineSnapshot:
        """What the engine does and has done."""
        scheduler = self.scheduler
        swap = scheduler.swap
        return EngineSnapshot(
            time=self._clock(),
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            swapped=sum(sequence.swapped is not None for sequence in scheduler.waiting),
            kv=tuple(self.cache.usage()),
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            swap_used=0 if swap is None else swap.used,
            swap_limit=0 if swap is None else swap.limit,
            swapped_out=0 if swap is None else swap.swapped_out,
            swapped_in=0 if swap is None else swap.swapped_in,
            steps=self.statistics.copy(),
        )

    def _counted(self, events: list[Event]) -> list[Event]:
        for event in events:
            if isinstance(event, Finished):
                self.statistics.finished[event.reason] += 1
            elif isinstance(event, Failed):
                self.statistics.failed[event.kind] += 1
        return events

    def _step(self) -> list[Event]:
        events: list[Event] = []
        if self._compiling:
            self._take_grammars(events)
        begin = self._clock()
        chunks = self.scheduler.schedule(begin)
        if not chunks:
            if self._compiling:  # nothing else to do: the next messages may be worth more than an idle loop
                wait_for_any([s.compiling for s in self._compiling if s.compiling is not None], _GRAMMAR_WAIT)
            return events
        work, expected = self.scheduler.planned, self.scheduler.expected_seconds()
        plan = self._plans.lay(chunks)
        masks = self._start_masks(chunks)
        planned = self._clock()
        values = self._backend.run(plan, outputs=_outputs(chunks, plan) if work.prompt_tokens else _LOGITS)
        ran = self._clock()
        self.scheduler.advance(chunks)
        if work.prompt_tokens:
            self._look_at_prompts(chunks, plan, values, events)
        if masks is not None:
            self._end_masks(masks, events)
        sampled = self._sample(chunks, plan, values, events, masked=masks is not None)
        end = self._clock()
        self.scheduler.observe(work, end - begin)
        self.statistics.preemptions = self.scheduler.preemptions
        self.statistics.add(
            StepRecord(
                begin=begin,
                schedule=planned - begin,
                forward=ran - planned,
                sample=end - ran,
                decoded=work.decoded,
                prompt_tokens=work.prompt_tokens,
                sampled=sampled,
                sequences=len(chunks),
                expected=expected,
            )
        )
        return events

    # ---- messages --------------------------------------------------------------------------------------------------

    def _add(self, message: AddRequest) -> list[Event]:
        if message.request_id in self._requests:
            return [Failed(message.request_id, f"request {message.request_id} exists already")]
        problem = problem_of(message, context=self._limits.context, vocab_size=self._vocab_size)
        if problem is not None:
            return [Failed(message.request_id, problem)]
        waiting = sum(sequence.started is None for sequence in self.scheduler.waiting)
        seats = max(self._limits.sequences - len(self.scheduler.running), 0)
        refusal = self._bound.refusal(message.request_id, waiting, seats)
        if refusal is not None:
            return [refusal]
        request = _Request(message, self._arrivals, self._clock())
        self._arrivals += 1
        first = self._new_sequence(request, 0)
        if message.beam is not None:
            params, room = message.params, self._limits.context - first.length
            longest = room if params.max_tokens is None else min(params.max_tokens, room)
            request.beams = BeamGroup(message.beam, longest, first.end_ids)
            request.hypotheses[first] = Hypothesis()
        if first.remaining == 0:  # a single token to score: it has no log-probability
            return [Finished(message.request_id, 0, FinishReason.LENGTH, first.timings(self._clock()))]
        if message.params.structured_outputs is not None and message.generates:
            if self._grammars is None:
                return [Failed(message.request_id, "structured_outputs needs a tokenizer, which this engine lacks")]
            first.compiling = self._grammars.compile(message.params.structured_outputs)
            self._compiling.add(first)
        self._requests[message.request_id] = request
        self.statistics.requests += 1
        self._start(request, first)
        return []

    def _new_sequence(self, request: _Request, index: int) -> Sequence:
        params = request.message.params
        end_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else request.message.eos_ids)
        rank = self._policy.rank(params.priority, request.arrived, request.number, index)
        return Sequence(request.message, index, rank, end_ids)

    def _start(self, request: _Request, sequence: Sequence) -> None:
        request.sequences.append(sequence)
        self.scheduler.add(sequence)

    def _abort(self, message: AbortRequest) -> list[Event]:
        request = self._requests.get(message.request_id)
        if request is None:
            return []
        if request.beams is not None:
            return [] if message.index is not None else self._end_beams(request, [], FinishReason.ABORT)
        stopped = [s for s in request.sequences if message.index is None or s.index == message.index]
        events: list[Event] = []
        if message.index is None and not request.started_all:
            timings = request.sequences[0].timings(self._clock())
            others = range(1, request.message.params.n)
            events += [Finished(message.request_id, index, FinishReason.ABORT, timings) for index in others]
        for sequence in stopped:
            self._remove(sequence)
            events.append(self._finished(request, sequence, FinishReason.ABORT))
        return events

    # ---- a step ----------------------------------------------------------------------------------------------------

    def _look_at_prompts(
        self, chunks: list[Chunk], plan: StepPlan, values: Mapping[str, Float32], events: list[Event]
    ) -> None:
        """What requests want of their prompts: log-probabilities, or an embedding."""
        sampled = end = 0
        for chunk in chunks:
            first_sampled, sampled = sampled, sampled + chunk.scored + chunk.samples
            first, end = end, end + chunk.count
            sequence = chunk.sequence
            found: PromptScored | Embedded | BadRow | None
            if sequence.pool is not None:
                found = self._readout.pool(sequence, values[HIDDEN_ROWS][first:end])
            elif chunk.scored:
                rows = range(first_sampled, first_sampled + chunk.scored)
                found = self._readout.score(sequence, values["logits"], rows)
                first += chunk.skip
            else:
                continue
            request = self._requests[sequence.request.request_id]
            if isinstance(found, BadRow):
                self._fail(request, plan, first + found.row, found.status, events)
                continue
            if found is not None:
                events.append(found)
            if not request.message.generates and not sequence.remaining:
                self.scheduler.remove(sequence)
                reason = FinishReason.LENGTH if request.message.score_only else FinishReason.STOP
                events.append(self._finished(request, sequence, reason))

    def _sample(
        self,
        chunks: list[Chunk],
        plan: StepPlan,
        values: Mapping[str, Float32],
        events: list[Event],
        *,
        masked: bool,
    ) -> int:
        """One token for every sequence whose last known token has run, and one for each fork of a finished prompt.
        ``masked`` if grammars forbid some tokens to some of them.

        Returns how many were picked.
        """
        sequences: list[Sequence] = []
        rows: list[int] = []
        row = -1
        for chunk in chunks:
            row += chunk.scored + chunk.samples
            sequence = chunk.sequence
            if chunk.samples and sequence.pages is not None:  # nothing of its request has failed in this step
                sequences.append(sequence)
                rows.append(row)
                if sequence.length == sequence.prompt_length:
                    forks = self._forks(sequence)
                    sequences += forks
                    rows += [row] * len(forks)
        if not sequences:
            return 0
        tokens, found = self._readout.pick(values["logits"], rows, sequences, masked=masked)
        now = self._clock()
        for i, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            request = self._requests.get(sequence.request.request_id)
            if request is None:
                continue  # another output of the request failed in this step
            if found is not None and token < 0:
                self._fail(request, plan, int(plan.sampled_rows[rows[i]]), found.status[i], events)
                continue
            if sequence.first_token is None:
                sequence.first_token = now
            if request.beams is not None:
                sequence.parked = True
                request.nexts[sequence] = token_logprobs(found, i)
                if len(request.nexts) == len(request.sequences):
                    self._expand_beams(request, events)
                continue
            logprobs = None if sequence.request.params.logprobs is None else token_logprobs(found, i)
            sequence.append(token)
            events.append(
                TokenOutput(sequence.request.request_id, sequence.index, token, logprobs, token in sequence.end_ids)
            )
            self._end_if_done(request, sequence, token, events)
        return len(sequences)

    def _take_grammars(self, events: list[Event]) -> None:
        """Lets sequences sample whose grammar has been compiled."""
        for sequence in [s for s in self._compiling if s.compiling is not None and s.compiling.done()]:
            assert sequence.compiling is not None
            self._compiling.discard(sequence)
            try:
                sequence.grammar = compiled(sequence.compiling)
                sequence.compiling = None
            except GrammarError as error:
                self._drop(sequence, f"structured_outputs cannot be used: {error}", events)

    def _start_masks(self, chunks: list[Chunk]) -> _Masks | None:
        """Computes, while the step runs, which tokens the grammars allow after it."""
        if self._grammars is None:
            return None
        grammars = {
            chunk.sequence.grammar: chunk.sequence
            for chunk in chunks
            if chunk.samples and chunk.sequence.grammar is not None
        }
        if not grammars:
            return None
        return grammars, self._grammars.start_masks(grammars)

    def _end_masks(self, masks: _Masks, events: list[Event]) -> None:
        sequences, errors = masks
        for grammar, error in errors.result().items():
            self._drop(sequences[grammar], f"structured_outputs went beyond its limits: {error}", events)

    def _drop(
        self, sequence: Sequence, error: str, events: list[Event], kind: FailureKind = FailureKind.REQUEST
    ) -> None:
        """Fails the request of a sequence; what it computed is good unless the model is to blame."""
        request = self._requests.pop(sequence.request.request_id, None)
        if request is not None:
            for other in request.sequences:
                self._remove(other, discard=kind is FailureKind.MODEL)
            events.append(Failed(sequence.request.request_id, error, kind))

    def _remove(self, sequence: Sequence, *, discard: bool = False) -> None:
        self._compiling.discard(sequence)
        if sequence.compiling is not None:
            sequence.compiling.cancel()
        self.scheduler.remove(sequence, discard=discard)

    def _forks(self, first: Sequence) -> list[Sequence]:
        """The other outputs of a request whose output 0 has just computed the prompt: they share its pages and its
        row of logits, and differ in what they draw."""
        if first.index > 0 or first.output_length > 0 or first.request.beam is not None:
            return []
        request = self._requests[first.request.request_id]
        forks = [self._new_sequence(request, index) for index in range(1, first.request.params.n)]
        for fork in forks:
            fork.started, fork.cached_tokens = first.started, first.cached_tokens
            fork.grammar = None if first.grammar is None else first.grammar.fork()
            request.sequences.append(fork)
            self.scheduler.fork(first, fork)
        return forks

    def _expand_beams(self, request: _Request, events: list[Event]) -> None:
        """All beams of a request know their next tokens: the best continuations become its beams."""
        assert request.beams is not None
        beams = request.sequences
        children = request.beams.expand([(beam, request.hypotheses[beam], request.nexts[beam]) for beam in beams])
        if not children:
            events += self._end_beams(request, request.beams.best(), FinishReason.LENGTH)
            return
        hypotheses: dict[Sequence, Hypothesis] = {}
        for child in children:  # forks come before any parent changes
            beam = child.parent
            if beam in hypotheses:
                request.forked += 1
                beam = child.parent.twin(request.forked)
                self.scheduler.fork(child.parent, beam)
            hypotheses[beam] = child.hypothesis
        for beam in [beam for beam in beams if beam not in hypotheses]:
            self._remove(beam)
        for beam, hypothesis in hypotheses.items():
            beam.parked = False
            beam.append(hypothesis.tokens[-1])
        request.sequences, request.hypotheses = list(hypotheses), hypotheses
        request.nexts.clear()

    def _end_beams(self, request: _Request, found: list[Hypothesis], reason: FinishReason) -> list[Event]:
        """Ends a beam search with what it ``found``, best first; outputs that it did not find end with ``reason``."""
        events: list[Event] = []
        message, now = request.message, self._clock()
        timings = request.sequences[0].timings(now)
        for index in range(message.params.n):
            ended, stop_token = False, None
            if index < len(found):
                hypothesis = found[index]
                ended = hypothesis.ended
                stop_token = hypothesis.tokens[-1] if ended else None
                places = enumerate(zip(hypothesis.tokens, hypothesis.logprobs, strict=True), start=1)
                for place, (token, logprobs) in places:
                    stops = ended and place == len(hypothesis.tokens)
                    events.append(TokenOutput(message.request_id, index, token, logprobs, stops))
            events.append(
                Finished(message.request_id, index, FinishReason.STOP if ended else reason, timings, stop_token)
            )
        for beam in request.sequences:
            self._remove(beam)
        del self._requests[message.request_id]
        self._bound.ended(now)
        return events

    def _end_if_done(self, request: _Request, sequence: Sequence, token: int, events: list[Event]) -> None:
        params = sequence.request.params
        complete = False
        if sequence.grammar is not None:
            try:
                complete = sequence.grammar.advance(token)
            except GrammarError as error:
                self._drop(sequence, f"structured_outputs went beyond its limits: {error}", events)
                return
        if token in sequence.end_ids:
            reason, stop_token = FinishReason.STOP, token
        elif complete:
            reason, stop_token = FinishReason.STOP, None
        elif sequence.output_length == params.max_tokens or sequence.length >= self._limits.context:
            reason, stop_token = FinishReason.LENGTH, None
        else:
            return
        self.scheduler.remove(sequence)
        events.append(self._finished(request, sequence, reason, stop_token))

    def _finished(
        self, request: _Request, sequence: Sequence, reason: FinishReason, stop_token: int | None = None
    ) -> Finished:
        request.sequences.remove(sequence)
        if not request.sequences and self._requests.pop(sequence.request.request_id, None) is not None:
            self._bound.ended(self._clock())
        return Finished(
            sequence.request.request_id, sequence.index, reason, sequence.timings(self._clock()), stop_token
        )

    def _fail(self, request: _Request, plan: StepPlan, row: int, status: int, events: list[Event]) -> None:
        """Ends one request whose logits cannot be used; nothing that it computed stays in the cache."""
        if status == NOTHING_ALLOWED:
            error = "the request leaves no token to pick: logit_bias, min_tokens, bad_words, allowed_token_ids and "
            error += "structured_outputs together exclude all. Exclude fewer"
            kind = FailureKind.REQUEST
        else:
            error = "the model's logits hold NaN or infinity"
            kind = FailureKind.MODEL
            if isinstance(self._backend, Diagnoses):
                op = self._backend.diagnose(plan, row)
                error += f"; the first op with such a value is {op}" if op else "; no op before them shows one"
            error += ". The weights may be damaged: verify the model file"
        self._drop(request.sequences[0], error, events, kind)


_LOGITS = ("logits",)
_GRAMMAR_WAIT = 0.01
"""Seconds between two looks at the inbox while a grammar is compiled and nothing else is to be done."""

_Masks = tuple[dict[Grammar, Sequence], Future[dict[Grammar, GrammarError]]]


def _outputs(chunks: list[Chunk], plan: StepPlan) -> tuple[str, ...]:
    """What a step is to give."""
    if all(chunk.sequence.pool is None for chunk in chunks):
        return _LOGITS
    return (*_LOGITS, HIDDEN_ROWS) if plan.sampled else (HIDDEN_ROWS,)
