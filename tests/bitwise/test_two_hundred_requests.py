"""Two hundred requests at once get, bit by bit, what each gets alone.

Mixed lengths at random times, in a cache that holds a fraction of them: prompts are cut into chunks, found in the
prefix cache, preempted, and computed again or read back from a file. That the comparison would notice is shown by
breaking the engine in three places.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_engine_bitwise import Loaded, Outputs, make_core, opened, run
from tiny_gguf import write_tiny_gguf

from tokenmill.backends.native import NativeBackend
from tokenmill.engine import kv_cache
from tokenmill.engine.core import EngineCore
from tokenmill.engine.messages import AddRequest
from tokenmill.engine.page_pool import PagePool
from tokenmill.program.kv import PAGE_TOKENS
from tokenmill.sampling import SamplingParams

COUNT = 200


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two-hundred")
    with opened(write_tiny_gguf(folder / "tiny.gguf", "gemma3", ("Q4_K", "Q8_0"), 6), folder) as model:
        yield model


@pytest.fixture(scope="module")
def tiny_alone(tiny):
    return alone(tiny)


@pytest.fixture(scope="module")
def real(smollm2_path):
    with opened(smollm2_path, None) as model:
        yield model


@pytest.fixture(scope="module")
def real_alone(real):
    return alone(real)


def mixed_requests(count: int, vocab_size: int) -> list[AddRequest]:
    """Half of the prompts begin alike, some of them but for the last token of a page."""
    rng = random.Random(4)
    shared = [rng.randrange(vocab_size) for _ in range(130)]
    twisted = [*shared]
    twisted[2 * PAGE_TOKENS - 1] = (shared[2 * PAGE_TOKENS - 1] + 1) % vocab_size
    requests = []
    for number in range(count):
        own = [rng.randrange(vocab_size) for _ in range(rng.choice((1, 7, 20, 32, 60, 110)))]
        begin = rng.choice((shared, shared, twisted))[: rng.choice((64, 96, 130))] if number % 2 else []
        params = SamplingParams(
            max_tokens=rng.randrange(4, 44),
            temperature=rng.choice((0.0, 1.0)),
            seed=number,
            logprobs=1,
            prompt_logprobs=1 if number % 20 == 0 else None,
            n=2 if number % 10 == 1 else 1,
        )
        requests.append(AddRequest(number, np.array(begin + own, np.int32), params))
    return requests


def alone(model: Loaded) -> Outputs:
    """One request at a time, its prompt in one step, in a cache that is never short and never shared."""
    core = make_core(model, pages=64, tokens=512, sequences=2, threads=1, caching=False)
    outputs: Outputs = {}
    for message in mixed_requests(COUNT, model[0].vocab_size):
        outputs.update(run(core, [message], random.Random(0)))
    assert core.statistics.preemptions == 0
    return outputs


def crowded(model: Loaded, swap: Path | None) -> EngineCore:
    return make_core(model, pages=20, tokens=80, sequences=16, threads=2, caching=True, swap=swap)


def check(model: Loaded, expected: Outputs, swap: Path | None) -> None:
    requests = mixed_requests(COUNT, model[0].vocab_size)
    core = crowded(model, swap)
    found = run(core, requests, random.Random(1))
    assert found == expected
    computed = core.statistics.prompt_tokens
    assert core.statistics.preemptions >= COUNT // 10
    assert core.scheduler.prefix_hits > 20 * COUNT
    assert max(core.statistics.step_rows.counts[8:]) == 0, "a step held more than 80 rows"
    if swap is not None:
        assert core.scheduler.swap is not None
        assert core.scheduler.swap.swapped_in == core.scheduler.swap.swapped_out == core.statistics.preemptions
        assert core.scheduler.swap.used == 0
        assert computed == sum(len(m.prompt) for m in requests) - core.scheduler.prefix_hits, "computed twice"


@pytest.mark.parametrize("swaps", [False, True], ids=["recompute", "swap"])
def test_each_gets_what_it_gets_alone(tiny: Loaded, tiny_alone: Outputs, tmp_path: Path, swaps: bool) -> None:
    check(tiny, tiny_alone, tmp_path if swaps else None)


@pytest.mark.slow
@pytest.mark.parametrize("swaps", [False, True], ids=["recompute", "swap"])
def test_each_gets_what_it_gets_alone_of_a_real_model(
    real: Loaded, real_alone: Outputs, tmp_path: Path, swaps: bool
) -> None:
    check(real, real_alone, tmp_path if swaps else None)


def _found_by_all_but_the_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = kv_cache.block_key
    monkeypatch.setattr("tokenmill.engine.kv_cache.block_key", lambda tokens, block: keys(tokens, block)[:-4])
    monkeypatch.setattr("tokenmill.engine.prefix_cache.block_key", lambda tokens, block: keys(tokens, block)[:-4])


def _read_back_one_number_off(monkeypatch: pytest.MonkeyPatch) -> None:
    write = NativeBackend.write_page
    monkeypatch.setattr(
        NativeBackend,
        "write_page",
        lambda self, group, page, planes: write(self, group, page, [np.roll(p, 2) for p in planes]),
    )


def _written_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PagePool, "is_shared", lambda self, page: False)


@pytest.mark.parametrize(
    "mutate", [_found_by_all_but_the_last_token, _read_back_one_number_off, _written_without_a_copy]
)
def test_an_engine_that_is_broken_is_found_out(
    tiny: Loaded,
    tiny_alone: Outputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mutate: Callable[[pytest.MonkeyPatch], None],
) -> None:
    mutate(monkeypatch)
    requests = mixed_requests(COUNT, tiny[0].vocab_size)[:60]
    found = run(crowded(tiny, tmp_path), requests, random.Random(1))
    assert any(found[key] != tiny_alone[key] for key in found)
