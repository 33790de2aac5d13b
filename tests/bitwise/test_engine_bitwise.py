"""What a request gets from the engine does not depend on how it was scheduled, over the native kernels.

Tokens and log-probabilities of every request, alone in a roomy cache, against the same requests arriving at random in
engines with few pages (preemptions), small token budgets (chunks) and a prefix cache (hits), on any number of threads.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tiny_gguf import VOCABULARY, write_tiny_gguf

from tokenmill.backends.backend import ModelWeights, StepLimits
from tokenmill.backends.native import NativeBackend
from tokenmill.engine.core import EngineCore
from tokenmill.engine.messages import AddRequest, Embedded, Event, Pooling, PromptScored, TokenOutput
from tokenmill.engine.scheduler import MAX_SCORED_ROWS, SchedulerLimits
from tokenmill.engine.swap import SwapSpace
from tokenmill.models import bind
from tokenmill.program.hidden_rows import with_hidden_rows
from tokenmill.program.program import Program
from tokenmill.sampling import SamplingParams
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.packing import load_weights

CONTEXT = 640

Outputs = dict[tuple[int, int], list[tuple[int, float]]]
Loaded = tuple[Program, ModelWeights]


@contextmanager
def opened(path: Path, cache: Path | None) -> Iterator[Loaded]:
    """A model's program and weights."""
    with open_checkpoint(path) as checkpoint:
        bound = bind(checkpoint.metadata, checkpoint.kind, {t.name: t.shape for t in checkpoint.tensors.values()})
        weights = load_weights(checkpoint, bound, cache_dir=cache)
        yield with_hidden_rows(bound.program), weights
        weights.close()


@pytest.fixture(
    scope="module", params=[("llama", ("Q4_K", "Q6_K", "Q8_0"), 2), ("gemma3", ("Q4_1", "Q5_0"), 6)], ids=str
)
def loaded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    with opened(write_tiny_gguf(folder / "tiny.gguf", *request.param), folder) as model:
        yield model


def make_core(
    loaded,
    *,
    pages: int,
    tokens: int,
    sequences: int,
    threads: int,
    caching: bool,
    step_target: float | None = None,
    swap: Path | None = None,
) -> EngineCore:
    program, weights = loaded
    rows = max(sequences, MAX_SCORED_ROWS)
    all_pages = [pages] * len(program.kv_groups)
    backend = NativeBackend(program, weights, StepLimits(tokens, sequences, rows, CONTEXT), all_pages, threads=threads)
    # Without headroom they preempt as often as they can.
    limits = SchedulerLimits(tokens, sequences, rows, CONTEXT, step_target, headroom=0)
    return EngineCore(
        backend,
        vocab_size=program.vocab_size,
        kv_pages=all_pages,
        limits=limits,
        prefix_caching=caching,
        swap=None if swap is None else SwapSpace(swap, 1 << 30, len(all_pages), backend),
    )


def make_requests(rng: random.Random) -> list[AddRequest]:
    """Prompts of all lengths, some sharing long prefixes; greedy and sampled, some wanting prompt log-probabilities,
    some their embedding only."""
    shared = [rng.randrange(VOCABULARY) for _ in range(300)]
    requests = []
    for number in range(14):
        own = [rng.randrange(VOCABULARY) for _ in range(rng.choice((1, 5, 31, 33, 90, 200)))]
        prompt = shared[: rng.choice((64, 100, 300))] + own if number % 2 else own
        params = SamplingParams(
            max_tokens=rng.randrange(8, 50),
            temperature=rng.choice((0.0, 0.8, 1.0)),
            top_p=0.95,
            repetition_penalty=1.1,
            seed=number,
            logprobs=1,
            prompt_logprobs=1 if number % 5 == 0 else None,
            n=3 if number % 4 == 1 else 1,
        )
        requests.append(AddRequest(number, np.array(prompt, np.int32), params))
    for number, pooling in enumerate((*Pooling, *Pooling), start=len(requests)):
        own = [rng.randrange(VOCABULARY) for _ in range(rng.choice((1, 33, 200)))]
        prompt = np.array(shared[: rng.choice((64, 300))] + own, np.int32)
        requests.append(AddRequest(number, prompt, SamplingParams(seed=0), pooling=pooling))
    return requests


def collect(events: list[Event], outputs: Outputs) -> None:
    for event in events:
        if isinstance(event, TokenOutput):
            assert event.logprobs is not None
            outputs.setdefault((event.request_id, event.index), []).append((event.token_id, event.logprobs.logprob))
        elif isinstance(event, PromptScored):
            scored = outputs.setdefault((event.request_id, -1), [])
            scored += [(event.first + i, item.logprob) for i, item in enumerate(event.logprobs)]
        elif isinstance(event, Embedded):
            outputs[event.request_id, -2] = list(enumerate(event.vector.tolist()))


def run(core: EngineCore, requests: list[AddRequest], rng: random.Random) -> Outputs:
    """Requests arrive in random order, some while others already decode."""
    waiting, outputs = rng.sample(requests, len(requests)), Outputs()
    while waiting or core.busy:
        while waiting and (not core.busy or rng.random() < 0.3):
            collect(core.handle(waiting.pop()), outputs)
        collect(core.step(), outputs)
        core.cache.check()  # free + used + cached = total, each page held as often as it is counted
    assert all(usage.used == 0 for usage in core.usage())
    return outputs


@pytest.mark.parametrize("swaps", [False, True], ids=["recompute", "swap"])
def test_scheduling_changes_no_token_and_no_bit_of_a_probability(loaded, tmp_path, swaps):
    requests = make_requests(random.Random(0))
    reference: Outputs = {}
    for message in requests:
        core = make_core(loaded, pages=64, tokens=512, sequences=1, threads=1, caching=False)
        reference.update(run(core, [message], random.Random(0)))
    preemptions = hits = 0
    engines = ((21, 32, 8, 2, None), (21, 100, 12, 3, None), (21, 17, 8, 1, None), (24, 512, 12, 2, 0.004))
    for seed, (pages, tokens, sequences, threads, step_target) in enumerate(engines):
        core = make_core(
            loaded,
            pages=pages,
            tokens=tokens,
            sequences=sequences,
            threads=threads,
            caching=True,
            step_target=step_target,
            swap=tmp_path if swaps else None,
        )
        assert run(core, requests, random.Random(seed)) == reference
        preemptions += core.statistics.preemptions
        hits += sum(len(m.prompt) for m in requests) > core.statistics.tokens - sum(map(len, reference.values()))
        if swaps:
            assert core.scheduler.swap.swapped_in == core.scheduler.swap.swapped_out == core.statistics.preemptions
            assert core.scheduler.swap.used == 0
    assert preemptions >= 8, "the caches were meant to be too small"
    assert hits, "no prompt was found in the prefix cache"


def test_another_seed_gives_other_tokens(loaded):
    """Negative control: the comparison sees sampling."""
    params = {"max_tokens": 30, "temperature": 1.0, "logprobs": 1}
    prompt = np.arange(40, dtype=np.int32)
    results = []
    for seed in (1, 2):
        core = make_core(loaded, pages=64, tokens=512, sequences=1, threads=1, caching=False)
        results.append(run(core, [AddRequest(0, prompt, SamplingParams(seed=seed, **params))], random.Random(0)))
    assert results[0] != results[1]
