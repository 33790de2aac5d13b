"""The torch backend: every op by torch, eagerly, on any device. The oracle of the kernels; not built for speed.

It computes what a program says and nothing else: full precision by default, no packing, no fusion needed. Each source
of error of the native backend can be switched on alone, to see what it costs: the element type of the KV cache (it is
the program's), int8 activations (``emulate_activations``) and 16-bit probabilities (``emulate_probabilities``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenmill.backends.backend import Float32, ModelWeights, StepLimits, UInt8
from tokenmill.errors import TokenmillError
from tokenmill.program.kv import PAGE_TOKENS, KvElement
from tokenmill.program.ops import (
    Activation,
    ActivationFormat,
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

try:
    import torch
    import torch.nn.functional as F  # noqa: N812
except ImportError as error:
    raise TokenmillError("the torch backend needs torch: pip install 'tokenmill[torch]'") from error

Int = npt.NDArray[Any]

SPAN_TOKENS = 256
"""Probabilities are relative to the largest score of a span of this many slots (NUMERICS N7)."""
QUERY_ROWS = 256
"""Rows of queries whose scores are held at once."""

_GROUP = {ActivationFormat.INT8_GROUP32: 32, ActivationFormat.INT8_GROUP256: 256}
_ELEMENT = {KvElement.F16: torch.float16, KvElement.BF16: torch.bfloat16}


class TorchBackend:
    """Runs a program, fused or not, over its own paged KV cache. An int8 copy holds the numbers that its codes mean."""

    def __init__(
        self,
        program: Program,
        weights: ModelWeights,
        limits: StepLimits,
        kv_pages: Sequence[int],
        *,
        device: str = "cpu",
        dtype: str = "float32",
        emulate_activations: Mapping[str, WeightFormat] | None = None,
        emulate_probabilities: KvElement = KvElement.F32,
    ) -> None:
        """``kv_pages`` gives the pages of each KV group; ``dtype`` is torch's name for the elements of values.

        ``emulate_activations`` (matrix name -> packed format) rounds what each of these matrices multiplies to int8
        as its format's kernels do (NUMERICS N2). Raises ValueError for a bad ``kv_pages`` or ``dtype``.
        """
        if len(kv_pages) != len(program.kv_groups):
            raise ValueError(f"kv_pages has {len(kv_pages)} entries, the program {len(program.kv_groups)} KV groups")
        if dtype not in ("float64", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype {dtype!r} must be float64, float32, bfloat16 or float16")
        self.kv_groups = program.kv_groups
        self.limits = limits
        self.program = program
        self._weights = weights
        self._device = torch.device(device)
        self._dtype: torch.dtype = getattr(torch, dtype)
        # Norms, rotations and softmax are computed at least in fp32, whatever values are stored as.
        self._exact = torch.float64 if self._dtype is torch.float64 else torch.float32
        self._formats = dict(emulate_activations or {})
        self._probability = _ELEMENT.get(emulate_probabilities)
        self._loaded: dict[str, torch.Tensor] = {}
        self._live: dict[str, torch.Tensor] = {}
        self._plan: Int = np.empty(0, np.int32)
        self._peak_bytes = 0
        self._known = program.values()
        # What nobody reads is a result: it lives until the program begins anew.
        self._last_use = {name: at[-1] if at else len(program.ops) for name, at in program.readers().items()}
        self._keys, self._values = self._allocate(kv_pages), self._allocate(kv_pages)

    def _allocate(self, kv_pages: Sequence[int]) -> list[torch.Tensor]:
        """One plane per group, ``[pages, layers, kv_heads, PAGE_TOKENS, head_dim]``; unwritten slots are NaN."""
        planes = []
        for spec, pages in zip(self.kv_groups, kv_pages, strict=True):
            shape = (pages, spec.layers, spec.kv_heads, PAGE_TOKENS, spec.head_dim)
            element = _ELEMENT.get(spec.element, self._dtype)
            planes.append(torch.full(shape, torch.nan, dtype=element, device=self._device))
        return planes

    def scratch_bytes(self) -> int:
        """Most bytes of values that were alive at once, so far."""
        return self._peak_bytes

    def kv_bytes(self) -> int:
        """Bytes of the KV pages."""
        return sum(plane.nbytes for plane in (*self._keys, *self._values))

    def copy_page(self, group: int, from_page: int, to_page: int) -> None:
        """Copies a page, all layers, keys and values. Raises IndexError for a page that does not exist."""
        for plane in (self._keys[group], self._values[group]):
            plane[to_page] = plane[from_page]

    def read_page(self, group: int, page: int) -> tuple[UInt8, ...]:
        """The bytes of a page, keys and values. Raises IndexError for a page that does not exist."""
        planes = (self._keys[group][page], self._values[group][page])
        return tuple(plane.reshape(-1).view(torch.uint8).cpu().numpy() for plane in planes)

    def write_page(self, group: int, page: int, planes: Sequence[UInt8]) -> None:
        """Overwrites a page with what :meth:`read_page` gave for one of the same group."""
        for own, given in zip((self._keys[group][page], self._values[group][page]), planes, strict=True):
            own.reshape(-1).view(torch.uint8).copy_(torch.from_numpy(np.ascontiguousarray(given)))

    def close(self) -> None:
        """Frees weights, values and pages."""
        self._loaded.clear()
        self._live.clear()
        self._keys, self._values = [], []

    @torch.no_grad()
    def run(
        self,
        plan: StepPlan,
        first_op: int = 0,
        last_op: int | None = None,
        outputs: Iterable[str] = ("logits",),
    ) -> Mapping[str, Float32]:
        """Executes ops [first_op, last_op) and returns the named values as fp32 ``[rows, width]``.

        See :meth:`tokenmill.backends.backend.Backend.run`.
        A value lives until its last reader has run, in this call or a later one; a range that starts at op 0 begins
        anew. Raises KeyError for a value that is unknown or no longer alive, and ValueError for a plan that breaks
        the limits, names a token outside the vocabulary or reads a page that is not there.
        """
        outputs = tuple(outputs)
        for name in outputs:
            if name not in self._known:
                raise KeyError(f"the program has no value {name}")
        self._check_plan(plan)
        ops = self.program.ops
        last_op = self.program.end_for(outputs) if last_op is None else last_op
        if not 0 <= first_op <= last_op <= len(ops):
            raise ValueError(f"ops [{first_op}, {last_op}) are not a range of the program's {len(ops)} ops")
        if first_op == 0:
            self._live.clear()
            self._plan = plan.buffer.copy()
        elif not np.array_equal(self._plan, plan.buffer):
            raise ValueError("the live values belong to another plan: a new plan begins at op 0")
        for index in range(first_op, last_op):
            for value, result in self._execute(ops[index], plan):
                self._live[value.name] = result.to(self._dtype)
            self._peak_bytes = max(self._peak_bytes, sum(t.nbytes for t in self._live.values()))
            for name in [n for n in self._live if self._last_use[n] <= index and n not in outputs]:
                del self._live[name]
        results = {name: self._get(name).to(torch.float32).cpu().numpy() for name in outputs}
        for name in [n for n in self._live if self._last_use[n] < last_op]:
            del self._live[name]
        return results

    def diagnose(self, plan: StepPlan, row: int) -> str | None:
        """Names the op that first produced a NaN or infinity on which what row ``row`` of the step gives depends.

        Runs the step's ops again, as :meth:`tokenmill.backends.native.NativeBackend.diagnose` does. None if every
        number is finite.
        """
        first = int(max(start for start in plan.row_starts if start <= row))
        own = {Rows.TOKENS: slice(first, row + 1), Rows.SAMPLED: plan.sampled_rows == row}
        for index, op in enumerate(self.program.ops):
            results = self.run(plan, index, index + 1, [value.name for value in op.outputs()])
            for name, values in results.items():
                if not np.isfinite(values[own[self._known[name].rows]]).all():
                    return f"{type(op).__name__} {', '.join(results)}"
        return None

    def _check_plan(self, plan: StepPlan) -> None:
        limits = self.limits
        for name, count, bound in (
            ("tokens", plan.tokens, limits.tokens),
            ("sequences", plan.sequences, limits.sequences),
            ("sampled rows", plan.sampled, limits.sampled),
            ("slots of a sequence", int(plan.slots.max(initial=-1)) + 1, limits.context),
        ):
            if count > bound:
                raise ValueError(f"the step has {count} {name}, the limit is {bound}")
        if plan.groups != len(self.kv_groups):
            raise ValueError(f"the step has {plan.groups} KV groups, the program {len(self.kv_groups)}")
        ids = plan.token_ids
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.program.vocab_size:
            raise ValueError(f"a token id is outside the vocabulary of {self.program.vocab_size}")

    def _get(self, name: str) -> torch.Tensor:
        if name not in self._live:
            raise KeyError(f"value {name} is not alive: its op has not run, or its last reader has")
        return self._live[name]

    def _weight(self, name: str) -> torch.Tensor:
        if name not in self._loaded:
            matrix = len(self.program.weights[name]) == 2
            array = self._weights.decoded(name) if matrix else self._weights.vector(name)
            self._loaded[name] = torch.tensor(np.asarray(array), device=self._device).to(self._dtype)
        return self._loaded[name]

    def _index(self, indices: Int) -> torch.Tensor:
        return torch.as_tensor(np.asarray(indices, dtype=np.int64), device=self._device)

    # ---- ops ---------------------------------------------------------------------------------------------------------

    def _execute(self, op: Op, plan: StepPlan) -> Iterator[tuple[Value, torch.Tensor]]:
        match op:
            case Embed():
                yield op.out, self._weight(op.weight)[self._index(plan.token_ids)] * op.scale
            case RmsNorm():
                yield from _outputs(op.out, op.quantized, self._rms_norm(op))
            case Linear():
                yield op.out, self._linear(LinearPart(op.x, op.weight, op.out, op.bias))
            case LinearGroup():
                yield from [(part.out, self._linear(part)) for part in op.parts]
            case Rope():
                yield op.out, self._rope(op, plan)
            case Attention():
                yield from _outputs(op.out, op.quantized, self._attention(op, plan))
            case GatedActivation():
                gate = _ACTIVATIONS[op.activation](self._get(op.gate.name))
                yield from _outputs(op.out, op.quantized, gate * self._get(op.up.name))
            case Add():
                yield op.out, self._get(op.a.name) + self._get(op.b.name)
            case SoftCap():
                yield op.out, op.cap * torch.tanh(self._get(op.x.name) / op.cap)
            case GatherSampled():
                yield op.out, self._get(op.x.name)[self._index(plan.sampled_rows)]
            case Quantize():
                yield op.out, round_to_int8(self._get(op.x.name), op.out.format)
            case _:
                raise ValueError(f"the torch backend cannot run {type(op).__name__}")

    def _heads(self, x: Value, heads: int) -> torch.Tensor:
        """``[rows, heads, width / heads]`` in at least fp32."""
        live = self._get(x.name)
        return live.to(self._exact).reshape(live.shape[0], heads, x.width // heads)

    def _rms_norm(self, op: RmsNorm) -> torch.Tensor:
        x = self._heads(op.x, op.x.width // op.group_width)
        normed = x / torch.sqrt(x.square().mean(-1, keepdim=True) + op.eps)
        return (normed * (self._weight(op.weight).to(self._exact) + op.weight_offset)).flatten(1)

    def _linear(self, part: LinearPart) -> torch.Tensor:
        x = self._get(part.x.name)
        if part.x.format is ActivationFormat.F32 and part.weight in self._formats:
            x = round_to_int8(x, self._formats[part.weight].activation)
        out = F.linear(x, self._weight(part.weight), None if part.bias is None else self._weight(part.bias))
        return out if part.residual is None else out + self._get(part.residual.name)

    def _rope(self, op: Rope, plan: StepPlan) -> torch.Tensor:
        positions = torch.as_tensor(plan.positions.astype(np.float64), device=self._device)
        frequencies = torch.tensor(op.frequencies, dtype=torch.float64, device=self._device)
        angles = torch.outer(positions, frequencies)[:, None, :]
        cos = (angles.cos() * op.magnitude).to(self._exact)
        sin = (angles.sin() * op.magnitude).to(self._exact)
        x = self._heads(op.x, op.heads)
        turning, resting = x[..., : op.rotary_dim], x[..., op.rotary_dim :]
        if op.style is RopeStyle.HALF:
            a, b = turning.chunk(2, dim=-1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        else:
            a, b = turning[..., 0::2], turning[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        return torch.cat((turned, resting), dim=-1).flatten(1)

    # ---- attention ---------------------------------------------------------------------------------------------------

    def _attention(self, op: Attention, plan: StepPlan) -> torch.Tensor:
        q = self._heads(op.q, op.heads)
        k, v = self._heads(op.k, op.kv_heads), self._heads(op.v, op.kv_heads)
        keys, values = self._keys[op.group][:, op.layer], self._values[op.group][:, op.layer]
        tables, starts = plan.page_tables[op.group], plan.row_starts
        out = torch.empty_like(q)
        # All writes come first: sequences may share pages, but never one that a step writes.
        for sequence in range(plan.sequences):
            rows = slice(int(starts[sequence]), int(starts[sequence + 1]))
            slots = plan.slots[rows]
            pages = self._index(self._pages(tables[sequence], slots // PAGE_TOKENS, op.group, sequence))
            within = self._index(slots % PAGE_TOKENS)
            keys[pages, :, within] = k[rows].to(keys.dtype)
            values[pages, :, within] = v[rows].to(values.dtype)
        for sequence in range(plan.sequences):
            for begin in range(int(starts[sequence]), int(starts[sequence + 1]), QUERY_ROWS):
                rows = slice(begin, min(begin + QUERY_ROWS, int(starts[sequence + 1])))
                slots = plan.slots[rows]
                first, last = int(slots[0]), int(slots[-1])
                oldest = 0 if op.window is None else max(0, first - op.window + 1)
                logical = np.arange(oldest // PAGE_TOKENS, last // PAGE_TOKENS + 1)
                pages = self._index(self._pages(tables[sequence], logical, op.group, sequence))
                seen = slice(oldest - int(logical[0]) * PAGE_TOKENS, last + 1 - int(logical[0]) * PAGE_TOKENS)
                # [kv_heads, slots, head_dim]
                k_seen = keys[pages].transpose(0, 1).flatten(1, 2)[:, seen].to(self._exact)
                v_seen = values[pages].transpose(0, 1).flatten(1, 2)[:, seen].to(self._exact)
                out[rows] = self._attend(op, q[rows], k_seen, v_seen, slots=self._index(slots), oldest=oldest)
        return out.flatten(1)

    def _pages(self, table: Int, logical: Int, group: int, sequence: int) -> Int:
        count = self._keys[group].shape[0]
        pages = table[logical] if int(logical[-1]) < len(table) else np.array([-1])
        if int(pages.min()) < 0 or int(pages.max()) >= count:
            raise ValueError(
                f"sequence {sequence} of the step needs pages {int(logical[0])} to {int(logical[-1])} of KV group "
                f"{group}, but its table has {pages.tolist()} there, of {count} pages"
            )
        return pages

    def _attend(
        self, op: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, slots: torch.Tensor, oldest: int
    ) -> torch.Tensor:
        """q ``[rows, heads, head_dim]``, k and v ``[kv_heads, slots, head_dim]`` from slot ``oldest`` on."""
        rows, each = q.shape[0], op.heads // op.kv_heads
        grouped = q.reshape(rows, op.kv_heads, each, op.head_dim).permute(1, 2, 0, 3)
        scores = torch.matmul(grouped, k[:, None].transpose(-1, -2)) * op.scale
        if op.softcap is not None:
            scores = op.softcap * torch.tanh(scores / op.softcap)
        key_slots = torch.arange(oldest, oldest + k.shape[1], device=self._device)
        hidden = key_slots[None, :] > slots[:, None]
        if op.window is not None:
            hidden |= key_slots[None, :] <= slots[:, None] - op.window
        scores = scores.masked_fill(hidden, -torch.inf)
        probabilities = self._softmax(scores, oldest)
        return torch.matmul(probabilities, v[:, None]).permute(2, 0, 1, 3).reshape(rows, op.heads, op.head_dim)

    def _softmax(self, scores: torch.Tensor, oldest: int) -> torch.Tensor:
        if self._probability is None:
            return torch.softmax(scores, dim=-1)
        # NUMERICS N7: each span rounds P relative to its own maximum, and sums the rounded numbers.
        first = SPAN_TOKENS - oldest % SPAN_TOKENS
        lengths = [min(first, scores.shape[-1])]
        lengths += [min(SPAN_TOKENS, scores.shape[-1] - at) for at in range(first, scores.shape[-1], SPAN_TOKENS)]
        largest = scores.amax(dim=-1, keepdim=True)
        spans = []
        for span in torch.split(scores, lengths, dim=-1):
            peak = span.amax(dim=-1, keepdim=True)
            peak = torch.where(peak == -torch.inf, largest, peak)
            rounded = torch.exp(span - peak).to(self._probability).to(self._exact)
            spans.append(rounded * torch.exp(peak - largest))
        weights = torch.cat(spans, dim=-1)
        return weights / weights.sum(dim=-1, keepdim=True)


def round_to_int8(x: torch.Tensor, format: ActivationFormat) -> torch.Tensor:
    """x ``[rows, width]`` as its int8 codes and scales represent it (NUMERICS N2): groups along each row, the last may
    be short. NaN stays NaN."""
    if format is ActivationFormat.F32:
        return x
    group, width = _GROUP[format], x.shape[-1]
    padded = F.pad(x.to(torch.float32), (0, -width % group)).reshape(x.shape[0], -1, group)
    largest = padded.abs().amax(dim=-1, keepdim=True)
    # A true division: torch computes `127.0 / tensor` by a reciprocal, which moves codes that lie half way.
    codes = torch.round(padded * torch.div(torch.full_like(largest, 127.0), largest))
    return torch.where(largest == 0, 0.0, codes * (largest / 127.0)).flatten(-2)[..., :width].to(x.dtype)


def _outputs(out: Value | None, copies: Sequence[Value], result: torch.Tensor) -> Iterator[tuple[Value, torch.Tensor]]:
    if out is not None:
        yield out, result
    for copy in copies:
        yield copy, round_to_int8(result, copy.format)


_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.SILU: F.silu,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
}
