"""Logits at every position of a text, from a backend, a bounded number of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from tokenmill.backends.backend import Backend
from tokenmill.program.kv import PAGE_TOKENS
from tokenmill.program.step import SequenceStep, lay_plan

Float32 = npt.NDArray[np.float32]


def logits_by_position(backend: Backend, token_ids: Sequence[int]) -> Iterator[tuple[int, Float32]]:
    """Runs ``token_ids`` as one new sequence and yields ``(first position, logits [rows, vocabulary])``.

    Rows follow the text's order; row i of the text holds the prediction of token i + 1. A yielded array is valid until
    the next one. At most ``backend.limits.sampled`` rows exist at a time. The backend's pages 0, 1, 2, ... are used
    whatever they held. Raises ValueError if the text is longer than the backend's context.
    """
    if len(token_ids) > backend.limits.context:
        raise ValueError(f"the text has {len(token_ids)} tokens, the backend's context {backend.limits.context}")
    pages = list(range(-(-len(token_ids) // PAGE_TOKENS)))
    tables = [pages] * len(backend.kv_groups)
    rows = min(backend.limits.tokens, backend.limits.sampled)
    for start in range(0, len(token_ids), rows):
        chunk = token_ids[start : start + rows]
        plan = lay_plan([SequenceStep(chunk, start, tables, range(len(chunk)))], len(backend.kv_groups))
        yield start, backend.run(plan)["logits"]
