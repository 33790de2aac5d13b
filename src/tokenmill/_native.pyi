"""Tokenmill's CPU kernels and program executor."""

from collections.abc import Sequence
from typing import Annotated

import numpy
from numpy.typing import NDArray


def active_isa() -> str:
    """Name of the instruction-set path in use."""

def available_isas() -> list[str]:
    """Names of the paths that this processor can run, slowest first."""

def set_active_isa(arg: str, /) -> None:
    """
    Switches the path in use, for tests and benchmarks. Not while a step runs.
    """

def usable_cpu_count() -> int:
    """Threads allowed by the affinity mask and the cgroup's CPU quota."""

class SamplerSettings:
    """One request's sampling parameters, converted once."""

    def __init__(self, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, typical_p: float = 1.0, repetition_penalty: float = 1.0, presence_penalty: float = 0.0, frequency_penalty: float = 0.0, seed: int = 0, sample_index: int = 0, min_tokens: int = 0, end_ids: Sequence[int] = [], bias_ids: Sequence[int] = [], biases: Sequence[float] = [], logprobs: int = -1) -> None: ...

class Sampler:
    """Picks tokens from rows of logits; one caller at a time."""

    def __init__(self, vocabulary: int, threads: int = 1) -> None: ...

    @property
    def scratch_bytes(self) -> int: ...

    def sample(self, logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], rows: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], settings: Sequence[SamplerSettings], tokens: Sequence[Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]], prompt_tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> tuple:
        """
        Returns (ids, status, logprobs, ranks, best_ids, best_logprobs), each with one entry per element of `rows`.

        `tokens` holds each sequence's prompt and output so far (int32). Status is 0, 1 (NaN or infinity in the row)
        or 2 (nothing may be picked). Log-probabilities are of the logits as given.
        """

    def score(self, logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], rows: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], targets: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], best: int = 0) -> tuple:
        """
        Like `sample`, for given tokens: log-probability and rank of targets[i] in row rows[i], and its best tokens.
        """

def draw_words(seed: int, sample_index: int, position: int, purpose: int = 0) -> list[int]:
    """Four random words of Philox4x32-10 for one draw."""
