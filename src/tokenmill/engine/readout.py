"""What a step's results say: the next tokens, log-probabilities of prompts, embeddings.

Rows of logits are those that the plan named as sampled; hidden rows are all of the step.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np

from tokenmill import _native
from tokenmill._native import Samples
from tokenmill.backends.backend import Float32
from tokenmill.engine.messages import Embedded, PromptScored, TokenLogprobs
from tokenmill.engine.sequence import Sequence

NOT_FINITE = 1
NOTHING_ALLOWED = 2


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, counted among those that were looked at, and why: ``NOT_FINITE`` or
    ``NOTHING_ALLOWED``."""

    row: int
    status: int


class Readout:
    """Reads rows of ``vocab_size`` logits on the threads of ``pool``; one caller at a time."""

    def __init__(self, vocab_size: int, pool: _native.ThreadPool) -> None:
        self._sampler = _native.Sampler(vocab_size, pool)

    def scratch_bytes(self) -> int:
        """Bytes of working memory."""
        return self._sampler.scratch_bytes

    def pick(
        self, logits: Float32, rows: list[int], sequences: Items[Sequence], *, masked: bool
    ) -> tuple[list[int], Samples | None]:
        """The token after each of ``sequences``, from row ``rows[i]``; ``masked`` if some have grammars.

        And the rest that was found, if there is more: a row that cannot be used, whose token is -1; log-probabilities.
        """
        found = self._sampler.pick(
            logits,
            rows,
            [sequence.history for sequence in sequences],
            [None if s.grammar is None else s.grammar.mask for s in sequences] if masked else [],
        )
        return (found, None) if isinstance(found, list) else (found.ids, found)

    def score(self, sequence: Sequence, logits: Float32, rows: range) -> PromptScored | BadRow:
        """Log-probabilities of the next tokens of the prompt."""
        first = sequence.scored
        targets = sequence.history.copy(first, first + len(rows)).tolist()
        scores = self._sampler.score(logits, list(rows), targets, sequence.request.params.prompt_logprobs or 0)
        bad = next((row for row, status in enumerate(scores.status) if status), None)
        if bad is not None:
            return BadRow(bad, scores.status[bad])
        sequence.scored += len(rows)
        logprobs = tuple(token_logprobs(scores, row) for row in range(len(rows)))
        return PromptScored(sequence.request.request_id, first, logprobs)

    def pool(self, sequence: Sequence, hidden: Float32) -> Embedded | BadRow | None:
        """The embedding, with the rows ``[count, hidden]`` of the sequence that were computed last; None while there
        are more to come. Those that were computed again, after a preemption, are left out."""
        assert sequence.pool is not None
        skip = max(sequence.pool.wanted(sequence.prompt_length).start - (sequence.computed - len(hidden)), 0)
        wanted = hidden[skip:]
        bad = np.flatnonzero(~np.isfinite(wanted).all(axis=1))
        if len(bad):
            return BadRow(skip + int(bad[0]), NOT_FINITE)
        sequence.pool.take(wanted)
        return None if sequence.remaining else Embedded(sequence.request.request_id, sequence.pool.vector())


def token_logprobs(samples: Samples | None, row: int) -> TokenLogprobs:
    """What a sampler found about the log-probabilities of one row, for which they were wanted."""
    assert samples is not None
    logprob, rank, best = samples.logprobs(row)
    return TokenLogprobs(logprob, rank, tuple(best))
