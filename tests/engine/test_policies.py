"""Who goes first, and who is not let in."""

from __future__ import annotations

import pytest
from simulated import simulated_core
from test_core import request, run

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.core import EngineCore
from tokenmill.engine.messages import Event, Failed, FailureKind, Finished, TokenOutput
from tokenmill.engine.policies import FirstComeFirstServed, PriorityWithAgeing
from tokenmill.errors import UsageError
from tokenmill.sampling import SamplingParams


def order_of_first_tokens(core: EngineCore, priorities: list[int]) -> list[int]:
    events = run(
        core,
        [request(i, [i] * 40, SamplingParams(max_tokens=3, seed=0, priority=p)) for i, p in enumerate(priorities)],
    )
    return list(dict.fromkeys(e.request_id for e in events if isinstance(e, TokenOutput)))


def test_priority_goes_before_arrival_and_arrival_breaks_ties() -> None:
    core, _ = simulated_core(sequences=1, policy=PriorityWithAgeing())
    assert order_of_first_tokens(core, [5, 0, -3, 0, 5]) == [2, 1, 3, 0, 4]


def test_first_come_first_served_ignores_priority() -> None:
    core, _ = simulated_core(sequences=1, policy=FirstComeFirstServed())
    assert order_of_first_tokens(core, [5, 0, -3]) == [0, 1, 2]


def test_ageing_bounds_how_long_better_priorities_overtake() -> None:
    """A stream of priority 0 fills the engine; the request of priority 4 still ends after about 4 ageings."""

    def wait_of_the_low_one(ageing: float) -> float:
        core, backend = simulated_core(sequences=1, policy=PriorityWithAgeing(ageing))
        core.handle(request(0, [1] * 30, SamplingParams(max_tokens=5, seed=0, priority=4)))
        number = 1
        while backend.now < 12:
            waiting = [s for s in core.scheduler.waiting if s.request.params.priority == 0]
            if len(waiting) < 2:
                core.handle(request(number, [2] * 30, SamplingParams(max_tokens=5, seed=0)))
                number += 1
            if any(isinstance(e, Finished) and e.request_id == 0 for e in core.step()):
                return backend.now
        return float("inf")

    assert 3.5 < wait_of_the_low_one(1.0) < 4.5
    assert wait_of_the_low_one(1000.0) == float("inf")  # negative control: without ageing it starves


def test_a_better_priority_keeps_its_pages() -> None:
    core, _ = simulated_core(pages=10, tokens=64, context=320, policy=PriorityWithAgeing())
    for number, priority in enumerate((3, 2, 1, 0)):
        core.handle(request(number, [number] * 40, SamplingParams(max_tokens=110, seed=0, priority=priority)))
    while core.busy:
        core.step()
        for sequence in [*core.scheduler.running, *core.scheduler.waiting]:
            assert sequence.request.params.priority > 0 or sequence.preemptions == 0
    assert core.statistics.preemptions > 0


def refusals(events: list[Event]) -> list[Failed]:
    return [e for e in events if isinstance(e, Failed)]


def test_one_request_too_many_is_refused_as_overload() -> None:
    core, _ = simulated_core(sequences=2, max_waiting=3)
    events = [event for i in range(8) for event in core.handle(request(i, [i] * 10))]
    assert [e.request_id for e in refusals(events)] == [5, 6, 7]  # two could start at once, three may wait
    assert {e.kind for e in refusals(events)} == {FailureKind.OVERLOADED}
    assert all("max_waiting" in e.error and e.retry_after == 1.0 for e in refusals(events))
    run(core, [])
    assert core.handle(request(9, [9] * 10)) == []


def test_retry_after_grows_with_what_requests_take() -> None:
    core, backend = simulated_core(sequences=1, max_waiting=2)
    backend.costs.step = 1.0
    for i in range(3):
        core.handle(request(i, [i] * 10, SamplingParams(max_tokens=5, seed=0)))
    run(core, [])
    for i in range(10, 13):
        core.handle(request(i, [i] * 10, SamplingParams(max_tokens=5, seed=0)))
    (refused,) = refusals(core.handle(request(20, [1])))
    assert refused.retry_after == pytest.approx(3 * 5, rel=0.1)


def test_a_bad_request_is_another_kind_of_failure() -> None:
    core, _ = simulated_core(max_waiting=0, sequences=1)
    (failed,) = refusals(core.handle(request(0, [])))
    assert failed.kind is FailureKind.REQUEST


@pytest.mark.parametrize(
    ("field", "value"), [("step_target", 0), ("step_target", "1"), ("scheduling_policy", "x"), ("max_waiting", -1)]
)
def test_bad_settings_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=field):
        EngineConfig(model="m", **{field: value})  # type: ignore[arg-type]
