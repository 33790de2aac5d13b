"""Who goes first: the order in which sequences start, get the step's tokens, and keep their pages.

A policy ranks a sequence once, when it arrives, and the rank never changes. That makes preemption safe (a sequence only
ever takes pages from worse ranks, so whoever ranks best always advances) and keeps the queues sorted for free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

Rank = tuple[float, int, int]
"""Smaller goes first; the last two entries are arrival number and output index, so that ranks never tie."""


class SchedulingPolicy(Protocol):
    """Ranks sequences."""

    def rank(self, priority: int, arrived: float, number: int, index: int) -> Rank:
        """The rank of output ``index`` of request ``number``, which came at ``arrived`` seconds with ``priority``."""


@dataclass(frozen=True, slots=True)
class FirstComeFirstServed:
    """By arrival; ``priority`` does not matter."""

    def rank(self, priority: int, arrived: float, number: int, index: int) -> Rank:
        return (0.0, number, index)


@dataclass(frozen=True, slots=True)
class PriorityWithAgeing:
    """Smaller ``priority`` first, and each ``ageing`` seconds of waiting count as one level.

    Between two requests the difference of their ages is constant, so ageing needs no clock after arrival: a request
    ranks by the moment at which it would reach level 0. One with priority p is overtaken only by requests of better
    priority q that come within (p - q) * ageing seconds, so none waits for ever.
    """

    ageing: float = 10.0

    def rank(self, priority: int, arrived: float, number: int, index: int) -> Rank:
        return (priority * self.ageing + arrived, number, index)
