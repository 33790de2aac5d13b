"""The engine's core over a toy model that reads its context through the page tables."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from simulated import simulated_core
from toy_backend import ToyBackend, expected_greedy

from tokenmill.backends.backend import StepLimits
from tokenmill.engine.core import EngineCore
from tokenmill.engine.messages import (
    AbortRequest,
    AddRequest,
    Event,
    Failed,
    Finished,
    FinishReason,
    PromptScored,
    TokenOutput,
)
from tokenmill.engine.scheduler import MAX_SCORED_ROWS, SchedulerLimits
from tokenmill.engine.swap import SwapSpace
from tokenmill.program.kv import PAGE_TOKENS, KvGroupSpec
from tokenmill.sampling import SamplingParams

FULL = KvGroupSpec(layers=1, kv_heads=1, head_dim=16)
WINDOW = KvGroupSpec(layers=1, kv_heads=1, head_dim=16, window=70)
GREEDY = SamplingParams(temperature=0, max_tokens=12, seed=0)
CONTEXT = 320


def make_core(
    *,
    pages: int = 200,
    tokens: int = 64,
    sequences: int = 8,
    groups: tuple[KvGroupSpec, ...] = (FULL,),
    caching: bool = True,
    swap: tuple[Path, int] | None = None,
) -> tuple[EngineCore, ToyBackend]:
    rows = max(sequences, MAX_SCORED_ROWS)
    backend = ToyBackend(groups, [pages] * len(groups), StepLimits(tokens, sequences, rows, CONTEXT))
    core = EngineCore(
        backend,
        vocab_size=backend.vocab_size,
        kv_pages=[pages] * len(groups),
        limits=SchedulerLimits(tokens, sequences, rows, CONTEXT, headroom=0),  # preempts as often as it can
        prefix_caching=caching,
        swap=None if swap is None else SwapSpace(*swap, len(groups), backend),
    )
    return core, backend


def request(number: int, prompt: list[int], params: SamplingParams = GREEDY, **fields: object) -> AddRequest:
    return AddRequest(number, np.array(prompt, np.int32), params, **fields)  # type: ignore[arg-type]


def run(core: EngineCore, requests: list[AddRequest], *, most_steps: int = 5000) -> list[Event]:
    events: list[Event] = []
    for message in requests:
        events += core.handle(message)
    for _ in range(most_steps):
        if not core.busy:
            break
        before = core.statistics.steps
        events += core.step()
        assert core.statistics.steps == before + 1, "a step with work to do ran nothing"
        core.cache.check()
    assert not core.busy, "the engine does not come to an end"
    assert all(usage.used == 0 for usage in core.usage())
    return events


def outputs(events: list[Event]) -> dict[tuple[int, int], list[int]]:
    found: dict[tuple[int, int], list[int]] = {}
    for event in events:
        if isinstance(event, TokenOutput):
            found.setdefault((event.request_id, event.index), []).append(event.token_id)
    return found


def random_prompt(rng: random.Random, longest: int = 150) -> list[int]:
    """Prompts of which many begin alike."""
    start = [rng.choice((5, 9))] * (PAGE_TOKENS * rng.randint(0, 3))
    return start + [rng.randrange(101) for _ in range(rng.randint(1, longest))]


@pytest.mark.parametrize("groups", [(FULL,), (WINDOW,), (FULL, WINDOW)], ids=["full", "window", "both"])
@pytest.mark.parametrize("chunk", [8, 33, 64, 300])
def test_greedy_tokens_are_those_of_the_model_without_a_cache(groups: tuple[KvGroupSpec, ...], chunk: int) -> None:
    core, _ = make_core(tokens=chunk, groups=groups)
    rng = random.Random(1)
    prompts = [random_prompt(rng) for _ in range(12)]
    found = outputs(run(core, [request(i, prompt) for i, prompt in enumerate(prompts)]))
    for i, prompt in enumerate(prompts):
        assert found[i, 0] == expected_greedy(prompt, 12, groups)


@pytest.mark.parametrize("groups", [(FULL,), (FULL, WINDOW)], ids=["full", "both"])
def test_sampled_tokens_do_not_depend_on_memory_batch_chunks_or_cache(groups: tuple[KvGroupSpec, ...]) -> None:
    rng = random.Random(2)
    requests = [
        request(i, random_prompt(rng), SamplingParams(max_tokens=60, seed=i, top_p=0.9, frequency_penalty=0.4))
        for i in range(16)
    ]
    reference = {}
    for message in requests:  # one at a time, in a cache that is never short, never shared
        core, _ = make_core(groups=groups, caching=False, tokens=512)
        reference.update(outputs(run(core, [message])))
    preempted = 0
    for pages, tokens, sequences in ((12, 16, 8), (14, 64, 8), (30, 9, 3), (200, 64, 8)):
        core, _ = make_core(pages=pages, tokens=tokens, sequences=sequences, groups=groups)
        assert outputs(run(core, requests)) == reference
        preempted += core.statistics.preemptions
    assert preempted >= 10


def test_every_step_decodes_first_and_keeps_to_the_budget() -> None:
    core, backend = make_core(tokens=32, sequences=6)
    rng = random.Random(3)
    for i in range(20):
        core.handle(
            request(i, random_prompt(rng), SamplingParams(max_tokens=rng.randint(1, 40), temperature=0, seed=0))
        )
    while core.busy:
        decoding = [s.request.request_id for s in core.scheduler.running if s.decodes]
        waiting = bool(core.scheduler.waiting)
        chunks = core.scheduler.schedule(0.0)
        ran = {chunk.sequence.request.request_id: chunk.count for chunk in chunks}
        assert all(ran.get(number) == 1 for number in decoding)
        assert sum(ran.values()) <= 32
        if waiting and len(core.scheduler.running) < 6:
            assert sum(ran.values()) == 32, "prompts waited while the budget was not spent"
        # Planning has taken the pages, so the step must run this very plan and not make another.
        core.scheduler.schedule = lambda now, chunks=chunks: chunks  # type: ignore[method-assign]
        core.step()
        del core.scheduler.schedule
    assert backend.steps


def test_requests_start_in_the_order_of_arrival() -> None:
    core, _ = make_core(pages=12, tokens=16, sequences=4)
    rng = random.Random(4)
    started: list[int] = []
    for i in range(12):
        core.handle(request(i, random_prompt(rng, 250 if i % 3 == 0 else 10)))
    while core.busy:
        core.step()
        for sequence in core.scheduler.running:
            if sequence.request.request_id not in started:
                started.append(sequence.request.request_id)
    assert started == sorted(started)


def test_a_prompt_starts_only_when_all_of_it_fits() -> None:
    core, _ = make_core(pages=11, tokens=16)
    core.handle(request(0, [1] * 190))
    core.handle(request(1, [2] * 190))
    core.step()
    assert [s.request.request_id for s in core.scheduler.running] == [0]


def test_a_request_that_fills_memory_alone_still_ends() -> None:
    core, _ = make_core(pages=10, tokens=16)
    long = SamplingParams(temperature=0, max_tokens=None, seed=0)
    events = run(core, [request(i, [i + 1] * 100, long) for i in range(4)])
    assert {e.reason for e in events if isinstance(e, Finished)} == {FinishReason.LENGTH}
    assert all(len(tokens) == CONTEXT - 100 for tokens in outputs(events).values())


def test_too_small_a_cache_is_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match="has 9 pages; a sequence of 320 tokens needs 10"):
        make_core(pages=9)


def test_the_second_request_finds_the_first_ones_prompt() -> None:
    core, backend = make_core(tokens=256)
    prompt = list(range(100))
    run(core, [request(0, prompt)])
    before = sum(plan.tokens for plan in backend.steps)
    events = run(core, [request(1, prompt)])
    assert sum(plan.tokens for plan in backend.steps) - before == 4 + 11  # 96 of 100 cached, then 11 decodes
    assert [e.timings.cached_tokens for e in events if isinstance(e, Finished)] == [96]


@pytest.mark.parametrize("length", [PAGE_TOKENS, 2 * PAGE_TOKENS, 2 * PAGE_TOKENS + 1])
def test_a_prompt_that_is_cached_whole_still_gives_its_first_token(length: int) -> None:
    core, _ = make_core()
    prompt = [i % 101 for i in range(length)]
    first, second = (outputs(run(core, [request(i, prompt)]))[i, 0] for i in (0, 1))
    assert first == second == expected_greedy(prompt, 12, (FULL,))


def test_only_newer_sequences_give_their_pages_to_older_ones() -> None:
    core, _ = make_core(pages=12, tokens=32)
    for i in range(8):
        core.handle(request(i, [i] * 40, SamplingParams(temperature=0, max_tokens=90, seed=0)))
    while core.busy:
        oldest = min([*core.scheduler.running, *core.scheduler.waiting], key=lambda s: s.rank)
        before = (oldest.preemptions, oldest.computed)
        core.step()
        assert oldest.preemptions == before[0], "the oldest sequence lost its pages"
        assert oldest.computed > before[1], "the oldest sequence made no step"
    assert core.statistics.preemptions > 0


def test_what_would_be_preempted_at_once_does_not_start() -> None:
    """Forty requests in a cache for a few: hardly a prompt is computed twice. Without headroom (the negative control)
    each page that anybody needs throws out the prompt that has just started."""
    rows = {}
    for headroom in (0, 2 * PAGE_TOKENS):
        core, _ = simulated_core(sequences=16, pages=40, context=320, headroom=headroom)
        run(core, [request(i, [i] * 100, SamplingParams(max_tokens=100, seed=i)) for i in range(40)])
        rows[headroom] = core.statistics.prompt_tokens
    assert rows[2 * PAGE_TOKENS] <= 1.15 * 40 * 100
    assert rows[0] >= 1.4 * 40 * 100


def test_n_outputs_share_the_prompts_pages() -> None:
    core, _ = make_core(tokens=256)
    core.handle(request(0, list(range(101)), SamplingParams(n=4, max_tokens=20, seed=1)))
    core.step()
    core.step()
    # 3 full pages of prompt shared by 4, and one page of its own each.
    assert core.usage()[0].used == 3 + 4
    found: list[Event] = []
    while core.busy:
        found += core.step()
    assert len({tuple(tokens) for tokens in outputs(found).values()}) == 4


def test_each_of_n_outputs_is_the_same_whatever_n_is() -> None:
    def sample(n: int) -> dict[tuple[int, int], list[int]]:
        core, _ = make_core()
        return outputs(run(core, [request(0, [3, 1, 4], SamplingParams(n=n, max_tokens=10, seed=5))]))

    assert sample(1)[0, 0] == sample(3)[0, 0]


def test_an_aborted_request_returns_its_pages_before_the_next_step() -> None:
    core, _ = make_core(tokens=64)
    for i in range(3):
        core.handle(request(i, [i] * 100))
    core.step()
    core.step()
    used = core.usage()[0].used
    events = core.handle(AbortRequest(1))
    assert [(e.request_id, e.reason) for e in events if isinstance(e, Finished)] == [(1, FinishReason.ABORT)]
    assert core.usage()[0].used < used
    core.cache.check()
    assert core.handle(AbortRequest(1)) == []


def test_nan_logits_end_that_request_only_and_name_the_op() -> None:
    core, backend = make_core()
    backend.poisoned = {77}
    events = run(core, [request(0, [1, 2, 3]), request(1, [1, 77]), request(2, [4, 5])])
    failures = [e for e in events if isinstance(e, Failed)]
    assert [e.request_id for e in failures] == [1]
    assert "toy.row of token 77" in failures[0].error
    assert sorted(outputs(events)) == [(0, 0), (2, 0)]


def test_nothing_that_a_failed_request_computed_is_reused() -> None:
    core, backend = make_core(tokens=128)
    backend.poisoned = {77}
    run(core, [request(0, [1] * 64 + [77])])
    assert core.usage()[0].cached == 0


def test_masking_everything_is_an_error_of_the_request() -> None:
    core, _ = make_core()
    params = SamplingParams(seed=0, max_tokens=4, min_tokens=2, stop_token_ids=tuple(range(101)))
    events = run(core, [request(0, [1, 2], params)])
    assert [e.error for e in events if isinstance(e, Failed)] == [
        "the request leaves no token to pick: logit_bias, min_tokens, bad_words, allowed_token_ids and "
        "structured_outputs together exclude all. Exclude fewer"
    ]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([1] * 320, "the prompt has 320 tokens, more than the context of 320 with room for one more"),
        ([1, 101], "outside of the vocabulary 0..100"),
        ([1, -1], "outside of the vocabulary 0..100"),
    ],
)
def test_a_bad_prompt_is_an_error_of_the_request(prompt: list[int], message: str) -> None:
    core, _ = make_core()
    (event,) = core.handle(request(0, prompt))
    assert isinstance(event, Failed)
    assert message in event.error


def test_end_tokens_stop_and_are_part_of_the_output() -> None:
    core, _ = make_core()
    plain = outputs(run(core, [request(0, [1, 2])]))[0, 0]
    events = run(core, [request(1, [1, 2], eos_ids=frozenset({plain[4]}))])
    cut = plain.index(plain[4]) + 1
    assert outputs(events)[1, 0] == plain[:cut]
    (end,) = [e for e in events if isinstance(e, Finished)]
    assert (end.reason, end.stop_token) == (FinishReason.STOP, plain[4])


def test_ignore_eos_goes_on_and_stop_token_ids_still_stop() -> None:
    core, _ = make_core()
    plain = outputs(run(core, [request(0, [1, 2])]))[0, 0]
    ignoring = SamplingParams(temperature=0, max_tokens=12, seed=0, ignore_eos=True)
    assert outputs(run(core, [request(1, [1, 2], ignoring, eos_ids=frozenset({plain[4]}))]))[1, 0] == plain
    stopping = SamplingParams(temperature=0, max_tokens=12, seed=0, ignore_eos=True, stop_token_ids=[plain[4]])
    assert outputs(run(core, [request(2, [1, 2], stopping)]))[2, 0] == plain[: plain.index(plain[4]) + 1]


def test_min_tokens_keeps_end_tokens_from_being_picked() -> None:
    core, _ = make_core()
    plain = outputs(run(core, [request(0, [1, 2])]))[0, 0]
    params = SamplingParams(temperature=0, max_tokens=12, seed=0, min_tokens=6)
    found = outputs(run(core, [request(1, [1, 2], params, eos_ids=frozenset({plain[0]}))]))[1, 0]
    assert len(found) >= 6
    assert plain[0] not in found[:6]


def _scores(events: list[Event], number: int) -> list[tuple[float, int]]:
    found: list[tuple[float, int]] = []
    for event in events:
        if isinstance(event, PromptScored) and event.request_id == number:
            assert event.first == len(found) + 1
            found += [(item.logprob, item.rank) for item in event.logprobs]
    return found


def test_scores_need_at_most_64_rows_of_logits_and_do_not_depend_on_chunks() -> None:
    prompt = [(7 * i) % 101 for i in range(200)]
    found = []
    for tokens, pages in ((512, 200), (16, 200), (64, 12)):
        core, backend = make_core(tokens=tokens, pages=pages)
        run(core, [request(9, prompt)])  # its pages must not spare the scores their rows
        others = [request(i, [i] * 90) for i in range(3)]
        events = run(core, [*others, request(10, prompt, score_only=True)])
        found.append(_scores(events, 10))
        assert max(plan.sampled for plan in backend.steps) <= MAX_SCORED_ROWS
    assert len(found[0]) == 199
    assert found[0] == found[1] == found[2]


def test_prompt_logprobs_come_with_the_output_of_the_plain_request() -> None:
    prompt = [(7 * i) % 101 for i in range(150)]
    core, _ = make_core(tokens=40)
    events = run(
        core,
        [
            request(0, prompt),
            request(1, prompt, SamplingParams(temperature=0, max_tokens=12, seed=0, prompt_logprobs=3, logprobs=2)),
        ],
    )
    assert outputs(events)[1, 0] == outputs(events)[0, 0]
    assert len(_scores(events, 1)) == 149
    scored = [e for e in events if isinstance(e, PromptScored)]
    assert all(len(item.best) == 3 for e in scored for item in e.logprobs)
    own = [e for e in events if isinstance(e, TokenOutput) and e.request_id == 1]
    assert all(e.logprobs is not None and e.logprobs.best[0] == (e.token_id, e.logprobs.logprob) for e in own)


def test_a_single_token_has_no_score() -> None:
    core, _ = make_core()
    assert [type(e) for e in core.handle(request(0, [5], score_only=True))] == [Finished]
    assert not core.busy
