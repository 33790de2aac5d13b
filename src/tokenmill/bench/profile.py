"""Where a step's time goes, op by op, and what the machine's limits would allow for each.

An op's limit is the longest of three times: its weights, keys and values at memory bandwidth, its values at the
bandwidth of the last-level cache, its operations at the int8 or fp32 peak (roofline model, Williams, Waterman and
Patterson 2009). Limits are measured just before and just after, and the faster ones count.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from tokenmill import _native
from tokenmill.backends.backend import StepLimits
from tokenmill.backends.native import NativeBackend, StepTimes
from tokenmill.bare_model import open_bare
from tokenmill.bench.op_work import OpWork, op_work
from tokenmill.bench.roofline import MEMORY_WORKING_SET
from tokenmill.engine.core import EngineCore
from tokenmill.engine.engine import Engine
from tokenmill.engine.messages import AddRequest, EngineError, Failed, Finished
from tokenmill.engine.scheduler import SchedulerLimits
from tokenmill.program.kv import PAGE_TOKENS, KvElement
from tokenmill.program.step import SequenceStep, StepPlan, lay_plan
from tokenmill.sampling import SamplingParams

_LIMIT_SECONDS = 0.15
_CACHE_WORKING_SET = 8 << 20


@dataclass(frozen=True, slots=True)
class ProfileLimits:
    """Bytes and operations per second."""

    memory: float
    cache: float
    int8: float
    f32: float

    def seconds(self, work: OpWork) -> float:
        """The least time that ``work`` takes."""
        compute = work.int8_operations / self.int8 + work.float_operations / self.f32
        return max(work.memory_bytes / self.memory, work.activation_bytes / self.cache, compute)


@dataclass(frozen=True, slots=True)
class OpTime:
    """One op of the step: median seconds, and the least that the limits allow."""

    role: str
    seconds: float
    limit_seconds: float
    memory_bytes: int
    activation_bytes: int
    operations: int


@dataclass(frozen=True, slots=True)
class RoleTime:
    """All ops of one role (one per layer, mostly)."""

    role: str
    count: int
    seconds: float
    limit_seconds: float
    bytes: int
    operations: int

    @property
    def share_of_limit(self) -> float:
        return self.limit_seconds / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class StepProfile:
    """One kind of step: the round with the median time, so that its parts add up.

    ``seconds`` is the whole timed step as Python sees it; ``untimed_seconds`` a median step without clock reads.
    ``joining_seconds`` and ``waiting_seconds`` are those of :class:`tokenmill.backends.native.StepTimes`.
    """

    phase: str
    tokens: int
    sequences: int
    depth: int
    seconds: float
    untimed_seconds: float
    prepare_seconds: float
    """Rope tables and attention schedules, before the first op."""
    forks: int
    joining_seconds: float
    waiting_seconds: float
    limit_seconds: float
    ops: tuple[OpTime, ...]
    roles: tuple[RoleTime, ...]


@dataclass(frozen=True, slots=True)
class EngineStep:
    """A median decode step of the engine, from one to the next, and the part of it in which the network runs."""

    seconds: float
    network_seconds: float


@dataclass(frozen=True, slots=True)
class Profile:
    """A model's steps on this machine."""

    isa: str
    threads: int
    limits: ProfileLimits
    steps: tuple[StepProfile, ...]
    engine: EngineStep | None
    """The same decode step, with the scheduler, the sampler and the thread that delivers. None if the context has no
    room for a few tokens."""


def profile_model(
    path: Path,
    *,
    prompt_tokens: int = 512,
    depth: int = 512,
    sequences: int = 1,
    rounds: int = 10,
    threads: int = 0,
    kv_element: KvElement = KvElement.F16,
    memory: str | None = None,
) -> Profile:
    """Profiles a prefill chunk of ``prompt_tokens`` and a decode step of ``sequences`` sequences at ``depth`` slots.

    Raises as :func:`tokenmill.bare_model.open_bare` does.
    """
    context = max(prompt_tokens, depth + 1)
    limits = StepLimits(max(prompt_tokens, sequences), sequences, sequences, context)
    before = _limits(threads)
    with open_bare(path, limits, kv_element=kv_element, threads=threads, memory=memory) as model:
        backend = model.backend
        assert isinstance(backend, NativeBackend)
        random = np.random.default_rng(0)
        vocabulary = backend.program.vocab_size
        tables = _tables(backend, sequences, context)

        def step(count: int, first: int, many: int) -> StepPlan:
            parts = [
                SequenceStep(random.integers(0, vocabulary, count).astype(np.int32), first, tables[s], [count - 1])
                for s in range(many)
            ]
            return lay_plan(parts, len(backend.kv_groups))

        for s in range(sequences):  # keys and values for the decode step to read
            for first in range(0, depth, prompt_tokens):
                count = min(prompt_tokens, depth - first)
                part = SequenceStep(random.integers(0, vocabulary, count).astype(np.int32), first, tables[s])
                backend.run(lay_plan([part], len(backend.kv_groups)), outputs=())
        plans = {
            "decode": (step(1, depth, sequences), depth),
            "prefill": (step(prompt_tokens, 0, 1), 0),  # last: it writes over slots that decode reads
        }
        times = {phase: _time(backend, plan, rounds) for phase, (plan, _) in plans.items()}
        engine = _engine_step(backend, vocabulary, depth, sequences, rounds)
        after = _limits(threads)
        best = ProfileLimits(*map(max, astuple(before), astuple(after)))
        formats = {name: backend.matrix_format(name) for name in backend.program.matrices()}
        steps = []
        for phase in ("prefill", "decode"):
            plan, first = plans[phase]
            work = [op_work(op, backend.program, plan, formats, backend.kv_groups) for op in backend.program.ops]
            steps.append(_profile(phase, plan, first, times[phase], work, best))
        return Profile(_native.active_isa(), backend.threads, best, tuple(steps), engine)


def _tables(backend: NativeBackend, sequences: int, context: int) -> list[list[list[int]]]:
    """Page tables per sequence and group, page after page."""
    pages = -(-context // PAGE_TOKENS)
    return [[list(range(s * pages, (s + 1) * pages)) for _ in backend.kv_groups] for s in range(sequences)]


def _time(backend: NativeBackend, plan: StepPlan, rounds: int) -> tuple[float, float, StepTimes]:
    """Seconds of a median untimed step, and of the median timed one with its parts; in turn, after a warm-up."""
    backend.run(plan, outputs=())
    untimed, timed = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        backend.run(plan, outputs=())
        middle = time.perf_counter()
        parts = backend.run_timed(plan)
        timed.append((time.perf_counter() - middle, parts))
        untimed.append(middle - start)
    seconds, parts = sorted(timed, key=lambda each: each[0])[len(timed) // 2]
    return statistics.median(untimed), seconds, parts


def _engine_step(backend: NativeBackend, vocabulary: int, depth: int, sequences: int, rounds: int) -> EngineStep | None:
    """``rounds`` steps that decode ``sequences`` requests at about ``depth``, in an engine over ``backend``. Raises
    EngineError if the model gives no usable logits."""
    limits = backend.limits
    # One comes from the prompt, two settle, and the first sequences go on while the last prompts run.
    outputs = rounds + 3 + sequences * depth // limits.tokens
    length = min(depth, limits.context - outputs)
    if length < 1:
        return None
    pages = [sequences * -(-limits.context // PAGE_TOKENS)] * len(backend.kv_groups)
    core = EngineCore(
        backend,
        vocab_size=vocabulary,
        kv_pages=pages,
        limits=SchedulerLimits(limits.tokens, limits.sequences, limits.sampled, limits.context),
        prefix_caching=False,
        pool=backend.pool,
    )
    params = SamplingParams(max_tokens=outputs, temperature=0, seed=0)
    prompts = np.random.default_rng(1).integers(0, vocabulary, (sequences, length)).astype(np.int32)
    with Engine(core) as engine:
        stream = engine.submit([AddRequest(i, prompt, params) for i, prompt in enumerate(prompts)], together=True)
        for _ in prompts:
            while not isinstance(event := stream.next_event(), Finished):
                if isinstance(event, Failed):
                    raise EngineError(event.error)
    steps = [step for step in core.statistics.recent if step.decoded == sequences and not step.prompt_tokens][1:]
    if len(steps) < 2:
        return None
    periods = [after.begin - step.begin for step, after in itertools.pairwise(steps)]
    return EngineStep(statistics.median(periods), statistics.median(step.forward for step in steps))


def _profile(
    phase: str,
    plan: StepPlan,
    depth: int,
    times: tuple[float, float, StepTimes],
    work: Sequence[OpWork],
    limits: ProfileLimits,
) -> StepProfile:
    untimed, whole, parts = times
    ops = tuple(
        OpTime(w.role, seconds, limits.seconds(w), w.memory_bytes, w.activation_bytes, w.operations)
        for w, seconds in zip(work, parts.ops, strict=True)
    )
    roles: dict[str, list[OpTime]] = {}
    for op in ops:
        roles.setdefault(op.role, []).append(op)
    totals = tuple(
        RoleTime(
            role,
            len(group),
            sum(op.seconds for op in group),
            sum(op.limit_seconds for op in group),
            sum(op.memory_bytes + op.activation_bytes for op in group),
            sum(op.operations for op in group),
        )
        for role, group in roles.items()
    )
    limit = sum(op.limit_seconds for op in ops)
    return StepProfile(
        phase=phase,
        tokens=plan.tokens,
        sequences=plan.sequences,
        depth=depth,
        seconds=whole,
        untimed_seconds=untimed,
        prepare_seconds=parts.prepare,
        forks=parts.forks,
        joining_seconds=parts.joining,
        waiting_seconds=parts.waiting,
        limit_seconds=limit,
        ops=ops,
        roles=totals,
    )


def _limits(threads: int) -> ProfileLimits:
    return ProfileLimits(
        _native.read_bytes_per_second(MEMORY_WORKING_SET, threads, _LIMIT_SECONDS),
        _native.read_bytes_per_second(_CACHE_WORKING_SET, threads, _LIMIT_SECONDS),
        _native.int8_operations_per_second(threads, _LIMIT_SECONDS),
        _native.f32_operations_per_second(threads, _LIMIT_SECONDS),
    )
