"""What goes into the engine and what comes out: plain data, so that it may cross a thread or a process."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from tokenmill.backends.backend import Float32
from tokenmill.errors import TokenmillError
from tokenmill.program.step import Int32
from tokenmill.sampling import MAX_BEST_LOGPROBS, SamplingError, SamplingParams

MAX_BEAM_WIDTH = MAX_BEST_LOGPROBS // 2


class EngineError(TokenmillError):
    """A request could not be finished; the message says why."""


class EngineDeadError(EngineError):
    """The engine stopped because of an error and serves no request any more."""


class EngineOverloadedError(EngineError):
    """The request was refused because too many wait already. ``retry_after``: seconds after which it may fit."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class FailureKind(Enum):
    REQUEST = "request"
    """Something about the request itself: the same again would fail again."""
    MODEL = "model"
    """The model gave no usable logits."""
    OVERLOADED = "overloaded"
    """Refused unseen: too many requests wait."""


class FinishReason(Enum):
    STOP = "stop"
    """An end token, a stop token or a stop string."""
    LENGTH = "length"
    """max_tokens, or the end of the context."""
    ABORT = "abort"
    """Cancelled."""


class Pooling(Enum):
    """How the rows of a prompt become one vector."""

    LAST = "last"
    """The last token's row, which has seen all others."""
    MEAN = "mean"
    """The mean of all rows."""


@dataclass(frozen=True, slots=True)
class BeamSearch:
    """Keep the ``width`` likeliest beginnings at every token, and return the ``width`` best outputs.

    Raises SamplingError.
    """

    width: int
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.width, bool) or not isinstance(self.width, int) or not 1 <= self.width <= MAX_BEAM_WIDTH:
            raise SamplingError(f"beam_width is {self.width!r}; it must be a whole number, 1 to {MAX_BEAM_WIDTH}")
        if isinstance(self.length_penalty, bool | str) or not -10 <= self.length_penalty <= 10:
            raise SamplingError(f"length_penalty is {self.length_penalty!r}; it must be a number, -10 to 10")

    def params(self, *, logprobs: int | None = None, **given: Any) -> SamplingParams:
        """The sampling parameters of such a search: two likely tokens for each beam, or ``logprobs``."""
        return SamplingParams(n=self.width, temperature=0, logprobs=max(2 * self.width, logprobs or 0), **given)


@dataclass(frozen=True, slots=True)
class AddRequest:
    """Generate ``params.n`` outputs for a prompt, or with ``score_only`` just the prompt's log-probabilities, or with
    ``pooling`` just its embedding.

    ``params.seed`` is set. ``eos_ids`` are the model's end tokens.
    """

    request_id: int
    prompt: Int32
    params: SamplingParams
    eos_ids: frozenset[int] = frozenset()
    score_only: bool = False
    pooling: Pooling | None = None
    arrival: float = 0.0
    """``time.monotonic()`` at the front door."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences of ``params.bad_words``: :func:`tokenmill.sampling.bad_word_ids`."""
    beam: BeamSearch | None = None
    """If set, ``params`` are its :meth:`BeamSearch.params`, and the outputs come all at once when the search is over,
    best first."""

    @property
    def generates(self) -> bool:
        """False if only the prompt is of interest."""
        return not self.score_only and self.pooling is None

    @property
    def outputs(self) -> int:
        """How many end, each with a :class:`Finished`."""
        return self.params.n if self.generates else 1


@dataclass(frozen=True, slots=True)
class AbortRequest:
    """Stop a request (one output of it, or all) and return its pages. Unknown ids are ignored: it may have finished."""

    request_id: int
    index: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of one token and of the likeliest ones at its place, of the logits as the model gives them."""

    logprob: float
    rank: int
    """1 is the most likely."""
    best: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), most likely first."""


@dataclass(frozen=True, slots=True)
class Timings:
    """When things happened, ``time.monotonic()`` seconds, and how much of the prompt came from the cache."""

    arrival: float
    started: float
    first_token: float
    finished: float
    cached_tokens: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Log-probabilities of the prompt's tokens ``first`` and following, each given the tokens before it."""

    request_id: int
    first: int
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Embedded:
    """The prompt's embedding: its pooled rows of the final norm, ``[hidden]``, of Euclidean length 1."""

    request_id: int
    vector: Float32


@dataclass(slots=True)
class TokenOutput:
    """One generated token of output ``index``."""

    request_id: int
    index: int
    token_id: int
    logprobs: TokenLogprobs | None = None
    stops: bool = False
    """True for an end or stop token, which ends the output and is not part of its text."""


@dataclass(frozen=True, slots=True)
class Finished:
    """Output ``index`` is complete; its pages are back. ``stop_token`` is the token that ended it, if one did."""

    request_id: int
    index: int
    reason: FinishReason
    timings: Timings
    stop_token: int | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended with an error, all outputs of it; its pages are back."""

    request_id: int
    error: str
    kind: FailureKind = FailureKind.REQUEST
    retry_after: float | None = None
    """Seconds after which a request that was refused as one too many may fit."""


Message = AddRequest | AbortRequest
Event = PromptScored | Embedded | TokenOutput | Finished | Failed
