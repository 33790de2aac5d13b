"""Requests that begin alike compute their beginning once; outputs of one request share their prompt."""

from __future__ import annotations

import random

import pytest
from simulated import simulated_core
from test_core import FULL, WINDOW, make_core, outputs, request, run
from toy_backend import expected_greedy

from tokenmill.engine.messages import AbortRequest, Finished, TokenOutput
from tokenmill.engine.page_pool import PagePool
from tokenmill.program.kv import PAGE_TOKENS, KvGroupSpec
from tokenmill.sampling import SamplingParams

SHARED = [(7 * i) % 101 for i in range(1024)]
GREEDY = SamplingParams(temperature=0, max_tokens=4, seed=0)


@pytest.mark.parametrize("step_target", [None, 0.05])
def test_eight_requests_at_once_compute_their_shared_prefix_once(step_target: float | None) -> None:
    core, backend = simulated_core(step_target=step_target)
    suffixes = [[number + 1] * (10 + number) for number in range(8)]
    found = outputs(run(core, [request(i, SHARED + own, GREEDY) for i, own in enumerate(suffixes)]))
    decoded = 8 * (GREEDY.max_tokens - 1)  # type: ignore[operator]
    assert sum(plan.tokens for plan in backend.steps) - decoded == len(SHARED) + sum(map(len, suffixes))
    for i, own in enumerate(suffixes):
        assert found[i, 0] == expected_greedy(SHARED + own, 4, (FULL,))
    assert (core.scheduler.prefix_queries, core.scheduler.prefix_hits) == (
        sum(1024 + len(own) for own in suffixes),
        7 * 1024,
    )


def test_without_a_prefix_cache_each_computes_all_of_it() -> None:
    """Negative control."""
    core, backend = make_core(tokens=256, caching=False)
    run(core, [request(i, [*SHARED[:256], i], GREEDY) for i in range(4)])
    assert sum(plan.tokens for plan in backend.steps) == 4 * (257 + 3)


def test_who_waits_for_a_prefix_lets_others_pass() -> None:
    core, backend = make_core(tokens=256)
    for number, prompt in enumerate(([*SHARED[:200], 1], [*SHARED[:200], 2], [5] * 20)):
        core.handle(request(number, prompt, GREEDY))
    first = [{e.request_id for e in core.step() if isinstance(e, TokenOutput)} for _ in range(2)]
    assert first == [{0, 2}, {0, 1, 2}]
    assert [plan.tokens for plan in backend.steps] == [201 + 20, 2 + 201 - 192]


def test_if_the_one_that_computes_is_cancelled_another_goes_on() -> None:
    core, backend = simulated_core(tokens=64)
    for number in range(3):
        core.handle(request(number, [*SHARED, number], GREEDY))
    for _ in range(4):
        core.step()
    core.handle(AbortRequest(0))
    events = run(core, [])
    for number in (1, 2):
        assert outputs(events)[number, 0] == expected_greedy([*SHARED, number], 4, (FULL,))
    assert sum(plan.tokens for plan in backend.steps) == 1024 + 2 * (1 + 3)  # nothing was computed twice


def test_prompt_logprobs_neither_read_the_cache_nor_wait() -> None:
    core, backend = make_core(tokens=512)
    scored = SamplingParams(temperature=0, max_tokens=4, seed=0, prompt_logprobs=0)
    core.handle(request(0, SHARED[:200], GREEDY))
    core.handle(request(1, SHARED[:200], scored))
    core.step()
    assert backend.steps[0].tokens == 200 + 63  # a step has 64 rows of logits, one of them for request 0
    assert [s.computed for s in core.scheduler.running] == [200, 63]


def test_tenants_of_different_salts_share_nothing() -> None:
    core, backend = simulated_core()
    prompt = SHARED[:320]
    for i, salt in enumerate((None, "a", "b")):
        events = run(core, [request(i, prompt, SamplingParams(max_tokens=1, seed=0, cache_salt=salt))])
        assert [e.timings.cached_tokens for e in events if isinstance(e, Finished)] == [0]
    events = run(core, [request(9, prompt, SamplingParams(max_tokens=1, seed=0, cache_salt="b"))])
    assert [e.timings.cached_tokens for e in events if isinstance(e, Finished)] == [288]
    assert sum(plan.tokens for plan in backend.steps) == 3 * 320 + 32


@pytest.mark.parametrize("groups", [(FULL,), (FULL, WINDOW)], ids=["full", "both"])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 101])
def test_outputs_fork_off_the_prompt_and_differ_only_in_their_draws(
    length: int, groups: tuple[KvGroupSpec, ...]
) -> None:
    prompt = SHARED[:length]
    params = SamplingParams(n=5, max_tokens=40, seed=3)
    core, backend = make_core(tokens=256, groups=groups)
    found = outputs(run(core, [request(0, prompt, params)]))
    assert sum(plan.tokens for plan in backend.steps) == length + 5 * 39  # the prompt once, each output by itself
    for seats in (1, 3):
        few, _ = make_core(tokens=256, sequences=seats, groups=groups)
        assert outputs(run(few, [request(0, prompt, params)])) == found
    short, _ = make_core(tokens=32, pages=12, sequences=5, groups=groups)
    others = [request(i, [i] * 60, GREEDY) for i in range(1, 4)]
    assert {k: v for k, v in outputs(run(short, [*others, request(0, prompt, params)])).items() if k[0] == 0} == found


def test_without_copy_on_write_the_outputs_corrupt_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    message = request(0, SHARED[:40], SamplingParams(n=4, max_tokens=20, seed=3))
    whole = outputs(run(make_core(tokens=256)[0], [message]))
    monkeypatch.setattr(PagePool, "is_shared", lambda pool, page: False)
    assert outputs(run(make_core(tokens=256)[0], [message])) != whole


def test_best_of_four_takes_far_less_than_four_times_the_pages() -> None:
    def most_used(n: int) -> int:
        core, _ = make_core(tokens=256)
        core.handle(request(0, SHARED[:300], SamplingParams(n=n, max_tokens=16, seed=1)))
        most = 0
        while core.busy:
            core.step()
            most = max(most, core.usage()[0].used)
        return most

    assert most_used(4) <= most_used(1) + 2 * 3


def test_random_sharing_gives_everyone_the_tokens_they_get_alone() -> None:
    rng = random.Random(11)
    starts = [[rng.randrange(101) for _ in range(PAGE_TOKENS * k)] for k in (1, 3, 5)]
    messages = [
        request(
            i,
            rng.choice(starts)[: rng.randint(1, 160)] + [rng.randrange(101) for _ in range(rng.randint(1, 60))],
            SamplingParams(
                n=rng.choice((1, 1, 3)), max_tokens=rng.randint(1, 30), seed=i, cache_salt=rng.choice((None, "x"))
            ),
        )
        for i in range(24)
    ]
    groups = (FULL, WINDOW)
    alone: dict[tuple[int, int], list[int]] = {}
    for message in messages:
        alone.update(outputs(run(make_core(tokens=256, caching=False, groups=groups)[0], [message])))
    for pages, tokens, sequences in ((11, 20, 6), (40, 64, 4), (200, 33, 8)):
        core, _ = make_core(pages=pages, tokens=tokens, sequences=sequences, groups=groups)
        assert outputs(run(core, messages)) == alone
