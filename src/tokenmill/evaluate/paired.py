"""Is A different from B on the same items, and by how much? "No loss" is a statement with a size.

Differences are taken item by item, which removes what makes items hard for both. Intervals are percentile bootstraps
over items, or over blocks of neighbours where items depend on each other (Kuensch 1989). For pass and fail there is
also McNemar's exact test on the items that only one side passed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return f"{self.value:.4g} (95 %: {self.lower:.4g} to {self.upper:.4g})"


@dataclass(frozen=True, slots=True)
class McNemar:
    """Items that only one side passed, and the chance of a split at least as uneven if the sides were alike."""

    only_a: int
    only_b: int
    p_value: float


def mean_interval(values: Sequence[float] | Float64, *, block: int = 1, samples: int = 4000, seed: int = 0) -> Interval:
    """Mean of ``values`` (differences, or the scores of one side). Raises ValueError if there are none."""
    data = np.asarray(values, dtype=np.float64)
    if not data.size:
        raise ValueError("an interval needs at least one value")
    blocks = max(1, len(data) // block)
    parts = np.array_split(data, blocks)
    sums, counts = np.array([p.sum() for p in parts]), np.array([len(p) for p in parts])
    drawn = np.random.default_rng(seed).integers(0, blocks, size=(samples, blocks))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    lower, upper = np.quantile(means, [0.025, 0.975])
    return Interval(float(data.mean()), float(lower), float(upper))


def difference_interval(
    a: Sequence[float] | Float64, b: Sequence[float] | Float64, *, block: int = 1, seed: int = 0
) -> Interval:
    """Mean of a - b over the same items. Raises ValueError if the sides differ in length or have no items."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"the sides cover {len(first)} and {len(second)} items; they must be the same")
    return mean_interval(first - second, block=block, seed=seed)


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> McNemar:
    """Exact two-sided test (McNemar 1947): under no difference each discordant item falls to either side by a coin."""
    if len(a) != len(b):
        raise ValueError(f"the sides cover {len(a)} and {len(b)} items; they must be the same")
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2**n
    return McNemar(only_a, only_b, min(1.0, 2 * tail))


def wilson_interval(passed: int, total: int) -> Interval:
    """A share of passes with Wilson's score interval (1927), which holds for few items and for shares near 0 and 1."""
    if not total:
        raise ValueError("a share needs at least one item")
    z = 1.959963984540054
    p = passed / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    reach = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return Interval(p, max(0.0, middle - reach), min(1.0, middle + reach))
