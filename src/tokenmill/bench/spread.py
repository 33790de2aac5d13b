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

    @classmethod
    def of_those(cls, samples: Sequence[float | None]) -> Spread | None:
        """Of the samples that there are; None if there is none."""
        kept = [sample for sample in samples if sample is not None]
        return cls.of(kept) if kept else None

    def text(self, digits: int) -> str:
        """Median with its range, if there is more than one sample."""
        middle = f"{self.median:.{digits}f}"
        return middle if len(self.samples) == 1 else f"{middle} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def pair_ratios(ours: Sequence[float | None], theirs: Sequence[float | None]) -> Spread | None:
    """Ratios of samples taken in the same round; rounds that one side failed do not count. None without a pair."""
    return Spread.of_those([None if a is None or b is None else a / b for a, b in zip(ours, theirs, strict=True)])
