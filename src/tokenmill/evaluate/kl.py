"""Kullback-Leibler divergence of one next-token distribution from another, token by token.

Perplexity on a small text hides what an optimization breaks; the divergence from the unoptimized model shows it after
a thousand tokens. ``KL(p || q) = sum_v p(v) (log p(v) - log q(v))`` in nats, p the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

LOG_ROWS = 16
"""Rows whose log-probabilities are held at once where many are streamed: what bounds memory."""


def log_softmax(logits: Float32) -> Float64:
    """Log-probabilities of rows ``[rows, vocabulary]`` in double precision."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def kl_divergence(reference: Float32, test: Float32) -> Float64:
    """KL(reference || test) in nats for each row of two logit arrays ``[rows, vocabulary]``."""
    p, q = log_softmax(reference), log_softmax(test)
    return np.asarray((np.exp(p) * (p - q)).sum(axis=-1))


@dataclass(frozen=True, slots=True)
class KlSummary:
    """How far a run is from its reference, over all tokens of a text."""

    tokens: int
    mean: float
    median: float
    quantile_99: float
    same_top_token: float

    def __str__(self) -> str:
        return (
            f"mean {self.mean:.5f}  median {self.median:.5f}  99 % {self.quantile_99:.4f}  "
            f"same top token {100 * self.same_top_token:.1f} %  ({self.tokens} tokens)"
        )


def summarize(divergences: Float64, same_top: npt.NDArray[np.bool_]) -> KlSummary:
    """Summary of per-token divergences and top-token agreements."""
    return KlSummary(
        tokens=len(divergences),
        mean=float(divergences.mean()),
        median=float(np.median(divergences)),
        quantile_99=float(np.quantile(divergences, 0.99)),
        same_top_token=float(same_top.mean()),
    )


def ratio_interval(
    numerator: Float64, denominator: Float64, *, block: int = 50, samples: int = 4000, seed: int = 0
) -> tuple[float, float, float]:
    """Ratio of two means over the same tokens, with the 2.5 % and 97.5 % quantiles of a paired block bootstrap.

    Neighbouring tokens are correlated, so whole blocks of ``block`` tokens are drawn with replacement, the same ones
    for both runs (Kuensch 1989). Returns (ratio, lower, upper). Raises ValueError if the runs differ in length.
    """
    if numerator.shape != denominator.shape:
        raise ValueError(f"the runs cover {numerator.shape} and {denominator.shape} tokens; they must be the same")
    blocks = max(1, len(numerator) // block)
    sums = np.array([[part.sum() for part in np.array_split(run, blocks)] for run in (numerator, denominator)])
    drawn = np.random.default_rng(seed).integers(0, blocks, size=(samples, blocks))
    ratios = sums[0][drawn].sum(axis=1) / sums[1][drawn].sum(axis=1)
    lower, upper = np.quantile(ratios, [0.025, 0.975])
    return float(numerator.mean() / denominator.mean()), float(lower), float(upper)


def windows(token_ids: Sequence[int], length: int, bos: int | None) -> list[list[int]]:
    """Cuts a text into windows of ``length`` tokens, each starting with BOS where the model has one; no remainder."""
    body = length - (bos is not None)
    prefix = [] if bos is None else [bos]
    return [prefix + list(token_ids[i : i + body]) for i in range(0, len(token_ids) - body + 1, body)]
