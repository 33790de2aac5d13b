"""The native backend: lowers a program once to the C++ executor, then runs each step in one call without the GIL."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokenmill import _native
from tokenmill.backends.backend import Float32, ModelWeights, StepLimits, UInt8
from tokenmill.backends.head_screen import HeadScreen, screenable_head
from tokenmill.program.buffers import plan_buffers
from tokenmill.program.fuse import fuse
from tokenmill.program.ops import (
    Activation,
    Add,
    Attention,
    Embed,
    GatedActivation,
    GatherSampled,
    Linear,
    LinearGroup,
    LinearPart,
    Op,
    Quantize,
    RmsNorm,
    Rope,
    RopeStyle,
    Rows,
    SoftCap,
    Value,
    WeightFormat,
)
from tokenmill.program.program import Program
from tokenmill.program.step import StepPlan

# Numbers shared with csrc/kernels/pointwise.h.
_ACTIVATIONS = {Activation.SILU: 0, Activation.GELU: 1, Activation.GELU_TANH: 2}
_ROPE_STYLES = {RopeStyle.HALF: 0, RopeStyle.INTERLEAVED: 1}


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Where one step's seconds went."""

    prepare: float
    """Before the first op: angles of rope, schedules of attention."""
    ops: list[float]
    """Of each op of the fused program."""
    forks: int
    """Parallel regions."""
    joining: float
    """Of the ops' time, what forks took beside the thread that worked longest."""
    waiting: float
    """Of the ops' time, what a thread spent without work in forks, on average."""


@dataclass(frozen=True, slots=True)
class ScreenCounts:
    """What a head's screen has done."""

    rows: int
    """Rows that it served."""
    blocks: int
    """Blocks of 16 rows of the head that they needed all the same."""
    plain_steps: int
    """Steps that took the whole head because the last screen left too much of it."""


class NativeBackend:
    """Runs a program on the CPU's kernels. One instance serves one caller at a time."""

    def __init__(
        self,
        program: Program,
        weights: ModelWeights,
        limits: StepLimits,
        kv_pages: Sequence[int],
        threads: int | _native.ThreadPool = 0,
        *,
        taps: Collection[str] = (),
        screened_head: bool = False,
    ) -> None:
        """Fuses and lowers ``program`` and allocates its buffers and KV pages.

        ``kv_pages`` gives the pages of each KV group; ``threads`` 0 means all that the process may use. Besides the
        program's results only values named in ``taps`` can be read from a step. ``screened_head`` makes plans that say
        ``best_only`` read less of a head that can be screened. Raises KeyError for a tap or weight that does not exist,
        ValueError for limits that do not fit and MemoryError.
        """
        if len(kv_pages) != len(program.kv_groups):
            raise ValueError(f"kv_pages has {len(kv_pages)} entries, the program {len(program.kv_groups)} KV groups")
        names = program.values()
        for tap in taps:
            if tap not in names:
                raise KeyError(f"cannot tap {tap}: the program has no such value")
        keep = {name for name, readers in program.readers().items() if not readers} | set(taps)
        formats = {name: weights.matrix(name).format for name in program.matrices()}
        self.program = fuse(program, formats, keep)
        """The fused program; ``first_op`` and ``last_op`` of :meth:`run` count its ops."""
        self.kv_groups = program.kv_groups
        self.limits = limits
        self._weights = weights
        self._matrices: dict[str, _native.Matrix] = {}
        self._ids: dict[str, int] = {}
        self._ends: dict[tuple[str, ...], int] = {}
        self._outputs = {name: value for name, value in self.program.values().items() if name in keep}
        self._plan: StepPlan | None = None
        """That ran last; ``_plan_values`` are the outputs as far as its rows go."""
        self._plan_values: dict[str, Float32] = {}
        self._executor: _native.Executor | None = None
        self._head = screenable_head(self.program, formats) if screened_head else None
        self._screen: HeadScreen | None = None
        self.pool = _native.ThreadPool(threads) if isinstance(threads, int) else threads
        """May serve others between two steps."""
        executor = _native.Executor(
            limits.tokens, limits.sequences, limits.sampled, limits.context, program.vocab_size, self.pool
        )
        for group, pages in zip(program.kv_groups, kv_pages, strict=True):
            executor.add_kv_group(group.layers, group.kv_heads, group.head_dim, group.window, group.element, pages)
        buffers = plan_buffers(self.program, limits, keep, _native.value_row_bytes)
        for name, value in self.program.values().items():
            place = buffers.placements[name]
            sampled = value.rows is Rows.SAMPLED
            self._ids[name] = executor.add_value(place.offset, place.row_bytes, value.width, value.format, sampled)
        for op in self.program.ops:
            self._lower(executor, op)
        executor.prepare()
        self._executor = executor
        self._views = {
            name: executor.value(self._ids[name], limits.sampled if value.rows is Rows.SAMPLED else limits.tokens)
            for name, value in self._outputs.items()
        }

    # ---- running -----------------------------------------------------------------------------------------------------

    def run(
        self,
        plan: StepPlan,
        first_op: int = 0,
        last_op: int | None = None,
        outputs: Iterable[str] = ("logits",),
    ) -> Mapping[str, Float32]:
        """Executes ops [first_op, last_op) of the fused program and returns the named values as views.

        See :meth:`tokenmill.backends.backend.Backend.run`.
        """
        executor = self._open()
        words = self._words(plan)
        values = {name: self._value(name) for name in outputs}
        executor.run(words, first_op, self._end_for(tuple(values)) if last_op is None else last_op)
        return values

    def run_timed(self, plan: StepPlan) -> StepTimes:
        """Executes the whole program, with the same work as :meth:`run` and a clock read between ops and around every
        thread's share of them. Raises ValueError if the plan exceeds the limits.
        """
        (prepare, *ops), forks, joining, waiting = self._open().run_timed(self._words(plan))
        return StepTimes(prepare, ops, forks, joining, waiting / self.threads)

    def diagnose(self, plan: StepPlan, row: int) -> str | None:
        """Names the op that first produced a NaN or infinity on which what row ``row`` of the step gives depends.

        Runs the step's ops again, which writes the same keys and values; call it right after the step. None if every
        number is finite. Raises ValueError if the step has no such row.
        """
        index = self._open().diagnose(self._words(plan), row)
        if index < 0:
            return None
        op = self.program.ops[index]
        return f"{type(op).__name__} {', '.join(value.name for value in op.outputs())}"

    def close(self) -> None:
        """Drops the executor, its buffers and KV pages, and its threads unless others use them; views that are still
        held keep them alive."""
        self._executor = None
        self._plan = None
        self._views.clear()
        self._plan_values.clear()
        self._matrices.clear()

    def matrix_format(self, name: str) -> WeightFormat:
        """The packed format of matrix ``name``. Raises KeyError."""
        return self._weights.matrix(name).format

    # ---- memory ------------------------------------------------------------------------------------------------------

    @property
    def threads(self) -> int:
        """Threads of a step, the caller's included."""
        return self._open().threads

    def scratch_bytes(self) -> int:
        """Bytes of activation buffers and per-thread scratch, as allocated."""
        return self._open().scratch_bytes

    def kv_bytes(self) -> int:
        """Bytes of the KV pages, as allocated."""
        return self._open().kv_bytes

    def kv_plane(self, group: int, plane: int) -> npt.NDArray[np.uint16] | Float32:
        """The key (0) or value (1) plane of a group in place: ``[pages, layers, kv_heads, 32 * head_dim]``.

        16-bit elements appear as uint16. The arrangement inside a page is that of :mod:`tokenmill.program.kv`.
        """
        return self._open().kv_plane(group, plane)

    def copy_page(self, group: int, from_page: int, to_page: int) -> None:
        """Copies a page, all layers and planes. Raises ValueError for a page that does not exist."""
        self._open().copy_page(group, from_page, to_page)

    def read_page(self, group: int, page: int) -> tuple[UInt8, ...]:
        """The bytes of a page in place, keys and values. Raises IndexError for a page that does not exist."""
        return tuple(self.kv_plane(group, plane)[page].reshape(-1).view(np.uint8) for plane in (0, 1))

    def write_page(self, group: int, page: int, planes: Sequence[UInt8]) -> None:
        """Overwrites a page with what :meth:`read_page` gave for one of the same group."""
        for own, given in zip(self.read_page(group, page), planes, strict=True):
            own[:] = given

    # ---- the screened head -------------------------------------------------------------------------------------------

    def screen_bytes(self) -> int:
        """Bytes of the head's screen; 0 without one."""
        return 0 if self._screen is None else self._screen.nbytes

    def screen_counts(self) -> ScreenCounts:
        """What the head's screen has done so far."""
        return ScreenCounts(*self._open().screen_counts)

    # ---- lowering ----------------------------------------------------------------------------------------------------

    def _open(self) -> _native.Executor:
        if self._executor is None:
            raise ValueError("the backend is closed")
        return self._executor

    def _end_for(self, outputs: tuple[str, ...]) -> int:
        if outputs not in self._ends:
            self._ends[outputs] = self.program.end_for(outputs)
        return self._ends[outputs]

    def _words(self, plan: StepPlan) -> _native.PlanWords:
        """The plan for the executor. One that runs again, with other words in its sections, is known: finding a numpy
        array's memory, and making views, takes longer than what else a step does here."""
        if plan is not self._plan:
            self._plan, self._plan_words = plan, _native.PlanWords(plan.buffer)
            self._plan_values = {
                name: view[: plan.sampled if self._outputs[name].rows is Rows.SAMPLED else plan.tokens]
                for name, view in self._views.items()
            }
        return self._plan_words

    def _value(self, name: str) -> Float32:
        if name not in self._plan_values:
            raise KeyError(
                f"{name} cannot be read from this backend: it keeps {', '.join(sorted(self._outputs))}; "
                f"name others in NativeBackend(taps=...)"
            )
        return self._plan_values[name]

    def _matrix(self, name: str) -> _native.Matrix:
        if name not in self._matrices:
            packed = self._weights.matrix(name)
            self._matrices[name] = _native.Matrix(packed.format, packed.n, packed.k, packed.data)
        return self._matrices[name]

    def _vector(self, name: str) -> Float32:
        return np.ascontiguousarray(self._weights.vector(name), dtype=np.float32)

    def _id(self, value: Value) -> int:
        return self._ids[value.name]

    def _optional(self, value: Value | None) -> int | None:
        return None if value is None else self._ids[value.name]

    def _all(self, values: Iterable[Value]) -> list[int]:
        return [self._ids[value.name] for value in values]

    def _part(self, part: LinearPart) -> _native.LinearPart:
        bias = None if part.bias is None else self._vector(part.bias)
        matrix = self._matrix(part.weight)
        return _native.LinearPart(self._id(part.x), matrix, self._id(part.out), bias, self._optional(part.residual))

    def _lower(self, executor: _native.Executor, op: Op) -> None:
        match op:
            case Embed():
                executor.add_embed(self._matrix(op.weight), self._id(op.out), op.scale)
            case RmsNorm():
                executor.add_rms_norm(
                    self._id(op.x),
                    self._vector(op.weight),
                    self._optional(op.out),
                    self._all(op.quantized),
                    op.eps,
                    op.group_width,
                    op.weight_offset,
                )
            case Linear() if op is self._head:
                head = self._weights.matrix(op.weight)
                screen = self._screen = HeadScreen.of(head, self.pool.size)
                matrix = _native.Matrix(screen.matrix.format, head.n, head.k, screen.matrix.data)
                executor.add_screened_head(self._part(LinearPart(op.x, op.weight, op.out)), matrix, screen.bounds)
            case Linear():
                executor.add_linear_group([self._part(LinearPart(op.x, op.weight, op.out, op.bias))])
            case LinearGroup():
                executor.add_linear_group([self._part(part) for part in op.parts])
            case Rope():
                executor.add_rope(
                    self._id(op.x),
                    self._id(op.out),
                    op.heads,
                    op.head_dim,
                    op.rotary_dim,
                    _ROPE_STYLES[op.style],
                    list(op.frequencies),
                    op.magnitude,
                )
            case Attention():
                executor.add_attention(
                    self._id(op.q),
                    self._id(op.k),
                    self._id(op.v),
                    self._optional(op.out),
                    self._all(op.quantized),
                    op.layer,
                    op.group,
                    op.heads,
                    op.scale,
                    op.softcap,
                )
            case GatedActivation():
                gate, up, copies = self._id(op.gate), self._id(op.up), self._all(op.quantized)
                executor.add_gated_activation(gate, up, self._optional(op.out), copies, _ACTIVATIONS[op.activation])
            case Add():
                executor.add_add(self._id(op.a), self._id(op.b), self._id(op.out))
            case SoftCap():
                executor.add_softcap(self._id(op.x), self._id(op.out), op.cap)
            case GatherSampled():
                executor.add_gather_sampled(self._id(op.x), self._id(op.out))
            case Quantize():
                executor.add_quantize(self._id(op.x), self._id(op.out))
            case _:
                raise ValueError(f"the native backend has no kernel for {type(op).__name__}")
