"""Paged attention: equal to the textbook, bit by bit to the numerics contract, and to itself however it is run."""

from __future__ import annotations

import numpy as np
import pytest
from attention_harness import AttentionRunner, Sequence, Shape, random_sequence
from attention_reference import exp2, fma, row_by_rules, textbook

from tokenmill import _native
from tokenmill.program.kv import PAGE_TOKENS, KvElement

SHAPES = {
    "grouped": Shape(),
    "odd_group": Shape(heads=7, kv_heads=1, head_dim=64),
    "head_80": Shape(heads=6, kv_heads=2, head_dim=80),
    "head_96": Shape(heads=4, kv_heads=4, head_dim=96),
    "head_128": Shape(heads=12, kv_heads=2, head_dim=128),
    "head_256": Shape(heads=4, kv_heads=1, head_dim=256),
    "head_8": Shape(heads=3, kv_heads=3, head_dim=8),
    "head_20": Shape(heads=2, kv_heads=1, head_dim=20),
    "many_heads": Shape(heads=71, kv_heads=1, head_dim=16),
    "window": Shape(window=100),
    "wide_window": Shape(heads=2, kv_heads=2, head_dim=32, window=513),
    "softcap": Shape(softcap=20.0),
    "bf16": Shape(element=KvElement.BF16),
    "fp32": Shape(element=KvElement.F32, head_dim=24),
}
NARROW = ["grouped", "head_8", "window", "softcap", "bf16", "fp32"]


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


# ---- against the textbook --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_textbook_in_fp64(name):
    sequence = random_sequence(SHAPES[name], 530, seed=1, spread=2.0)
    actual = AttentionRunner(SHAPES[name]).whole(sequence)
    assert relative_error(actual, textbook(SHAPES[name], sequence)) < 1e-5


@pytest.mark.parametrize("slots", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1024, 1100])
def test_ragged_lengths(slots):
    sequence = random_sequence(SHAPES["odd_group"], slots, seed=slots)
    actual = AttentionRunner(SHAPES["odd_group"]).whole(sequence)
    assert relative_error(actual, textbook(SHAPES["odd_group"], sequence)) < 1e-5


def test_extreme_logits_of_ten_thousand():
    # Small whole numbers: products and sums are exact, so that logits of +-1e4 have no rounding error to amplify.
    shape = Shape(heads=2, kv_heads=1, head_dim=64, element=KvElement.F32, scale=1.0 / 1.4426950408889634)
    rng = np.random.default_rng(5)
    q = rng.integers(-25, 26, (600, 128)).astype(np.float32)
    k = rng.integers(-25, 26, (600, 64)).astype(np.float32)
    sequence = Sequence(q, k, rng.standard_normal((600, 64)).astype(np.float32))
    k[300], q[400:] = 25, np.sign(q[400:]) * 25
    k[300], k[301] = np.sign(q[500, :64]) * 25, -np.sign(q[500, :64]) * 25
    scores = q.reshape(600, 2, 64) @ k.T * shape.scale
    assert scores.max() > 1e4
    assert scores.min() < -1e4
    actual = AttentionRunner(shape).whole(sequence)
    assert np.isfinite(actual).all()
    assert np.abs(actual - textbook(shape, sequence)).max() < 2e-3  # q * scale is rounded once: 1e4 * 2^-24


def test_one_key_gives_its_value_exactly():
    sequence = random_sequence(SHAPES["grouped"], 1, seed=3)
    expected = np.repeat(sequence.v.astype(np.float16).reshape(2, 64), 2, axis=0).reshape(1, -1)
    assert (AttentionRunner(SHAPES["grouped"]).whole(sequence) == expected).all()


# ---- bit by bit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grouped", "head_20", "window", "bf16", "fp32"])
def test_equals_the_contract_bit_by_bit(name, isa):
    shape, slots = SHAPES[name], 540
    sequence = random_sequence(shape, slots, seed=2, spread=3.0)
    actual = AttentionRunner(shape).whole(sequence)
    for slot in (0, 15, 16, 255, 256, 300, 539):
        assert (actual[slot] == row_by_rules(shape, sequence, slot)).all(), slot


def test_mutation_a_running_maximum_changes_bits():
    # The control of the bitwise tests: the same arithmetic relative to the maximum so far is as accurate, but differs.
    shape = SHAPES["grouped"]
    sequence = random_sequence(shape, 700, seed=2, spread=3.0)
    actual = AttentionRunner(shape).whole(sequence)[699]
    mutant = row_by_rules(shape, sequence, 699, running_maximum=True)
    assert (actual != mutant).any()
    assert relative_error(mutant, actual) < 1e-5


def test_the_emulated_fma_rounds_once():
    a = np.float32(1 + 2**-12) * np.ones(1, np.float32)
    assert fma(a, a, -np.float32(1 + 2**-11) * np.ones(1, np.float32))[0] == np.float32(2**-24)
    # Exactly half way but for a bit far below: rounding through fp64 would tie to even.
    b = np.array([1 + 2**-23], np.float32)
    assert fma(b, np.array([2.0**-24], np.float32), np.array([1.0], np.float32))[0] == np.float32(1 + 2**-23)
    assert relative_error(exp2(np.linspace(-20, 0, 99)), np.exp2(np.linspace(-20, 0, 99))) < 1e-6


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("chunks", [1, 7, 64, 256, [250, 12, 1, 1, 100]], ids=str)
def test_chunking_does_not_change_bits(name, chunks):
    sequence = random_sequence(SHAPES[name], 530, seed=4, spread=2.0)
    runner = AttentionRunner(SHAPES[name])
    assert (runner.whole(sequence, chunks) == runner.whole(sequence)).all()


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("name", ["grouped", "head_128", "window", "softcap"])
def test_threads_do_not_change_bits(name, threads):
    # Slots one by one at the end: single rows over several spans are split between threads.
    sequence = random_sequence(SHAPES[name], 1100, seed=5, spread=2.0)
    chunks = [700, 64, 300, 1]
    alone = AttentionRunner(SHAPES[name], threads=1).whole(sequence, chunks)
    assert (AttentionRunner(SHAPES[name], threads=threads).whole(sequence, chunks) == alone).all()


@pytest.mark.parametrize("name", NARROW)
def test_instruction_sets_do_not_change_bits(name, isa):
    sequence = random_sequence(SHAPES[name], 300, seed=6, spread=2.0)
    actual = AttentionRunner(SHAPES[name]).whole(sequence, [290, 1])
    _native.set_active_isa("portable")
    assert (actual == AttentionRunner(SHAPES[name]).whole(sequence)).all()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", ["grouped", "window"])
def test_neighbours_in_the_batch_do_not_change_bits(name, threads):
    shape = SHAPES[name]
    sequences = [random_sequence(shape, slots, seed=slots) for slots in (1, 40, 600, 257, 90)]
    runner = AttentionRunner(shape, threads=threads)
    alone = [runner.whole(sequence) for sequence in sequences]
    rng = np.random.default_rng(9)
    for sequence in sequences:
        sequence.table = []
    done = [0] * len(sequences)
    while any(done[i] < len(s) for i, s in enumerate(sequences)):
        running = [i for i in rng.permutation(len(sequences)) if done[i] < len(sequences[i])][: rng.integers(1, 6)]
        parts = [(sequences[i], done[i], min(len(sequences[i]), done[i] + int(rng.integers(1, 120)))) for i in running]
        for i, (_, begin, end), out in zip(running, parts, runner.step(parts), strict=True):
            assert (out == alone[i][begin:end]).all()
            done[i] = end


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_pages_behind_the_window_may_be_gone():
    # Chunked runs take the pages away and fill them with NaN; the whole run keeps them. Bits must agree.
    shape = Shape(window=70)
    sequence = random_sequence(shape, 400, seed=8)
    runner = AttentionRunner(shape, pages=14)
    chunked = runner.whole(sequence, 30)
    assert sequence.table.count(-1) > 5
    assert (chunked == AttentionRunner(shape).whole(sequence)).all()


@pytest.mark.parametrize("chunk", [1, 530])
def test_an_overflowing_value_harms_only_tokens_that_see_it(chunk):
    shape = Shape(window=100)
    sequence = random_sequence(shape, 530, seed=10)
    clean = AttentionRunner(shape).whole(sequence)
    sequence.v[200, 5] = 1e6  # infinite in fp16
    dirty = AttentionRunner(shape).whole(sequence, chunk)
    sees = np.arange(530)
    sees = (sees >= 200) & (sees < 300)
    assert (dirty[~sees] == clean[~sees]).all()
    assert not np.isfinite(dirty[sees][:, 5]).any()


def test_writes_only_its_own_layer_and_slots():
    shape = Shape(heads=2, kv_heads=2, head_dim=16, element=KvElement.F32)
    runner = AttentionRunner(shape, layers=3)
    sequence = random_sequence(shape, 40, seed=11)
    runner.step([(sequence, 0, 40)])
    keys, values = runner.executor.kv_plane(0, 0), runner.executor.kv_plane(0, 1)
    assert np.isnan(keys[:, :2]).all()
    written = keys[sequence.table, 2].reshape(2, 2, PAGE_TOKENS // 16, 16, 16)  # page, head, t / 16, d, t % 16
    written = written.transpose(0, 2, 4, 1, 3).reshape(64, 32)
    assert (written[:40] == sequence.k).all()
    assert np.isnan(written[40:]).all()
    written = values[sequence.table, 2].reshape(2, 2, PAGE_TOKENS, 16).transpose(0, 2, 1, 3).reshape(64, 32)
    assert (written[:40] == sequence.v).all()
    others = [page for page in range(len(keys)) if page not in sequence.table]
    assert np.isnan(keys[others]).all()
    assert np.isnan(values[others]).all()


def test_copied_pages_serve_a_second_sequence():
    shape = SHAPES["grouped"]
    runner = AttentionRunner(shape)
    first = random_sequence(shape, 100, seed=12)
    expected = runner.whole(first)
    first.table = []
    runner.step([(first, 0, 99)])
    second = Sequence(first.q, first.k, first.v, [int(runner.free.pop()) for _ in first.table])
    for source, target in zip(first.table, second.table, strict=True):
        runner.executor.copy_page(0, source, target)
    for plane in (0, 1):
        runner.executor.kv_plane(0, plane)[first.table] = 0x7FC1
    assert (runner.step([(second, 99, 100)])[0] == expected[99]).all()


def test_copying_a_page_that_does_not_exist_is_refused():
    runner = AttentionRunner(SHAPES["grouped"], pages=8)
    with pytest.raises(ValueError, match="KV group 0 has 8 pages"):
        runner.executor.copy_page(0, 0, 8)
