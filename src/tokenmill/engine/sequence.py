"""One output in the making: its tokens, how far its KV is computed, and what it still wants from the prompt."""

from __future__ import annotations

from concurrent.futures import Future

from tokenmill._native import TokenHistory
from tokenmill.engine.grammar import Grammar
from tokenmill.engine.kv_cache import SequencePages
from tokenmill.engine.messages import AddRequest, Timings
from tokenmill.engine.policies import Rank
from tokenmill.engine.pooling import PooledRows
from tokenmill.engine.prefix_cache import PrefixNode
from tokenmill.engine.swap import SwappedPages
from tokenmill.program.step import Int32
from tokenmill.sampling import sampler_settings, takes_best


class Sequence:
    """State of output ``index`` of a request. A preempted sequence keeps everything but its pages."""

    __slots__ = (
        "_settings",
        "awaits",
        "cached_tokens",
        "compiling",
        "computed",
        "end_ids",
        "first_token",
        "grammar",
        "history",
        "index",
        "last_token",
        "length",
        "pages",
        "parked",
        "pool",
        "preemptions",
        "prompt_length",
        "rank",
        "request",
        "scored",
        "started",
        "swapped",
        "takes_best",
    )

    def __init__(self, request: AddRequest, index: int, rank: Rank, end_ids: frozenset[int]) -> None:
        self.request = request
        self.index = index
        self.rank = rank
        """Place in the queue: smaller goes first."""
        self.end_ids = end_ids
        self.parked = False
        """True for a beam that knows its next tokens and waits for its siblings: it must not run."""
        self.grammar: Grammar | None = None
        """What it must look like, once that is compiled."""
        self.compiling: Future[Grammar] | None = None
        """While this is set the sequence cannot sample."""
        self.prompt_length = len(request.prompt)
        settings = sampler_settings(request.params, sample_index=index, end_ids=end_ids, bad_words=request.bad_words)
        self.history = TokenHistory(settings, request.prompt, self.prompt_length)
        """Prompt and output, for the sampler too."""
        self._settings = settings
        self.takes_best = (
            request.beam is None and request.pooling is None and not self._scores and takes_best(request.params)
        )
        """True if nothing of its rows of logits is ever looked at but the largest and its place."""
        self.length = self.prompt_length
        """Tokens, prompt and output."""
        self.last_token = int(request.prompt[-1])
        self.pages: SequencePages | None = None
        self.awaits: PrefixNode | None = None
        """The page that another sequence was about to compute when this one last asked to start."""
        self.swapped: SwappedPages | None = None
        """Its pages, if a preemption wrote them to a file."""
        self.computed = 0
        """Leading slots whose keys and values are in the cache."""
        self.scored = 1 if self._scores else self.prompt_length
        """Leading prompt tokens whose log-probability is known or not wanted; the first token has none."""
        self.pool = None if request.pooling is None else PooledRows(request.pooling)
        self.cached_tokens = 0
        self.preemptions = 0
        self.started: float | None = None
        self.first_token: float | None = None

    @property
    def tokens(self) -> Int32:
        """A copy of prompt and output."""
        return self.history.copy(0, self.length)

    @property
    def output_length(self) -> int:
        return self.length - self.prompt_length

    @property
    def goal(self) -> int:
        """Slots that must be computed before the sequence samples or, if it only scores, is done."""
        return self.prompt_length - 1 if self.request.score_only else self.length

    @property
    def remaining(self) -> int:
        """Tokens that can run now."""
        return self.goal - self.computed

    @property
    def decodes(self) -> bool:
        """True if all that is left to run is the token sampled last."""
        return self.length - self.computed == 1 and self.length > self.prompt_length

    @property
    def wanted_rows(self) -> range:
        """Rows of the prompt whose logits are still wanted, for log-probabilities: row p gives that of token p + 1."""
        return range(self.scored - 1, self.prompt_length - 1)

    @property
    def reusable(self) -> int:
        """Leading tokens that may come from the prefix cache: those before the first row that is still wanted, of all
        rows for log-probabilities of the prompt or a mean of it, of the last one for all else."""
        wanted = self.wanted_rows if self.pool is None else self.pool.wanted(self.prompt_length)
        return wanted.start if wanted else self.length - 1

    def longest(self, context: int) -> int:
        """Most tokens that it can come to in a context of so many."""
        most = self.request.params.max_tokens if self.request.generates else 0
        return context if most is None else min(self.prompt_length + most, context)

    def twin(self, index: int) -> Sequence:
        """Another sequence with the same tokens, without pages, that ranks as output ``index`` of the request."""
        other = Sequence(self.request, index, (*self.rank[:2], index), self.end_ids)
        other.history = TokenHistory(other._settings, self.tokens, self.prompt_length)
        other.length, other.last_token = self.length, self.last_token
        other.scored, other.cached_tokens, other.started = self.scored, self.cached_tokens, self.started
        other.first_token = self.first_token
        return other

    def append(self, token: int) -> None:
        self.history.append(token)
        self.last_token = token
        self.length += 1

    def timings(self, finished: float) -> Timings:
        return Timings(
            arrival=self.request.arrival,
            started=finished if self.started is None else self.started,
            first_token=finished if self.first_token is None else self.first_token,
            finished=finished,
            cached_tokens=self.cached_tokens,
            preemptions=self.preemptions,
        )

    @property
    def _scores(self) -> bool:
        return self.index == 0 and (self.request.score_only or self.request.params.prompt_logprobs is not None)
