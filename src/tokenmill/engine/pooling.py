"""Hidden rows of a prompt pooled into one vector, its embedding."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tokenmill.backends.backend import Float32
from tokenmill.engine.messages import Pooling


class PooledRows:
    """Takes the rows of one sequence as steps compute them, in any number of parts, and keeps one row.

    Rows are added one after the other in fp64, so that the parts in which they come do not show in the result.
    """

    __slots__ = ("_pooled", "_pooling", "_rows")

    def __init__(self, pooling: Pooling) -> None:
        self._pooling = pooling
        self._pooled: npt.NDArray[np.float64] | float = 0.0
        self._rows = 0

    def wanted(self, length: int) -> range:
        """Rows of a sequence of ``length`` that are still to be taken."""
        return range(self._rows if self._pooling is Pooling.MEAN else length - 1, length)

    def take(self, rows: Float32) -> None:
        """The next of the wanted rows, ``[count, hidden]``."""
        self._rows += len(rows)
        for row in rows.astype(np.float64):
            self._pooled = self._pooled + row

    def vector(self) -> Float32:
        """The embedding, ``[hidden]``, of Euclidean length 1; a mean of zero stays zero."""
        pooled = np.asarray(self._pooled)
        # The mean points where the sum does.
        return (pooled / (np.sqrt(np.square(pooled).sum()) or 1.0)).astype(np.float32)
