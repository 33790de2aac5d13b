"""Which requests are let in: those that can be run, and no more of them than may wait."""

from __future__ import annotations

from collections import deque

from tokenmill.engine.messages import AddRequest, Failed, FailureKind
from tokenmill.sampling import SamplingError

_RECENT_ENDS = 32
_LEAST_RETRY, _MOST_RETRY = 1.0, 120.0
"""Bounds in seconds of when a refused request is told to come back."""


def problem_of(message: AddRequest, *, context: int, vocab_size: int) -> str | None:
    """What makes a request impossible to run, or None. ``context``: most tokens of a sequence."""
    length = len(message.prompt)
    if length == 0:
        return "the prompt is empty: it needs at least one token"
    if length + (message.generates) > context:
        room = " with room for one more" if message.generates else ""
        advice = "shorten it or raise max_model_len"
        return f"the prompt has {length} tokens, more than the context of {context}{room}; {advice}"
    if int(message.prompt.min()) < 0 or int(message.prompt.max()) >= vocab_size:
        return f"the prompt holds token ids outside of the vocabulary 0..{vocab_size - 1}"
    if any(not 0 <= token < vocab_size for word in message.bad_words for token in word):
        return f"bad_words hold token ids outside of the vocabulary 0..{vocab_size - 1}"
    try:
        message.params.check_vocabulary(vocab_size)
    except SamplingError as error:
        return str(error)
    return None


class WaitingBound:
    """At most ``most`` requests wait besides those that could start at once; None: any number."""

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._ends: deque[float] = deque(maxlen=_RECENT_ENDS)

    def ended(self, now: float) -> None:
        """A request ended."""
        self._ends.append(now)

    def refusal(self, request_id: int, waiting: int, seats: int) -> Failed | None:
        """What a request hears that comes while ``waiting`` others wait and ``seats`` are free; None lets it in."""
        if self._most is None or waiting < self._most + seats:
            return None
        retry_after = _LEAST_RETRY
        if len(self._ends) > 1:
            a_request = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
            retry_after = min(max(waiting * a_request, _LEAST_RETRY), _MOST_RETRY)
        error = f"{waiting} requests wait already, the most that may (max_waiting); try again later"
        return Failed(request_id, error, FailureKind.OVERLOADED, retry_after)
