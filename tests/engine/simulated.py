"""The toy backend on a simulated clock: every step takes exactly what its work costs, so that tests about time are
deterministic and take none."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from toy_backend import ToyBackend

from tokenmill.backends.backend import Float32, StepLimits
from tokenmill.engine.core import EngineCore
from tokenmill.engine.policies import SchedulingPolicy
from tokenmill.engine.scheduler import MAX_SCORED_ROWS, SchedulerLimits
from tokenmill.program.kv import PAGE_TOKENS, KvGroupSpec
from tokenmill.program.step import StepPlan

FULL = KvGroupSpec(layers=1, kv_heads=1, head_dim=16)


@dataclass(slots=True)
class Costs:
    """Seconds."""

    step: float = 6e-3
    row: float = 0.9e-3
    pair: float = 1.5e-7
    """Per row and slot of context that it reads."""
    chunk_slot: float = 0.0
    """Per sequence of more than one row and slot of context that it reads."""
    jitter: float = 0.0
    """A step takes up to this share more or less."""

    def seconds(self, plan: StepPlan) -> float:
        lengths = np.diff(plan.row_starts)
        chunks = plan.slots[plan.row_starts[1:] - 1][lengths > 1].sum()
        pairs = (plan.slots + 1).sum()
        return self.step + self.row * plan.tokens + self.pair * float(pairs) + self.chunk_slot * float(chunks)


class SimulatedBackend(ToyBackend):
    """Advances ``now`` by the cost of each step."""

    def __init__(self, pages: int, limits: StepLimits, costs: Costs) -> None:
        super().__init__((FULL,), [pages], limits)
        self.costs = costs
        self.now = 0.0
        self._rng = random.Random(0)
        self.seconds: list[float] = []
        """Of each step."""

    def run(
        self, plan: StepPlan, first_op: int = 0, last_op: int | None = None, outputs: Iterable[str] = ("logits",)
    ) -> Mapping[str, Float32]:
        result = super().run(plan, first_op, last_op, outputs)
        self.seconds.append(self.costs.seconds(plan) * (1 + self.costs.jitter * self._rng.uniform(-1, 1)))
        self.now += self.seconds[-1]
        return result


def simulated_core(
    *,
    costs: Costs | None = None,
    step_target: float | None = None,
    tokens: int = 512,
    sequences: int = 8,
    pages: int = 400,
    context: int = 8192,
    policy: SchedulingPolicy | None = None,
    max_waiting: int | None = None,
    headroom: int = 2 * PAGE_TOKENS,
) -> tuple[EngineCore, SimulatedBackend]:
    rows = max(sequences, MAX_SCORED_ROWS)
    backend = SimulatedBackend(pages, StepLimits(tokens, sequences, rows, context), costs or Costs())
    clock: Callable[[], float] = lambda: backend.now  # noqa: E731
    core = EngineCore(
        backend,
        vocab_size=backend.vocab_size,
        kv_pages=[pages],
        limits=SchedulerLimits(tokens, sequences, rows, context, step_target, headroom),
        policy=policy,
        max_waiting=max_waiting,
        clock=clock,
    )
    return core, backend
