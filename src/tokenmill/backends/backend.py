"""What a backend is: something that runs a program for one step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tokenmill.program.kv import KvGroupSpec
from tokenmill.program.ops import WeightFormat
from tokenmill.program.step import StepLimits, StepPlan

__all__ = ["Backend", "Float32", "ModelWeights", "PackedMatrix", "StepLimits", "UInt8"]

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A weight matrix ``[n, k]`` in the packed layout of ``csrc/kernels/linear.h``.

    ``data`` is a flat, 64-byte aligned array (often a view of the mapped build cache).
    """

    name: str
    format: WeightFormat
    n: int
    k: int
    data: UInt8


class ModelWeights(Protocol):
    """The weights of one program by the program's names."""

    def matrix(self, name: str) -> PackedMatrix:
        """The packed matrix ``name`` (operand of Linear or Embed). Raises KeyError."""

    def vector(self, name: str) -> Float32:
        """The vector ``name`` (norm gains, biases) in fp32. Raises KeyError."""

    def decoded(self, name: str) -> Float32:
        """Matrix ``name`` as fp32 ``[n, k]``, decoded from the checkpoint on each call (the oracle's road)."""

    def close(self) -> None:
        """Drops mappings."""


class Backend(Protocol):
    """Runs a program, step by step, over a KV cache that it holds."""

    kv_groups: tuple[KvGroupSpec, ...]
    limits: StepLimits

    def scratch_bytes(self) -> int:
        """Bytes of activation buffers and per-thread scratch, as allocated."""

    def kv_bytes(self) -> int:
        """Bytes of the KV pages, as allocated."""

    def run(
        self,
        plan: StepPlan,
        first_op: int = 0,
        last_op: int | None = None,
        outputs: Iterable[str] = ("logits",),
    ) -> Mapping[str, Float32]:
        """Executes ops [first_op, last_op) and returns the named values.

        Without ``last_op`` as far as the outputs need, so that hidden rows cost no logits, and in any case all that
        write keys and values; the whole program if no output is named. Arrays are ``[rows, width]`` and valid until
        the next call. Values that a later range reads stay alive between calls for the same plan. Raises KeyError for
        an unknown value and ValueError if the plan exceeds the limits.
        """

    def copy_page(self, group: int, from_page: int, to_page: int) -> None:
        """Copies a KV page, all layers and planes. Raises ValueError for a page that does not exist."""

    def read_page(self, group: int, page: int) -> tuple[UInt8, ...]:
        """The bytes of a KV page, one flat array for each plane; valid until the next call."""

    def write_page(self, group: int, page: int, planes: Sequence[UInt8]) -> None:
        """Puts back what :meth:`read_page` gave, into any page of the same group."""

    def close(self) -> None:
        """Frees buffers and threads."""
