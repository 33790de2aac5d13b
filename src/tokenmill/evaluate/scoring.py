"""Perplexity: how surprised a model is by a text, in windows with a stride.

Two established ways to join windows. *Sliding*: a window every ``stride`` tokens, each token scored once, in the first
window that holds it, so all but the first have at least ``window - stride`` tokens before them (the recipe of the
transformers documentation). *llama.cpp*: windows side by side, each begun with BOS in place of its first token where
the model wants one, and only the second half of each scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from tokenmill.backends.backend import Backend
from tokenmill.evaluate.kl import LOG_ROWS, Float32, log_softmax
from tokenmill.evaluate.logits import logits_by_position
from tokenmill.evaluate.paired import Interval, mean_interval
from tokenmill.evaluate.result_log import ResultLog
from tokenmill.evaluate.text import TextError

Float64 = npt.NDArray[np.float64]


class Windowing(Enum):
    SLIDING = "sliding"
    LLAMA_CPP = "llama.cpp"


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens to run as one sequence; the predictions of tokens ``scored`` and following count."""

    token_ids: tuple[int, ...]
    scored: int

    def __post_init__(self) -> None:
        if not 1 <= self.scored <= len(self.token_ids):
            raise ValueError("a window scores from its second token on: nothing predicts the first")


@dataclass(frozen=True, slots=True)
class Perplexity:
    """``exp`` of the mean negative log-likelihood per token, with an interval over blocks of one stride."""

    tokens: int
    perplexity: float
    nll: Interval

    @classmethod
    def of(cls, nll: Float64, block: int) -> Perplexity:
        """From the tokens' negative log-likelihoods, in nats."""
        interval = mean_interval(nll, block=block)
        return cls(len(nll), math.exp(interval.value), interval)


def cut_windows(
    token_ids: Sequence[int], window: int, stride: int, windowing: Windowing, bos: int | None
) -> list[Window]:
    """The windows of a text. ``bos`` goes before a sliding window's text where the model wants one.

    Raises TextError if the text is shorter than one window (llama.cpp) or has fewer than two tokens, ValueError for a
    stride that leaves gaps.
    """
    if not 1 <= stride < window:
        raise ValueError(f"stride is {stride}; it must be 1 to {window - 1}, less than the window")
    if windowing is Windowing.LLAMA_CPP:
        whole = [tuple(token_ids[i : i + window]) for i in range(0, len(token_ids) - window + 1, window)]
        if not whole:
            raise TextError(f"the text has {len(token_ids)} tokens, less than one window of {window}")
        if bos is not None:
            whole = [(bos, *tokens[1:]) for tokens in whole]
        return [Window(tokens, window // 2 + 1) for tokens in whole]
    if len(token_ids) < 2:
        raise TextError("the text has fewer than two tokens: there is nothing to predict")
    prefix = () if bos is None else (bos,)
    windows, scored_to, begin = [], 0, 0
    while scored_to < len(token_ids):
        end = min(begin + window - len(prefix), len(token_ids))
        first = max(len(prefix) + scored_to - begin, 1)
        windows.append(Window((*prefix, *token_ids[begin:end]), first))
        scored_to, begin = end, begin + stride
    return windows


def score_window(backend: Backend, window: Window) -> Float64:
    """Negative log-likelihood in nats of the window's scored tokens, in their order."""
    return score_rows(window, (rows for _, rows in logits_by_position(backend, window.token_ids)))


def score_rows(window: Window, blocks: Iterable[Float32]) -> Float64:
    """:func:`score_window` from the logits of all the window's positions, in blocks of rows."""
    nll, position = [], 0
    for block in blocks:
        for begin in range(0, len(block), LOG_ROWS):
            rows = block[begin : begin + LOG_ROWS]
            # Row i predicts token i + 1.
            first, last = max(position, window.scored - 1), min(position + len(rows), len(window.token_ids) - 1)
            if first < last:
                logs = log_softmax(rows[first - position : last - position])
                nll.append(-logs[np.arange(last - first), window.token_ids[first + 1 : last + 1]])
            position += len(rows)
    return np.concatenate(nll) if nll else np.empty(0)


def score_windows(
    backend: Backend, windows: Sequence[Window], log: ResultLog, on_window: Callable[[int], None] = lambda _: None
) -> Float64:
    """:func:`score_window` of all windows, those in ``log`` excepted, one after the other."""
    scores = []
    for number, window in enumerate(windows):
        if str(number) not in log.done:
            log.add(str(number), {"nll": score_window(backend, window).tolist()})
        scores.append(np.asarray(log.done[str(number)]["nll"], dtype=np.float64))
        on_window(number)
    return np.concatenate(scores)
