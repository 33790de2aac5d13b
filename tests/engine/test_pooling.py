"""Embeddings: hidden rows pooled by the engine, against transformers and under everything that happens to requests."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from test_core import GREEDY, make_core, outputs, request, run
from tiny_models import LIMITS, ArrayWeights, bind_model, random_transformers_model, saved_tensors, torch_backend

from tokenmill.engine.core import EngineCore
from tokenmill.engine.messages import (
    AbortRequest,
    AddRequest,
    Embedded,
    Event,
    Failed,
    FailureKind,
    Finished,
    FinishReason,
    Pooling,
)
from tokenmill.engine.scheduler import SchedulerLimits
from tokenmill.program.hidden_rows import HIDDEN_ROWS, with_hidden_rows
from tokenmill.sampling import SamplingParams

CONFIG = transformers.LlamaConfig(
    vocab_size=101,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)


def embed(number: int, prompt: list[int], pooling: Pooling) -> AddRequest:
    return request(number, prompt, SamplingParams(seed=0), pooling=pooling)


def vectors(events: list[Event]) -> dict[int, np.ndarray]:
    return {event.request_id: event.vector for event in events if isinstance(event, Embedded)}


@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("chunk", [7, 512])
def test_vectors_equal_those_of_transformers(pooling: Pooling, chunk: int) -> None:
    model = random_transformers_model(CONFIG)
    bound = bind_model(model)
    backend = torch_backend(with_hidden_rows(bound.program), ArrayWeights(saved_tensors(model), bound.sources))
    core = EngineCore(
        backend,
        vocab_size=101,
        kv_pages=[64],
        limits=SchedulerLimits(chunk, 4, LIMITS.sampled, LIMITS.context),
    )
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 101, size=length).tolist() for length in (1, 5, 40)]
    found = vectors(run(core, [embed(number, prompt, pooling) for number, prompt in enumerate(prompts)]))
    for number, prompt in enumerate(prompts):
        with torch.no_grad():
            rows = model.model(torch.tensor([prompt])).last_hidden_state[0].double().numpy()
        expected = rows[-1] if pooling is Pooling.LAST else rows.mean(axis=0)
        np.testing.assert_allclose(found[number], expected / np.linalg.norm(expected), atol=1e-5)
        assert np.linalg.norm(found[number]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("pooling", Pooling)
def test_a_vector_does_not_depend_on_chunks_neighbours_memory_or_cache(pooling: Pooling) -> None:
    prompts = [[number % 3] * 64 + list(range(number, 30 + number)) for number in range(6)]
    wanted = [embed(number, prompt, pooling) for number, prompt in enumerate(prompts)]
    reference = {}
    for message in wanted:
        core, _ = make_core(caching=False, tokens=512)
        reference.update(vectors(run(core, [message])))
    # They rank before the embeddings, fill the cache with what these begin with, and grow at their expense.
    writers = [request(100 + n, prompts[0][:40], SamplingParams(max_tokens=100, seed=n)) for n in range(3)]
    preempted = 0
    for pages, tokens in ((11, 9), (11, 24)):
        core, _ = make_core(pages=pages, tokens=tokens)
        found = vectors(run(core, [*writers, *wanted]))
        assert {number: vector.tobytes() for number, vector in found.items()} == {
            number: vector.tobytes() for number, vector in reference.items()
        }
        preempted += core.statistics.preemptions
    assert preempted > 0


@pytest.mark.parametrize(("pooling", "cached"), [(Pooling.LAST, 96), (Pooling.MEAN, 0)])
def test_only_the_last_tokens_embedding_reads_the_prefix_cache(pooling: Pooling, cached: int) -> None:
    core, backend = make_core()
    (first,) = vectors(run(core, [embed(0, [1] * 100, pooling)])).values()
    steps = len(backend.steps)
    events = run(core, [embed(1, [1] * 100, pooling)])
    assert vectors(events)[1].tobytes() == first.tobytes()
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.timings.cached_tokens == cached
    assert sum(plan.tokens for plan in backend.steps[steps:]) == 100 - cached


@pytest.mark.parametrize("pooling", Pooling)
def test_logits_are_computed_only_beside_somebody_who_reads_them(pooling: Pooling) -> None:
    core, backend = make_core(tokens=16)
    run(core, [embed(0, [1] * 40, pooling)])
    assert backend.outputs == [(HIDDEN_ROWS,)] * 3
    backend.outputs.clear()
    steps = len(backend.steps)
    run(core, [embed(1, [2] * 40, pooling), request(2, [5, 6, 7], GREEDY)])
    assert ("logits", HIDDEN_ROWS) in backend.outputs
    assert backend.outputs[-1] == ("logits",)
    assert {plan.sampled for plan in backend.steps[steps:]} <= {0, 1}  # embeddings want no row of logits


@pytest.mark.parametrize("pooling", Pooling)
def test_a_prompt_is_pooled_in_steps_as_long_as_any_others(pooling: Pooling) -> None:
    core, backend = make_core(tokens=300)
    run(core, [embed(0, [1] * 300, pooling)])
    assert [plan.tokens for plan in backend.steps] == [300]


def test_a_prompt_may_fill_the_context() -> None:
    core, _ = make_core()
    events = run(core, [embed(0, [1] * 320, Pooling.LAST), embed(1, [1] * 321, Pooling.LAST)])
    assert [type(event) for event in events] == [Failed, Embedded, Finished]


def test_a_cancelled_embedding_gives_its_pages_back() -> None:
    core, _ = make_core(tokens=16)
    core.handle(embed(0, [1] * 200, Pooling.MEAN))
    core.step()
    assert core.usage()[0].used > 0
    (event,) = core.handle(AbortRequest(0))
    assert isinstance(event, Finished)
    assert event.reason is FinishReason.ABORT
    assert core.usage()[0].used == 0


def test_rows_that_are_no_numbers_fail_their_request_only() -> None:
    alone, _ = make_core()
    expected = outputs(run(alone, [request(1, [5, 6, 7], GREEDY)]))
    core, backend = make_core()
    backend.poisoned = {42}
    events = run(core, [embed(0, [1, 42, 3], Pooling.MEAN), request(1, [5, 6, 7], GREEDY)])
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert failed.request_id == 0
    assert failed.kind is FailureKind.MODEL
    assert outputs(events) == expected
