"""Samples of one quantity, and of two that were taken in turn."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and range of some samples."""

    median: float
    low: float
    high: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Raises ValueError if there is no sample."""
        if not samples:
            raise ValueError("a spread needs at least one sample")
        return cls(statistics.median(samples), min(samples), max(samples), tuple(samples))

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g} to {self.high:.4g})"


def pair_ratios(ours: Sequence[float | None], theirs: Sequence[float | None]) -> Spread | None:
    """Ratios of samples taken in the same round; rounds that one side failed do not count. None without a pair."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    return Spread.of(ratios) if ratios else None
