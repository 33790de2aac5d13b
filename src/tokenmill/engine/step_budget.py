"""What one step may hold: tokens, rows of logits, and time.

Decodes are planned first and always fit. Prompts get the time that is left of the step's target, by what
:class:`tokenmill.engine.step_time.StepTimeModel` knows. Cutting a prompt costs time: each of its chunks reads the
weights and the context again, beside other requests' tokens. Where that takes a large share of the target, steps grow,
as far as hardly one in a hundred takes more than twice the target: the more evenly a machine runs, the further. And a
step may always take twice as long as one in which everybody at hand decodes: prompts go on where decodes alone use up
the target, and a crowd that arrives at once is soon decoding together, instead of a few at a time in many more steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenmill.engine.sequence import Sequence
from tokenmill.engine.step_time import StepTimeModel, StepWork

MAX_SCORED_ROWS = 64
"""Rows of logits that a step computes for log-probabilities of prompts."""

_LEAST_PROMPT = 8
"""Tokens that the first prompt of a step gets whatever the time: no estimate can starve it."""
_OVERHEAD = 0.25
"""Share of a step that decodes and reading the context again may take before the step grows."""
_LONGEST = 1.8
"""Targets that nineteen in twenty of such steps stay below, so that hardly one in a hundred takes more than two."""
_CROWD = 2
"""Times that a step in which everybody decodes fits into the longest one."""
_ALONE = 4.0
"""While nothing decodes nobody waits for a token, and steps of this many targets read the weights less often."""


@dataclass(slots=True)
class Chunk:
    """Tokens computed, ..., computed + count - 1 of ``sequence``."""

    sequence: Sequence
    count: int
    scored: int
    """Rows skip .. skip + scored - 1 of the chunk are looked at for what the request wants of its prompt."""
    skip: int
    samples: bool
    """True if the chunk's last row picks a token."""
    decodes: bool
    """True if the chunk is the token sampled last and nothing else."""


class StepBudget:
    """A step that is being planned: ``chunks`` by their sequences, and what is left for more."""

    def __init__(self, tokens: int, rows: int, target: float | None, model: StepTimeModel) -> None:
        """``target``: seconds that the step should take; None bounds it by tokens only."""
        self.chunks: dict[Sequence, Chunk] = {}
        self.tokens = tokens
        self.rows = rows
        self.scored = MAX_SCORED_ROWS
        self.work = StepWork()
        self.everyone = StepWork()
        """The step in which all that are at hand decode; to be set before prompts are planned."""
        self._target = target
        self._model = model

    def prompt_tokens(self, computed: int) -> int:
        """Tokens that a prompt may get from slot ``computed`` on."""
        if self._target is None:
            return self.tokens
        if self.work.decoded:
            decodes = self._model.seconds(StepWork(self.work.decoded, self.work.decoded_slots))
            overhead = decodes + self._model.chunk_seconds(computed)
            longest = max(_LONGEST * self._target - self._model.delay, self._target)
            seconds = min(max(self._target, overhead / _OVERHEAD), longest)
        else:
            seconds = _ALONE * self._target
        left = max(seconds, _CROWD * self._model.seconds(self.everyone)) - self._model.seconds(self.work)
        count = self._model.prompt_tokens(self.work, computed, left)
        if self.work.prompt_tokens == 0:
            count = max(count, _LEAST_PROMPT)
        return min(count, self.tokens)

    def decode(self, sequence: Sequence) -> None:
        """Adds the token that the sequence sampled last."""
        self.chunks[sequence] = Chunk(sequence, 1, 0, 0, True, True)
        self.tokens -= 1
        self.rows -= 1
        self.work.decoded += 1
        self.work.decoded_slots += sequence.length

    def spend(self, chunk: Chunk) -> None:
        self.chunks[chunk.sequence] = chunk
        self._count(chunk, 1)

    def refund(self, sequence: Sequence) -> None:
        """The sequence is not in the step after all, if it was."""
        chunk = self.chunks.pop(sequence, None)
        if chunk is not None:
            self._count(chunk, -1)

    def _count(self, chunk: Chunk, sign: int) -> None:
        self.tokens -= sign * chunk.count
        self.rows -= sign * (chunk.scored + chunk.samples)
        self.scored -= sign * chunk.scored
        if chunk.decodes:
            self.work.add_decode(chunk.sequence.computed, sign)
        else:
            self.work.add_prompt(chunk.sequence.computed, chunk.count, sign)
