"""Divergence arithmetic against definitions written out by hand."""

import numpy as np
import pytest

from tokenmill.evaluate.kl import kl_divergence, log_softmax, ratio_interval, summarize, windows


def test_divergence_of_a_distribution_from_itself_is_zero():
    logits = np.random.default_rng(0).normal(size=(5, 100)).astype(np.float32)
    assert np.abs(kl_divergence(logits, logits + 3.0)).max() < 1e-6  # a constant shift changes no probability


def test_divergence_equals_its_definition():
    p = np.array([[0.5, 0.25, 0.25]])
    q = np.array([[0.25, 0.5, 0.25]])
    expected = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    assert kl_divergence(np.log(p).astype(np.float32), np.log(q).astype(np.float32))[0] == pytest.approx(
        expected, rel=1e-6
    )


def test_divergence_is_not_symmetric():
    a, b = (np.random.default_rng(i).normal(size=(1, 50)).astype(np.float32) * 3 for i in (1, 2))
    assert kl_divergence(a, b)[0] != pytest.approx(kl_divergence(b, a)[0], rel=1e-3)


def test_log_softmax_survives_large_logits():
    assert np.exp(log_softmax(np.array([[1e4, 1e4]], dtype=np.float32))) == pytest.approx(0.5)


def test_ratio_interval_holds_the_true_ratio_and_narrows_with_pairing():
    base = np.random.default_rng(3).gamma(0.5, 1.0, size=4000)
    ratio, lower, upper = ratio_interval(base * 1.2, base)
    assert lower == pytest.approx(1.2)
    assert upper == pytest.approx(1.2)
    assert ratio == pytest.approx(1.2)
    shuffled = np.random.default_rng(4).permutation(base) * 1.2
    _, lower, upper = ratio_interval(shuffled, base)
    assert upper - lower > 0.02
    assert lower < 1.2 < upper


def test_ratio_of_runs_of_different_length_is_refused():
    with pytest.raises(ValueError, match="must be the same"):
        ratio_interval(np.ones(3), np.ones(4))


def test_summary_reports_quantiles():
    divergences = np.arange(101, dtype=np.float64)
    summary = summarize(divergences, np.arange(101) % 2 == 0)
    assert (summary.mean, summary.median, summary.quantile_99) == (50.0, 50.0, 99.0)
    assert summary.same_top_token == pytest.approx(51 / 101)


def test_windows_cover_the_text_without_overlap():
    cut = windows(range(10, 30), 6, bos=1)
    assert cut == [[1, 10, 11, 12, 13, 14], [1, 15, 16, 17, 18, 19], [1, 20, 21, 22, 23, 24], [1, 25, 26, 27, 28, 29]]
    assert windows(range(7), 3, bos=None) == [[0, 1, 2], [3, 4, 5]]
