"""What a checkpoint holds, in numbers: for ``tokenmill show``."""

from __future__ import annotations

from dataclasses import dataclass

from tokenmill.weights.checkpoint import Checkpoint, TensorInfo
from tokenmill.weights.formats import TensorType


@dataclass(frozen=True, slots=True)
class TypeShare:
    """The tensors of one type, taken together."""

    tensor_type: TensorType
    tensors: int
    values: int
    nbytes: int

    @property
    def bits_per_value(self) -> float:
        """Bits that a value takes, scales and minimums included."""
        return 8 * self.nbytes / self.values if self.values else 0.0


@dataclass(frozen=True, slots=True)
class CheckpointSummary:
    """Parameters and bytes of a checkpoint, by tensor type (most bytes first) and by tensor (in the file's order)."""

    parameters: int
    nbytes: int
    types: tuple[TypeShare, ...]
    tensors: tuple[TensorInfo, ...]
    largest: TensorInfo | None


def summarize(checkpoint: Checkpoint) -> CheckpointSummary:
    """Counts without reading tensor data."""
    tensors = tuple(checkpoint.tensors.values())
    types = []
    for tensor_type in sorted({info.tensor_type for info in tensors}):
        members = [info for info in tensors if info.tensor_type is tensor_type]
        values, nbytes = sum(info.values for info in members), sum(info.nbytes for info in members)
        types.append(TypeShare(tensor_type, len(members), values, nbytes))
    return CheckpointSummary(
        parameters=sum(info.values for info in tensors),
        nbytes=sum(info.nbytes for info in tensors),
        types=tuple(sorted(types, key=lambda share: -share.nbytes)),
        tensors=tensors,
        largest=max(tensors, key=lambda info: info.nbytes, default=None),
    )
