"""The screen of an output head (``csrc/kernels/head_screen.h``): what a greedy step reads instead of the head."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from tokenmill import _native
from tokenmill.backends.backend import Float32, PackedMatrix
from tokenmill.program.ops import Linear, Rows, WeightFormat
from tokenmill.program.program import Program

SCREEN_FORMAT = WeightFormat.Q5_0
_LEAST_SHARE = 1 / 3
"""Of the matrices' bytes. With 31 % (SmolLM2) the gain was within noise, with 37 % (Qwen 0.5B) it was not."""


@dataclass(frozen=True, slots=True)
class HeadScreen:
    """The head's codes to 5 bits, and how far a score of them can be from the logit."""

    matrix: PackedMatrix
    bounds: Float32
    """``[vocabulary]``: times the activation's norm, the largest difference of score and logit."""

    @classmethod
    def of(cls, head: PackedMatrix, threads: int = 0) -> HeadScreen:
        """The screen of ``head``, in memory of its own. ``threads``: 0 means all usable."""
        memory = mmap.mmap(-1, _screen_bytes(head.n, head.k))
        if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux: huge pages are read a sixth faster
            with suppress(OSError):
                memory.madvise(mmap.MADV_HUGEPAGE)
        screen = np.frombuffer(memory, dtype=np.uint8)
        bounds = np.empty(head.n, dtype=np.float32)
        _native.make_screen(head.format, head.data, head.n, head.k, screen, bounds, threads)
        return cls(PackedMatrix(f"{head.name}.screen", SCREEN_FORMAT, head.n, head.k, screen), bounds)

    @property
    def nbytes(self) -> int:
        return self.matrix.data.nbytes + self.bounds.nbytes


def screenable_head(program: Program, formats: Mapping[str, WeightFormat]) -> Linear | None:
    """The op that gives the program's logits, if its matrix can be screened: nobody else reads what it assigns."""
    readers = program.readers()
    for op in program.ops:
        if (
            isinstance(op, Linear)
            and op.out.rows is Rows.SAMPLED
            and not readers[op.out.name]
            and op.bias is None
            and op.adapter is None
            and op.weight in formats
            and _native.can_screen(formats[op.weight])
        ):
            return op
    return None


def screen_pays(program: Program, formats: Mapping[str, WeightFormat]) -> bool:
    """Whether the head can be screened and is a fair part of the matrices that a decoded token multiplies."""
    head = screenable_head(program, formats)
    if head is None:
        return False

    def size(op: Linear) -> int:
        n, k = program.weights[op.weight]
        return _native.packed_bytes(formats[op.weight], n, k)

    linears = [op for op in program.ops if isinstance(op, Linear) and op.weight in formats]
    return size(head) >= _LEAST_SHARE * sum(size(op) for op in linears)


def screen_bytes(program: Program, formats: Mapping[str, WeightFormat]) -> int:
    """Bytes of the screen of the program's head; 0 if it can have none."""
    head = screenable_head(program, formats)
    if head is None:
        return 0
    n, k = program.weights[head.weight]
    return _screen_bytes(n, k) + 4 * n


def _screen_bytes(n: int, k: int) -> int:
    return _native.packed_bytes(SCREEN_FORMAT, n, k)
