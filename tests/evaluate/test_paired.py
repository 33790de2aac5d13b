"""Intervals and tests against distributions and tables that are known."""

import numpy as np
import pytest

from tokenmill.evaluate.paired import difference_interval, mcnemar, mean_interval, wilson_interval


def test_intervals_hold_the_mean_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        interval = mean_interval(rng.normal(3.0, 1.0, 100), samples=500, seed=seed)
        held += interval.lower <= 3.0 <= interval.upper
    assert 180 <= held <= 199


def test_pairing_removes_what_is_common():
    rng = np.random.default_rng(1)
    hard = rng.gamma(1.0, 5.0, 500)
    a, b = hard + 0.1 + rng.normal(0, 0.01, 500), hard
    paired = difference_interval(a, b)
    assert 0.09 < paired.lower < paired.upper < 0.11
    assert mean_interval(a).upper - mean_interval(a).lower > 0.5


def test_blocks_widen_the_interval_of_correlated_values():
    walk = np.repeat(np.random.default_rng(2).normal(size=40), 25)
    alone, blocks = mean_interval(walk), mean_interval(walk, block=25)
    assert blocks.upper - blocks.lower > 3 * (alone.upper - alone.lower)


def test_mcnemar_is_the_exact_binomial_test():
    a = [True] * 10 + [False] * 2 + [True] * 50
    b = [False] * 10 + [True] * 2 + [True] * 50
    result = mcnemar(a, b)
    assert (result.only_a, result.only_b) == (10, 2)
    assert result.p_value == pytest.approx(2 * (1 + 12 + 66) / 4096)
    assert mcnemar([True, False], [True, False]).p_value == 1.0


def test_shares_near_zero_and_one_have_intervals_within_range():
    none, every = wilson_interval(0, 20), wilson_interval(20, 20)
    assert (none.value, none.lower) == (0.0, 0.0)
    assert none.upper == pytest.approx(0.1611, abs=1e-4)
    assert every.upper == pytest.approx(1.0)
    assert wilson_interval(82, 164).lower == pytest.approx(0.4243, abs=1e-4)


def test_sides_of_different_length_are_refused():
    with pytest.raises(ValueError, match="must be the same"):
        difference_interval([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="must be the same"):
        mcnemar([True], [])
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])
