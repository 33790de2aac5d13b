"""A token does not depend on its neighbours: logits are the same bits however a sequence is run.

The reference of every case is the sequence alone, prefilled whole, on one thread. Whatever else happens to it
(chunks, neighbours, page placement, threads, instruction-set path, garbage in free pages) must not change one bit.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tiny_gguf import VOCABULARY, write_tiny_gguf

from tokenmill import _native
from tokenmill.backends.backend import StepLimits
from tokenmill.backends.native import NativeBackend
from tokenmill.models import bind
from tokenmill.program.kv import PAGE_TOKENS
from tokenmill.program.step import SequenceStep, lay_plan
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.packing import load_weights

LIMITS = StepLimits(tokens=1024, sequences=24, sampled=1024, context=1024)
PAGES = 256

MODELS = {
    "llama, super-blocks": ("llama", ("Q4_K", "Q6_K", "Q5_K", "Q3_K", "Q2_K"), 2),
    "llama, groups of 32": ("llama", ("Q4_1", "Q8_0", "Q5_0", "Q4_0", "IQ4_NL", "Q5_1"), 2),
    "qwen2, mixed with 16 bit": ("qwen2", ("F16", "Q4_K", "BF16", "Q8_0", "F32"), 2),
    "gemma3, windows": ("gemma3", ("Q4_K", "Q5_0", "Q6_K"), 6),
}


@dataclasses.dataclass
class Model:
    program: object
    weights: object

    def backend(self, threads: int = 1, limits: StepLimits = LIMITS) -> NativeBackend:
        return NativeBackend(self.program, self.weights, limits, [PAGES] * len(self.program.kv_groups), threads=threads)


@pytest.fixture(scope="module", params=MODELS, ids=str)
def model(request, tmp_path_factory):
    architecture, formats, layers = MODELS[request.param]
    folder = tmp_path_factory.mktemp("bitwise")
    checkpoint = open_checkpoint(write_tiny_gguf(folder / "tiny.gguf", architecture, formats, layers))
    bound = bind(checkpoint.metadata, checkpoint.kind, {t.name: t.shape for t in checkpoint.tensors.values()})
    weights = load_weights(checkpoint, bound, cache_dir=folder)
    yield Model(bound.program, weights)
    weights.close()


class Sequence:
    """Token ids and where their pages lie."""

    def __init__(self, rng: np.random.Generator, length: int, pages: list[int], groups: int) -> None:
        self.tokens = rng.integers(0, VOCABULARY, size=length).tolist()
        count = -(-length // PAGE_TOKENS)
        self.tables = [[pages.pop() for _ in range(count)] for _ in range(groups)]
        self.done = 0
        self.logits: list[np.ndarray] = []

    def part(self, count: int) -> SequenceStep:
        count = min(count, len(self.tokens) - self.done)
        step = SequenceStep(self.tokens[self.done : self.done + count], self.done, self.tables, range(count))
        self.done += count
        return step


def alone(model: Model, tokens: list[int]) -> np.ndarray:
    """The reference: one sequence, one step, one thread, pages in order."""
    backend = model.backend()
    tables = [list(range(-(-len(tokens) // PAGE_TOKENS)))] * len(backend.kv_groups)
    plan = lay_plan([SequenceStep(tokens, 0, tables, range(len(tokens)))], len(backend.kv_groups))
    logits = backend.run(plan)["logits"].copy()
    backend.close()
    return logits


def run_together(backend: NativeBackend, sequences: list[Sequence], sizes) -> None:
    """Runs all sequences to their ends, each step taking the next chunk of each in the order given by ``sizes``."""
    groups = len(backend.kv_groups)
    while any(s.done < len(s.tokens) for s in sequences):
        active = [s for s in sequences if s.done < len(s.tokens)]
        parts = [(s, s.part(sizes(s))) for s in active]
        logits = backend.run(lay_plan([step for _, step in parts], groups))["logits"]
        row = 0
        for sequence, step in parts:
            sequence.logits.append(logits[row : row + len(step.token_ids)].copy())
            row += len(step.token_ids)


def fill_with_nan(backend: NativeBackend) -> None:
    for group in range(len(backend.kv_groups)):
        for plane in range(2):
            backend.kv_plane(group, plane).view(np.uint8)[...] = 0xFF  # NaN in every 16- and 32-bit format


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool((a.view(np.uint32) == b.view(np.uint32)).all())


@pytest.mark.parametrize("chunk", [1, 7, 32, 64, 256])
def test_chunked_prefill_equals_whole(model, chunk):
    rng = np.random.default_rng(chunk)
    backend = model.backend()
    pages = rng.permutation(PAGES).tolist()
    length = 90 if chunk == 1 else 600  # over three spans of attention
    sequence = Sequence(rng, length, pages, len(backend.kv_groups))
    run_together(backend, [sequence], lambda s: chunk)
    assert same_bits(np.concatenate(sequence.logits), alone(model, sequence.tokens))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_neighbours_chunks_threads_and_garbage_change_nothing(model, threads):
    rng = np.random.default_rng(threads)
    backend = model.backend(threads)
    fill_with_nan(backend)
    pages = rng.permutation(PAGES).tolist()
    groups = len(backend.kv_groups)
    sequences = [Sequence(rng, int(n), pages, groups) for n in (1, 2, 31, 32, 33, 65, 140, 300)]
    run_together(backend, sequences, lambda s: int(rng.choice([1, 2, 3, 5, 8, 19, 31, 33, 64, 127])))
    for sequence in sequences:
        assert same_bits(np.concatenate(sequence.logits), alone(model, sequence.tokens))


@pytest.mark.parametrize("rows", [*range(2, 21), 31, 32, 33, 64, 127, 512])
def test_row_count_changes_nothing(model, rows):
    rng = np.random.default_rng(rows)
    backend = model.backend(2)
    tokens = rng.integers(0, VOCABULARY, size=rows).tolist()
    tables = [list(range(16))] * len(backend.kv_groups)
    plan = lay_plan([SequenceStep(tokens, 0, tables, range(rows))], len(backend.kv_groups))
    logits = backend.run(plan)["logits"]
    assert same_bits(logits[: min(rows, 3)], alone(model, tokens[: min(rows, 3)]))


@pytest.mark.parametrize("isa", _native.available_isas())
def test_every_instruction_set_path_gives_the_same_bits(model, isa):
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, VOCABULARY, size=70 if isa == "portable" else 300).tolist()
    expected = alone(model, tokens)
    before = _native.active_isa()
    _native.set_active_isa(isa)
    try:
        assert same_bits(alone(model, tokens), expected)
    finally:
        _native.set_active_isa(before)


def test_another_token_changes_what_follows(model):
    """Negative control: the comparison sees a change of one token, and only after it."""
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, size=40).tolist()
    changed = [*tokens]
    changed[20] = (changed[20] + 1) % VOCABULARY
    a, b = alone(model, tokens), alone(model, changed)
    assert same_bits(a[:20], b[:20])
    assert not any(same_bits(a[i], b[i]) for i in range(20, 40))
