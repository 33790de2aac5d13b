"""A plan made from the one before is the plan that would have been laid anew, whatever happened between the two."""

from __future__ import annotations

import random

import numpy as np
import pytest
from test_core import FULL, WINDOW, make_core, random_prompt, request, run
from toy_backend import ToyBackend

from tokenmill.engine.core import EngineCore
from tokenmill.engine.kv_cache import SequencePages
from tokenmill.engine.messages import AbortRequest, BeamSearch
from tokenmill.engine.step_budget import Chunk
from tokenmill.engine.step_plan import PlanWriter
from tokenmill.program.kv import KvGroupSpec
from tokenmill.program.step import StepPlan
from tokenmill.sampling import SamplingParams


class CheckedPlans(PlanWriter):
    """Compares every plan with a new one."""

    def __init__(self, groups: int) -> None:
        super().__init__(groups)
        self.laid = 0
        self.continued = 0

    def lay(self, chunks: list[Chunk]) -> StepPlan:
        before = self._last
        plan = super().lay(chunks)
        fresh = PlanWriter(self._groups).lay(chunks)
        for section in ("token_ids", "positions", "slots", "row_starts", "sampled_rows"):
            assert getattr(plan, section).tolist() == getattr(fresh, section).tolist(), section
        width = min(plan.table_stride, fresh.table_stride)
        assert np.array_equal(plan.page_tables[:, :, :width], fresh.page_tables[:, :, :width])
        assert (plan.page_tables[:, :, width:] == -1).all()
        self.laid += 1
        self.continued += plan is before
        return plan


def checked_core(*, pages: int = 200, groups: tuple[KvGroupSpec, ...] = (FULL,)) -> tuple[EngineCore, CheckedPlans]:
    core, _ = make_core(pages=pages, groups=groups)
    core._plans = plans = CheckedPlans(len(groups))
    return core, plans


@pytest.mark.parametrize("groups", [(FULL,), (FULL, WINDOW)], ids=["full", "both"])
@pytest.mark.parametrize("pages", [16, 200])
def test_plans_are_right_while_sequences_come_go_fork_and_lose_their_pages(
    groups: tuple[KvGroupSpec, ...], pages: int
) -> None:
    rng = random.Random(pages)
    core, plans = checked_core(pages=pages, groups=groups)
    requests = [
        request(i, random_prompt(rng), SamplingParams(max_tokens=rng.randint(1, 90), seed=i, n=rng.choice((1, 1, 3))))
        for i in range(14)
    ]
    run(core, requests)
    assert plans.continued > plans.laid / 4, "hardly a plan was made from the one before"
    assert (core.statistics.preemptions > 0) == (pages == 16)


def test_plans_are_right_while_beams_fork_and_die() -> None:
    core, plans = checked_core()
    search = BeamSearch(3)
    run(core, [request(0, [1, 2, 3], search.params(max_tokens=70, seed=0), beam=search)])
    assert plans.continued > 0


def test_one_sequence_goes_on_from_plan_to_plan() -> None:
    core, plans = checked_core()
    run(core, [request(0, [5] * 40, SamplingParams(max_tokens=200, temperature=0, seed=0))])
    assert plans.laid == 200
    assert plans.continued >= 197  # its prompt, the first token, and when the tables have to be wider


def test_a_request_that_ends_is_in_no_later_plan() -> None:
    core, plans = checked_core()
    for i in range(3):
        core.handle(request(i, [5 + i] * 10, SamplingParams(max_tokens=100, temperature=0, seed=0)))
    for _ in range(6):
        core.step()
    core.handle(AbortRequest(1))
    core.step()
    backend = core._backend
    assert isinstance(backend, ToyBackend)
    assert backend.steps[-1].sequences == 2
    assert plans.continued == 4


def test_a_page_that_changes_unseen_is_found_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def assign(self: SequencePages, group: int, logical: int, page: int) -> None:
        self._tables[group][logical] = page  # without counting it

    monkeypatch.setattr(SequencePages, "assign", assign)
    core, _ = checked_core()
    with pytest.raises(AssertionError):
        run(core, [request(0, [5] * 40, SamplingParams(max_tokens=100, temperature=0, seed=0))])
