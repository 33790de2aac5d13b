"""Beam search against one that keeps every beam as a list of tokens and computes it anew."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from test_core import FULL, WINDOW, make_core, outputs, request
from toy_backend import toy_logits

from tokenmill.engine.core import EngineCore
from tokenmill.engine.messages import (
    AbortRequest,
    AddRequest,
    BeamSearch,
    Event,
    Failed,
    Finished,
    FinishReason,
    TokenOutput,
)
from tokenmill.program.kv import KvGroupSpec
from tokenmill.sampling import SamplingParams

VOCABULARY = 101
PROMPTS = [[1, 2, 3], [5] * 40, list(range(70)), [9]]


def search(
    number: int, prompt: list[int], width: int = 4, tokens: int | None = 12, penalty: float = 1.0, **fields: object
) -> AddRequest:
    params = SamplingParams(n=width, temperature=0, max_tokens=tokens, logprobs=2 * width, seed=0)
    return request(number, prompt, params, beam=BeamSearch(width, penalty), **fields)


def run(core: EngineCore, messages: list[AddRequest]) -> list[Event]:
    """Like :func:`test_core.run`, but a step may do nothing but make a beam yield to its siblings."""
    events = [event for message in messages for event in core.handle(message)]
    for _ in range(20_000):
        if not core.busy:
            break
        events += core.step()
        core.cache.check()
    assert not core.busy, "the engine does not come to an end"
    assert all(usage.used == 0 for usage in core.usage())
    return events


def log_probabilities(tokens: list[int], groups: tuple[KvGroupSpec, ...]) -> np.ndarray:
    state, slot = 17, len(tokens) - 1
    for group, spec in enumerate(groups):
        first = 0 if spec.window is None else max(0, slot - spec.window + 1)
        for token in tokens[first:]:
            state = (state * 6364136223846793005 + token * 1442695040888963407 + group + 1) % 2**64
    logits = toy_logits(state, VOCABULARY).astype(np.float64)
    return logits - math.log(np.exp(logits).sum())


def reference(
    prompt: list[int],
    groups: tuple[KvGroupSpec, ...] = (FULL,),
    width: int = 4,
    tokens: int = 12,
    penalty: float = 1.0,
    ends: frozenset[int] = frozenset(),
) -> list[list[int]]:
    """Always runs to the last token: stopping early must change nothing."""
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    complete: list[tuple[float, list[int]]] = []
    for length in range(1, tokens + 1):
        options = [
            (total + after[token], [*done, token])
            for total, done in beams
            for after in [log_probabilities([*prompt, *done], groups)]
            for token in np.argsort(-after, kind="stable")[: 2 * width].tolist()
        ]
        options.sort(key=lambda option: -option[0])
        beams = []
        for place, (total, done) in enumerate(options):
            if len(beams) == width:
                break
            if done[-1] not in ends:
                beams.append((total, done))
            elif place < width:
                complete.append((total / length**penalty, done))
    complete += [(total / tokens**penalty, done) for total, done in beams]
    complete.sort(key=lambda option: -option[0])
    return [done for _, done in complete[:width]]


def found_by(events: list[Event], number: int) -> list[list[int]]:
    tokens = outputs(events)
    return [tokens[key] for key in sorted(tokens) if key[0] == number]


@pytest.mark.parametrize("groups", [(FULL,), (FULL, WINDOW)], ids=["full", "both"])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_the_outputs_are_those_of_the_plain_algorithm(width: int, groups: tuple[KvGroupSpec, ...]) -> None:
    core, _ = make_core(groups=groups)
    events = run(core, [search(i, prompt, width) for i, prompt in enumerate(PROMPTS)])
    for number, prompt in enumerate(PROMPTS):
        assert found_by(events, number) == reference(prompt, groups, width)


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 3.0])
def test_end_tokens_and_length_penalty(penalty: float) -> None:
    ends = frozenset(range(0, 101, 4))
    core, backend = make_core()
    events = run(core, [search(i, p, 3, 30, penalty, eos_ids=ends) for i, p in enumerate(PROMPTS)])
    for number, prompt in enumerate(PROMPTS):
        expected = reference(prompt, (FULL,), 3, 30, penalty, ends)
        assert found_by(events, number) == expected
        finished = [e for e in events if isinstance(e, Finished) and e.request_id == number]
        assert [e.stop_token for e in finished] == [t[-1] if t[-1] in ends else None for t in expected]
    if penalty <= 0:
        assert len(backend.steps) < 30, "nothing that can still come matters, yet the search goes on"


def test_one_beam_is_greedy() -> None:
    core, _ = make_core()
    events = run(core, [search(0, [4, 5], 1), request(1, [4, 5])])
    assert found_by(events, 0) == found_by(events, 1)


def test_log_probabilities_are_those_of_the_tokens() -> None:
    core, _ = make_core()
    told = [e for e in run(core, [search(0, [4, 5], 3)]) if isinstance(e, TokenOutput)]
    for index in range(3):
        done: list[int] = []
        for event in [e for e in told if e.index == index]:
            assert event.logprobs is not None
            assert event.logprobs.logprob == pytest.approx(
                log_probabilities([4, 5, *done], (FULL,))[event.token_id], abs=1e-4
            )
            done.append(event.token_id)


def test_beams_share_their_pages() -> None:
    core, _ = make_core(tokens=256)
    core.handle(search(0, list(range(101)), 4, 20))
    most = 0
    while core.busy:
        core.step()
        core.cache.check()
        most = max(most, core.usage()[0].used)
    assert most <= 3 + 4 * 2


@pytest.mark.parametrize(("pages", "seats"), [(200, 1), (10, 6)])
@pytest.mark.parametrize("swaps", [False, True])
def test_few_seats_and_pages_change_nothing_and_end(tmp_path: Path, pages: int, seats: int, swaps: bool) -> None:
    core, _ = make_core(pages=pages, sequences=seats, swap=(tmp_path, 1 << 30) if swaps else None)
    messages = [*(search(i, p, 4, 20) for i, p in enumerate(PROMPTS)), request(9, [8] * 50)]
    events = run(core, messages)
    plain, _ = make_core()
    assert outputs(events) == outputs(run(plain, messages))


@pytest.mark.parametrize(("width", "length"), [(3, 140), (4, 100), (6, 20)])
def test_a_beam_that_lacks_a_page_gets_one_from_a_sibling_that_waits_for_it(width: int, length: int) -> None:
    """Ten pages: there are moments when all beams but the last have run, and that one lacks a page."""
    message = search(0, [6] * length, width, 90)
    assert found_by(run(make_core(pages=10)[0], [message]), 0) == found_by(run(make_core()[0], [message]), 0)


def test_a_cancelled_search_ends_all_its_outputs() -> None:
    core, _ = make_core()
    core.handle(search(0, [1, 2, 3], 4))
    for _ in range(5):
        core.step()
    events = core.handle(AbortRequest(0))
    assert [(e.index, e.reason) for e in events if isinstance(e, Finished)] == [
        (i, FinishReason.ABORT) for i in range(4)
    ]
    assert not core.busy
    assert core.usage()[0].used == 0


def test_a_search_whose_logits_fail_ends_alone() -> None:
    core, backend = make_core()
    plain = run(make_core()[0], [request(1, [7, 8])])
    first = found_by(run(make_core()[0], [search(0, [4, 5], 3)]), 0)[0]
    backend.poisoned = {first[3]} - {7, 8, *outputs(plain)[1, 0]} or {first[2]}
    events = run(core, [search(0, [4, 5], 3), request(1, [7, 8])])
    assert [e.request_id for e in events if isinstance(e, Failed)] == [0]
    assert outputs(events)[1, 0] == outputs(plain)[1, 0]


def test_the_end_of_the_context_ends_the_search() -> None:
    core, _ = make_core()
    events = run(core, [search(0, [3] * 315, 2, None)])
    assert [len(tokens) for tokens in found_by(events, 0)] == [5, 5]
