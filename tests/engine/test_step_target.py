"""Steps stay near their time target, and a long prompt neither stalls its neighbours nor starves."""

from __future__ import annotations

import math
import random

import pytest
from simulated import Costs, SimulatedBackend, simulated_core
from test_core import outputs, request, run

from tokenmill.engine.core import EngineCore
from tokenmill.engine.messages import TokenOutput
from tokenmill.engine.scheduler import Scheduler
from tokenmill.engine.step_time import StepTimeModel, StepWork
from tokenmill.sampling import SamplingParams

TARGET = 0.05
LONG = 4096


def decode_for_ever(core: EngineCore, streams: int) -> None:
    for number in range(streams):
        core.handle(request(number, [number + 1] * 20, SamplingParams(temperature=0, max_tokens=6000, seed=0)))


def gaps_and_first_token(core: EngineCore, backend: SimulatedBackend) -> tuple[list[float], float]:
    """Four streams decode, then a long prompt comes: the gaps between the streams' tokens from then until it has its
    first token, and how long that took."""
    decode_for_ever(core, 4)
    for _ in range(60):
        core.step()
    core.handle(request(9, [i % 101 for i in range(LONG)]))
    begin = last = backend.now
    gaps: list[float] = []
    while True:
        events = core.step()
        told = {event.request_id for event in events if isinstance(event, TokenOutput)}
        if {0, 1, 2, 3} <= told:
            gaps.append(backend.now - last)
            last = backend.now
        if 9 in told:
            return gaps, backend.now - begin


def test_a_long_prompt_neither_stalls_its_neighbours_nor_starves() -> None:
    split_gaps, split_first = gaps_and_first_token(*simulated_core(step_target=TARGET, tokens=LONG + 8, pages=1200))
    whole_gaps, whole_first = gaps_and_first_token(*simulated_core(tokens=LONG + 8, pages=1200))
    assert max(split_gaps) <= 1.25 * TARGET
    assert split_first <= 1.6 * whole_first
    # The negative control: what the streams would see if the prompt ran at once.
    assert max(whole_gaps) >= 4 * max(split_gaps)


@pytest.mark.parametrize("jitter", [0.0, 0.3])
def test_where_cutting_costs_much_steps_grow_as_far_as_they_are_even(jitter: float) -> None:
    """Measured shape of a small model on two cores: attention of a few rows reads the context at nearly full price."""
    costs = Costs(step=8e-3, row=0.92e-3, pair=5.7e-7, chunk_slot=2.5e-6, jitter=jitter)
    split_gaps, split_first = gaps_and_first_token(
        *simulated_core(costs=costs, step_target=TARGET, tokens=LONG + 8, pages=1200)
    )
    _, whole_first = gaps_and_first_token(*simulated_core(costs=costs, tokens=LONG + 8, pages=1200))
    assert max(split_gaps) > 1.5 * TARGET
    assert sorted(split_gaps)[int(0.99 * len(split_gaps))] <= 2 * TARGET
    assert split_first <= (1.6 if jitter == 0 else 1.9) * whole_first


def test_steps_use_the_time_that_they_have() -> None:
    core, backend = simulated_core(step_target=TARGET, pages=1200)
    gaps, _ = gaps_and_first_token(core, backend)
    settled = gaps[5:-1]  # after the first few measurements, before the rest of the prompt
    assert min(settled) >= 0.8 * TARGET


def test_where_decodes_take_most_of_the_target_a_prompt_gets_as_much_time_as_they() -> None:
    costs = Costs(step=0.1)
    core, backend = simulated_core(costs=costs, step_target=TARGET, tokens=LONG + 8, pages=1200)
    gaps, first = gaps_and_first_token(core, backend)
    assert max(gaps) <= 2.5 * (costs.step + 4 * costs.row)
    _, whole = gaps_and_first_token(*simulated_core(costs=costs, tokens=LONG + 8, pages=1200))
    assert first <= 2.5 * whole


def crowd(core: EngineCore, backend: SimulatedBackend, count: int = 24) -> tuple[float, float]:
    """Two requests run, then ``count`` arrive at once: what all of these take, and the longest gap between two tokens
    of one of them."""
    run(core, [request(number, [number + 1] * 128, SamplingParams(max_tokens=64, seed=0)) for number in range(2)])
    for number in range(count):
        core.handle(request(number, [number + 1] * 128, SamplingParams(max_tokens=48, seed=0)))
    begin, longest, last = backend.now, 0.0, dict[int, float]()
    while core.busy:
        for told in [event.request_id for event in core.step() if isinstance(event, TokenOutput)]:
            longest = max(longest, backend.now - last.get(told, backend.now))
            last[told] = backend.now
    return backend.now - begin, longest


@pytest.mark.parametrize("jitter", [0.0, 0.3])
def test_a_crowd_takes_hardly_longer_than_without_a_target(jitter: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured shape of a larger model on two cores: its weights take most of the target, a row a tenth of it."""
    costs = Costs(step=34e-3, row=5.5e-3, pair=0.0, jitter=jitter)

    def serve(target: float | None) -> tuple[float, float]:
        return crowd(*simulated_core(costs=costs, step_target=target, sequences=24))

    seconds, gap = serve(TARGET)
    unbounded, stall = serve(None)
    assert seconds <= unbounded / (0.9 if jitter == 0 else 0.85)
    assert gap <= 3 * (1 + jitter) * (costs.step + 24 * costs.row) < stall
    # The negative control: steps as long as those that decode already would allow.
    monkeypatch.setattr(Scheduler, "_at_hand", lambda scheduler: [s for s in scheduler.running if s.decodes])
    assert serve(TARGET)[0] > 1.05 * seconds


def test_requests_that_there_are_no_pages_for_do_not_make_steps_longer() -> None:
    costs = Costs(step=1e-3, row=1e-3, pair=0.0)

    def gap(pages: int) -> float:
        return crowd(*simulated_core(costs=costs, step_target=TARGET, sequences=48, pages=pages, context=640), 48)[1]

    assert gap(40) <= 1.25 * TARGET
    assert gap(640) > 1.75 * TARGET  # all decode together


def test_a_machine_that_slows_down_gets_smaller_chunks() -> None:
    core, backend = simulated_core(step_target=TARGET, pages=1200)
    decode_for_ever(core, 2)
    core.handle(request(9, [i % 101 for i in range(8000)]))
    for _ in range(30):
        core.step()
    assert backend.seconds[-1] == pytest.approx(TARGET, rel=0.15)
    backend.costs = Costs(step=12e-3, row=2.7e-3, pair=4.5e-7)
    for _ in range(25):
        core.step()
    assert 0.8 * TARGET < backend.seconds[-1] < 1.55 * TARGET  # at first it was 2.8


def test_a_cost_that_changes_alone_is_learned_anew() -> None:
    """Something else used up the memory's bandwidth, and ends: the constant falls, a row costs what it did."""
    core, backend = simulated_core(step_target=TARGET, pages=1200, costs=Costs(step=60e-3))
    decode_for_ever(core, 4)
    core.handle(request(8, [i % 97 for i in range(1500)]))
    for _ in range(120):
        core.step()
    backend.costs = Costs()
    for _ in range(80):
        core.step()
    core.handle(request(9, [i % 101 for i in range(3000)]))
    for _ in range(40):
        core.step()
    assert max(backend.seconds[-30:]) <= 1.6 * TARGET
    assert min(backend.seconds[-30:]) >= 0.8 * TARGET


def test_before_anything_is_measured_chunks_are_small_and_double() -> None:
    core, backend = simulated_core(step_target=10.0, costs=Costs(step=1e-6, row=1e-6, pair=0.0))
    core.handle(request(0, [5] * 500))
    for _ in range(5):
        core.step()
    assert [plan.tokens for plan in backend.steps] == [32, 64, 128, 256, 20]


def test_alone_a_prompt_may_take_longer_steps() -> None:
    core, backend = simulated_core(step_target=TARGET)
    core.handle(request(0, [i % 101 for i in range(2000)]))
    for _ in range(8):
        core.step()
    assert 2 * TARGET < backend.seconds[-1] < 5 * TARGET


def test_the_rest_of_a_split_prompt_goes_before_the_next_prompt() -> None:
    core, _ = simulated_core(step_target=TARGET)
    decode_for_ever(core, 1)
    for _ in range(20):
        core.step()
    for number in (5, 6, 7):
        core.handle(request(number, [number] * 300))
    first: list[int] = []
    while len(first) < 3:
        first += [e.request_id for e in core.step() if isinstance(e, TokenOutput) and e.request_id not in (0, *first)]
        cut = [s for s in core.scheduler.running if 0 < s.computed < s.prompt_length]
        assert len(cut) <= 1, "two prompts are cut at once"
    assert first == [5, 6, 7]


def test_tokens_do_not_depend_on_the_target() -> None:
    rng = random.Random(8)
    messages = [
        request(i, [rng.randrange(101) for _ in range(rng.randint(1, 400))], SamplingParams(seed=i, max_tokens=5 + i))
        for i in range(10)
    ]
    whole, short, long = (outputs(run(simulated_core(step_target=t)[0], messages)) for t in (None, 0.012, 0.05))
    assert whole == short == long


def _work(decoded: int, prompt: int) -> StepWork:
    work = StepWork()
    for _ in range(decoded):
        work.add_decode(500)
    if prompt:
        work.add_prompt(0, prompt)
    return work


def test_the_model_learns_what_steps_cost() -> None:
    model, rng = StepTimeModel(), random.Random(1)

    def seconds(work: StepWork) -> float:
        return 5e-3 + 4e-4 * work.decoded + 8e-4 * work.prompt_tokens

    for _ in range(60):
        work = _work(rng.randint(0, 6), rng.choice((0, 10, 50, 90)))
        model.observe(work, seconds(work) * rng.uniform(0.97, 1.03))
    for work in (_work(3, 0), _work(2, 70), _work(0, 90)):
        assert model.seconds(work) == pytest.approx(seconds(work), rel=0.06)


def test_long_decoding_does_not_wash_out_what_a_prompt_costs() -> None:
    model = StepTimeModel()
    for prompt in (20, 60, 40, 80, 30, 50):
        model.observe(_work(2, prompt), 6e-3 + 9e-4 * prompt)
    for _ in range(3000):
        model.observe(_work(2, 0), 6e-3)
    assert model.seconds(_work(2, 60)) == pytest.approx(6e-3 + 9e-4 * 60, rel=0.1)


def test_what_many_decodes_cost_is_guessed_from_prompts_and_few_decodes() -> None:
    model, rng = StepTimeModel(), random.Random(3)

    def seconds(work: StepWork) -> float:
        return 3e-2 + 5e-3 * work.decoded + 5e-3 * work.prompt_tokens

    for _ in range(60):
        work = _work(rng.choice((0, 1, 2)), rng.choice((0, 10, 20)))
        model.observe(work, seconds(work) * rng.uniform(0.7, 1.3))
    assert model.seconds(_work(32, 0)) == pytest.approx(seconds(_work(32, 0)), rel=0.4)


def test_a_late_step_now_and_then_leaves_the_others_their_time() -> None:
    def delay(late: int) -> float:
        """When one in ``late`` steps takes twice as long."""
        model = StepTimeModel()
        for number in range(150):
            model.observe(_work(2, 40), 0.08 if number % late == 0 else 0.04)
        return model.delay

    assert StepTimeModel().delay == math.inf
    assert delay(50) < 0.01
    assert delay(5) > 0.02


def test_one_hiccup_does_not_shrink_the_next_steps_to_nothing() -> None:
    model = StepTimeModel()
    for prompt in (20, 60, 40, 80, 30, 50, 60, 40, 20, 50, 60):
        model.observe(_work(2, prompt), 6e-3 + 9e-4 * prompt)
    before = model.prompt_tokens(_work(2, 0), 0, 0.04)
    model.observe(_work(2, 40), 30.0)
    assert model.prompt_tokens(_work(2, 0), 0, 0.04) >= before / 4


def test_costs_are_never_negative() -> None:
    model, rng = StepTimeModel(), random.Random(2)
    for _ in range(200):
        model.observe(_work(rng.randint(0, 4), rng.choice((0, 5, 40))), rng.uniform(0.001, 0.1))
        for work in (_work(0, 0), _work(4, 0), _work(0, 40), _work(4, 40)):
            assert model.seconds(work) >= 0
        assert model.prompt_tokens(_work(1, 0), 100, 0.05) >= 0
