"""The numbers that metrics show are those of what happened."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from simulated import simulated_core
from test_core import make_core, request, run

from tokenmill.engine.engine import Engine
from tokenmill.engine.messages import AbortRequest, EngineDeadError, FailureKind, FinishReason
from tokenmill.engine.statistics import Histogram
from tokenmill.sampling import SamplingParams


def sample(tokens: int, **fields: object) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, seed=0, **fields)  # type: ignore[arg-type]


def test_an_engine_that_did_nothing_counts_nothing() -> None:
    core, _ = simulated_core()
    shot = core.snapshot()
    assert (shot.running, shot.waiting, shot.kv_usage, shot.steps.steps) == (0, 0, 0.0, 0)


def test_steps_rows_and_seconds_are_those_that_ran() -> None:
    core, backend = simulated_core()
    run(core, [request(0, [1] * 100, sample(11)), request(1, [2] * 50, sample(5))])
    steps = core.snapshot().steps
    assert (steps.steps, steps.tokens) == (len(backend.steps), sum(plan.tokens for plan in backend.steps))
    assert (steps.prompt_tokens, steps.sampled, steps.requests) == (150, 16, 2)
    assert steps.forward_seconds == pytest.approx(sum(backend.seconds))
    assert (steps.prompt_step_seconds.count, steps.decode_step_seconds.count) == (1, 10)
    assert steps.decode_step_seconds.total == pytest.approx(sum(backend.seconds[1:]))
    assert steps.step_rows.total == steps.tokens
    assert [record.rows for record in steps.recent] == [plan.tokens for plan in backend.steps]
    assert [record.seconds for record in steps.recent] == pytest.approx(backend.seconds)


def test_queues_and_pages_at_a_moment() -> None:
    core, _ = simulated_core(sequences=2)
    for number in range(5):
        core.handle(request(number, [number] * 70, sample(10)))
    core.step()
    shot = core.snapshot()
    assert (shot.running, shot.waiting) == (2, 3)
    assert shot.kv[0].used == 2 * 3
    assert shot.kv_usage == 6 / shot.kv[0].total


def test_ends_are_counted_by_reason() -> None:
    core, backend = simulated_core(sequences=1, max_waiting=1)
    backend.poisoned = {77}
    core.handle(request(0, [1, 2], sample(3)))
    core.handle(request(1, [1, 77], sample(3)))
    core.handle(request(2, [3], sample(3)))  # one too many
    core.handle(request(3, []))
    run(core, [])
    core.handle(request(4, [4], sample(3)))
    core.handle(AbortRequest(4))
    steps = core.snapshot().steps
    assert dict(steps.finished) == {FinishReason.LENGTH: 1, FinishReason.ABORT: 1}
    assert dict(steps.failed) == {FailureKind.MODEL: 1, FailureKind.OVERLOADED: 1, FailureKind.REQUEST: 1}
    assert steps.requests == 3


def test_prefix_hits_are_counted_in_tokens() -> None:
    core, _ = make_core(tokens=256)
    prompt = list(range(100))
    run(core, [request(0, prompt)])
    run(core, [request(1, prompt)])
    shot = core.snapshot()
    assert (shot.prefix_queries, shot.prefix_hits) == (200, 96)
    core.reset_prefix_cache()
    run(core, [request(2, prompt)])
    assert core.snapshot().prefix_hits == 96


def test_preemptions_and_swap_files_are_counted(tmp_path: Path) -> None:
    core, _ = make_core(pages=11, swap=(tmp_path, 1 << 20))
    for number in range(6):
        core.handle(request(number, [number] * 40, sample(80)))
    most_swapped = 0
    while core.busy:
        core.step()
        shot = core.snapshot()
        assert (shot.swap_used > 0) == (shot.swapped > 0)
        most_swapped = max(most_swapped, shot.swapped)
    assert most_swapped > 0
    shot = core.snapshot()
    assert shot.steps.preemptions == shot.swapped_out == shot.swapped_in > 0
    assert (shot.swap_used, shot.swap_limit) == (0, 1 << 20)


def test_a_snapshot_stands_still_and_crosses_a_process() -> None:
    core, _ = make_core()
    run(core, [request(0, [1, 2], sample(3))])
    shot = core.snapshot()
    stored = pickle.dumps(shot)
    run(core, [request(1, [1, 2], sample(3))])
    assert pickle.dumps(shot) == stored
    assert pickle.loads(stored) == shot


def test_histogram_bounds_are_upper_ones() -> None:
    histogram = Histogram((1, 2))
    for value in (0.5, 1, 1.5, 2, 9):
        histogram.add(value)
    assert (histogram.counts, histogram.count, histogram.total) == ([2, 2, 1], 5, 14)


def test_the_engines_thread_answers_between_steps_and_not_after_its_end() -> None:
    core, _ = make_core()
    engine = Engine(core)
    assert engine.snapshot().steps.steps == 0
    engine.reset_prefix_cache()
    engine.close()
    with pytest.raises(EngineDeadError):
        engine.snapshot()
