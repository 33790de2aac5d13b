"""Beam search: the most likely continuations as a whole, not token by token.

Every live beam is a sequence of the engine. When each has the log-probabilities of its next tokens, the best ``width``
continuations of all together live on: a beam's first child takes over its sequence, further ones fork it and share its
pages, and beams without children give theirs back. A hypothesis scores the sum of its log-probabilities over its length
to the power of the length penalty (Wu et al. 2016 in the form that transformers uses); the length counts generated
tokens, the end token included.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenmill.engine.messages import BeamSearch, TokenLogprobs
from tokenmill.engine.sequence import Sequence


@dataclass(slots=True)
class Hypothesis:
    """Generated tokens with their log-probabilities."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    total: float = 0.0
    ended: bool = False
    """True if the last token ends it."""

    def then(self, after: TokenLogprobs, rank: int, *, end_ids: frozenset[int]) -> Hypothesis:
        """With the token of ``rank`` among the likeliest ``after`` it."""
        token, logprob = after.best[rank - 1]
        told, ends = TokenLogprobs(logprob, rank, after.best), token in end_ids
        return Hypothesis([*self.tokens, token], [*self.logprobs, told], self.total + logprob, ends)


@dataclass(slots=True)
class Child:
    """A beam that lives on."""

    parent: Sequence
    hypothesis: Hypothesis


class BeamGroup:
    """The beams of one request. ``longest``: most tokens to generate."""

    def __init__(self, search: BeamSearch, longest: int, end_ids: frozenset[int]) -> None:
        self._search = search
        self._longest = longest
        self._end_ids = end_ids
        self._complete: list[Hypothesis] = []

    def expand(self, beams: list[tuple[Sequence, Hypothesis, TokenLogprobs]]) -> list[Child]:
        """The beams after those given, each with the likeliest tokens after it; empty if the search is over."""
        options = [
            (hypothesis.then(after, rank, end_ids=self._end_ids), order, sequence)
            for order, (sequence, hypothesis, after) in enumerate(beams)
            for rank in range(1, min(2 * self._search.width, len(after.best)) + 1)
        ]
        # Equal totals: the earlier beam, then the lower id, so that the result does not depend on sorting.
        options.sort(key=lambda option: (-option[0].total, option[1], option[0].tokens[-1]))
        children: list[Child] = []
        for place, (hypothesis, _, sequence) in enumerate(options):
            if len(children) == self._search.width:
                break
            if not hypothesis.ended:
                children.append(Child(sequence, hypothesis))
            elif place < self._search.width:
                self._complete.append(hypothesis)
        if children and len(children[0].hypothesis.tokens) >= self._longest:
            self._complete += [child.hypothesis for child in children]
            return []
        return [] if self._is_decided(children) else children

    def best(self) -> list[Hypothesis]:
        """The ``width`` best hypotheses, best first."""
        return sorted(self._complete, key=self._score, reverse=True)[: self._search.width]

    def _score(self, hypothesis: Hypothesis) -> float:
        return float(hypothesis.total / len(hypothesis.tokens) ** self._search.length_penalty)

    def _is_decided(self, children: list[Child]) -> bool:
        """True if no beam can come to score as much as ``width`` hypotheses that are complete."""
        best = self.best()
        if len(best) < self._search.width:
            return not children
        penalty = self._search.length_penalty
        for child in children:
            # Totals only fall; a positive penalty rewards length, a negative one punishes it.
            length = self._longest if penalty > 0 else len(child.hypothesis.tokens) + 1
            if child.hypothesis.total / length**penalty > self._score(best[-1]):
                return False
        return True
