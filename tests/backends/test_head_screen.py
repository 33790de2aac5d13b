"""The screened head gives each row's largest logit and its place, bit for bit, whatever the head and the row hold."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tokenmill import _native
from tokenmill.backends.backend import PackedMatrix, StepLimits
from tokenmill.backends.head_screen import HeadScreen, screen_bytes, screen_pays, screenable_head
from tokenmill.backends.native import NativeBackend
from tokenmill.program.ops import WeightFormat
from tokenmill.program.program import Program
from tokenmill.program.recorder import Recorder
from tokenmill.program.step import SequenceStep, lay_plan

MOST_ROWS = 6  # more than are screened


def pack(format: WeightFormat, source: np.ndarray, n: int, k: int) -> PackedMatrix:
    out = np.empty(_native.packed_bytes(format, n, k) + 64, np.uint8)
    start = -out.ctypes.data % 64
    packed = out[start : start + _native.packed_bytes(format, n, k)]
    _native.pack_matrix(format, source.reshape(-1), n, k, packed, 1)
    return PackedMatrix("head", format, n, k, packed)


def q8_0(scales: np.ndarray, codes: np.ndarray) -> PackedMatrix:
    """A head of blocks of 32: scales ``[n, k / 32]``, int8 codes ``[n, k]``."""
    n, k = codes.shape
    blocks = np.empty((n, k // 32, 34), np.uint8)
    blocks[:, :, :2] = scales.astype(np.float16)[..., None].view(np.uint8).reshape(n, k // 32, 2)
    blocks[:, :, 2:] = codes.astype(np.int8).reshape(n, k // 32, 32).view(np.uint8)
    return pack(WeightFormat.Q8_0, blocks, n, k)


def quantized(values: np.ndarray) -> PackedMatrix:
    groups = values.reshape(len(values), -1, 32)
    scales = (np.abs(groups).max(-1) / 127).astype(np.float16).astype(np.float64)
    codes = np.rint(groups / np.where(scales == 0, 1, scales)[..., None]).clip(-127, 127)
    return q8_0(scales, codes.reshape(values.shape))


class Weights:
    def __init__(self, head: PackedMatrix, x: np.ndarray) -> None:
        table = np.zeros((head.n, head.k), np.float32)
        table[: len(x)] = x
        self._matrices = {"head": head, "x": pack(WeightFormat.F32, table.view(np.uint8), head.n, head.k)}

    def matrix(self, name: str) -> PackedMatrix:
        return self._matrices[name]

    def vector(self, name: str) -> np.ndarray:
        raise KeyError(name)

    def decoded(self, name: str) -> np.ndarray:
        raise KeyError(name)

    def close(self) -> None:
        pass


def program(n: int, k: int, *, softcap: bool = False) -> Program:
    """Token i is row i of a table, and its logits are that row times the head."""
    r = Recorder(n)
    x = r.gather_sampled(r.embed("x", k), out="sampled")
    logits = r.linear(x, "head", n, out="scores" if softcap else "logits")
    if softcap:
        r.softcap(logits, 30.0, out="logits")
    return r.program()


def logits(head: PackedMatrix, x: np.ndarray, threads: int = 1) -> tuple[np.ndarray, np.ndarray, NativeBackend]:
    """Of the rows of x: in full, and as far as a plan wants that asks for the best only."""
    made = NativeBackend(
        program(head.n, head.k),
        Weights(head, x),
        StepLimits(MOST_ROWS, MOST_ROWS, MOST_ROWS, 32),
        (),
        threads,
        screened_head=True,
    )
    rows = [SequenceStep([row], 0, [], [0]) for row in range(len(x))]
    full, best = (made.run(lay_plan(rows, 0, best_only=only))["logits"].copy() for only in (False, True))
    return full, best, made


def differences(full: np.ndarray, best: np.ndarray) -> int:
    """Rows whose largest logit, the first of equals, is another or lies elsewhere; all bits count in rows with NaN."""
    wrong = 0
    for one, other in zip(full, best, strict=True):
        if not np.isfinite(one).all():
            wrong += one.tobytes() != other.tobytes()
        else:
            wrong += one.argmax() != other.argmax() or one.max().tobytes() != other.max().tobytes()
    return wrong


def cases(seed: int) -> Iterator[tuple[str, PackedMatrix, np.ndarray]]:
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(1, 3000)), 32 * int(rng.integers(1, 40))
    rows = int(rng.integers(1, MOST_ROWS + 1))
    x = rng.normal(size=(rows, k)).astype(np.float32)
    w = rng.normal(size=(n, k)) * 10 ** rng.normal(size=(n, 1))
    yield "random", quantized(w), x
    yield "rows alike", quantized(np.repeat(w, 3, axis=0)[:n]), x
    yield "nearly alike", quantized(w[:1] + 1e-3 * rng.normal(size=(n, k))), x
    yield "all equal", quantized(np.ones((n, k))), x
    yield "zero head", quantized(np.zeros((n, k))), x
    yield "zero rows", quantized(w), np.zeros_like(x)
    # As hidden states are: a few dimensions outweigh the rest.
    outliers = x * np.where(rng.random(k) < 0.02, 300, 1).astype(np.float32)
    yield "outliers", quantized(w), outliers
    yield "near the answer", quantized(w), (w[rng.integers(0, n, rows)] + 0.1 * x).astype(np.float32)
    codes = rng.integers(-128, 128, size=(n, k))
    yield "any blocks", q8_0(rng.normal(size=(n, k // 32)), codes), x
    yield "least scales", q8_0(rng.integers(-600, 600, size=(n, k // 32)) * 2.0**-24, codes), x
    yield "largest scales", q8_0(rng.choice([-60000.0, 3.0, 9000.0], size=(n, k // 32)), codes), x
    yield "largest activations", quantized(w), (x * 1e30).astype(np.float32)
    yield "least activations", quantized(w), (x * 1e-37).astype(np.float32)
    broken = x.copy()
    broken[0, rng.integers(k)] = rng.choice([np.nan, np.inf, -np.inf])
    yield "a row that is not finite", quantized(w), broken
    scales = np.full((n, k // 32), 0.01)
    scales[rng.integers(n), rng.integers(k // 32)] = rng.choice([np.nan, np.inf])
    yield "a head that is not finite", q8_0(scales, codes), x


@pytest.mark.parametrize("seed", range(3))
def test_the_largest_logit_and_its_place_are_those_of_the_whole_head(seed: int, isa: str) -> None:
    for name, head, x in cases(seed):
        full, best, _ = logits(head, x, threads=1 + seed)
        assert differences(full, best) == 0, (name, head.n, head.k, len(x))


def test_a_bound_that_is_too_small_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    build = HeadScreen.of

    def of(head: PackedMatrix, threads: int = 0) -> HeadScreen:
        screen = build(head, threads)
        screen.bounds[:] *= 0.01
        return screen

    monkeypatch.setattr(HeadScreen, "of", of)
    assert any(differences(*logits(head, x[:1])[:2]) for seed in range(6) for _, head, x in cases(seed))


@pytest.mark.parametrize("seed", range(3))
def test_no_score_is_further_from_its_logit_than_its_bound(seed: int, isa: str) -> None:
    nearest = 0.0
    for name, head, rows in cases(seed):
        screen = HeadScreen.of(head, 1)
        for row in rows:
            x = row[None]
            norm = _native.screen_norm(x)
            if not norm < 1e25:
                continue
            exact, score = (
                _native.linear(m.format, m.data, m.n, m.k, x, threads=1)[0].astype(np.float64)
                for m in (head, screen.matrix)
            )
            finite = np.isfinite(screen.bounds)
            off = np.abs(exact[finite] - score[finite])
            limit = (screen.bounds.astype(np.float64) * norm + 1e-25)[finite]
            assert (off <= limit).all(), name
            nearest = max(nearest, float((off / limit).max(initial=0)))
    assert nearest > 0.2  # a bound that says nothing would pass, too


def test_a_clear_winner_costs_a_small_part_of_the_head_and_flat_logits_rest_the_screen() -> None:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(4096, 640))
    _, _, made = logits(quantized(w), w[[7, 4000]].astype(np.float32))
    counts = made.screen_counts()
    assert counts.rows == 2
    assert counts.blocks <= 0.05 * 2 * 256
    assert counts.plain_steps == 0
    _, _, made = logits(quantized(np.ones((4096, 640))), np.ones((1, 640), np.float32))
    plan = lay_plan([SequenceStep([0], 0, [], [0])], 0, best_only=True)
    for _ in range(20):
        made.run(plan)
    counts = made.screen_counts()
    assert counts.plain_steps >= 16
    assert counts.rows <= 4


def test_steps_that_want_all_logits_or_have_many_rows_get_them() -> None:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(300, 64))
    x = rng.normal(size=(MOST_ROWS, 64)).astype(np.float32)
    full, best, made = logits(quantized(w), x)
    expected = _native.linear(WeightFormat.Q8_0, quantized(w).data, 300, 64, x, threads=1)
    assert np.array_equal(full, expected)
    assert np.array_equal(best, expected)
    assert made.screen_counts().rows == 0


def test_only_a_head_in_q8_0_whose_results_are_the_logits_is_screened() -> None:
    plain, capped = program(320, 64), program(320, 64, softcap=True)
    formats = {"x": WeightFormat.F32, "head": WeightFormat.Q8_0}
    assert screenable_head(plain, formats) is not None
    assert screenable_head(capped, formats) is None  # equal results of different ones: another may come first
    assert screenable_head(plain, formats | {"head": WeightFormat.Q6_K}) is None
    assert screen_pays(plain, formats)
    screen = HeadScreen.of(quantized(np.ones((320, 64))))
    assert screen.nbytes == screen_bytes(plain, formats) == 320 * 64 * 22 // 32 + 4 * 320
