"""How much work a model's forward pass is: bytes that a decoded token reads, operations that a prompt token needs.

Counted from the program and the packed sizes, not estimated: the figures behind every share of a machine's limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenmill import _native
from tokenmill.bench.roofline import Limits
from tokenmill.models import bind
from tokenmill.program.kv import PAGE_TOKENS, KvElement, KvGroupSpec
from tokenmill.program.ops import Linear, Rows
from tokenmill.weights.checkpoint import open_checkpoint


@dataclass(frozen=True, slots=True)
class ModelWork:
    """Work of one token."""

    weight_bytes: int
    """Packed bytes of all matrices that a decoded token multiplies, head included; looked-up rows do not count."""
    body_parameters: int
    """Elements of the matrices that every prompt token multiplies: all but the embedding and the head."""
    head_parameters: int
    """Elements of the matrix that only tokens that sample multiply."""
    kv_groups: tuple[KvGroupSpec, ...]
    vocab_size: int

    def kv_bytes(self, context: int) -> int:
        """Bytes of keys and values that a token with ``context`` slots before and including it reads."""
        return sum(group.page_bytes * min(context, group.window or context) // PAGE_TOKENS for group in self.kv_groups)

    def prefill_seconds(self, tokens: int, limits: Limits) -> float:
        """The least time of a prompt: weights from memory once, or products at the int8 peak; attention left out."""
        return max(self.weight_bytes / limits.memory, 2 * self.body_parameters * tokens / limits.int8)

    def decode_seconds(self, sequences: int, context: int, limits: Limits) -> float:
        """The least time of a step of ``sequences`` tokens: weights once and everyone's keys and values from memory,
        or products at the int8 peak."""
        moved = self.weight_bytes + sequences * self.kv_bytes(context)
        operations = 2 * (self.body_parameters + self.head_parameters) * sequences
        return max(moved / limits.memory, operations / limits.int8)

    def request_seconds(self, requests: int, input_tokens: int, output_tokens: int, limits: Limits) -> float:
        """The least time of ``requests`` that arrive together: all prompts, then one step for each further token."""
        step = self.decode_seconds(requests, input_tokens + output_tokens // 2, limits)
        return self.prefill_seconds(requests * input_tokens, limits) + (output_tokens - 1) * step


def model_work(path: Path, kv_element: KvElement = KvElement.F16) -> ModelWork:
    """Work of the model at ``path``. Raises ModelFileError and UnsupportedModelError."""
    with open_checkpoint(path) as checkpoint:
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        bound = bind(checkpoint.metadata, checkpoint.kind, shapes, None, checkpoint.decode)
        program = bound.program.with_kv_element(kv_element)
        weight_bytes = body = head = 0
        for op in program.ops:
            if not isinstance(op, Linear):
                continue
            n, k = program.weights[op.weight]
            kind = checkpoint.tensors[bound.sources[op.weight].tensor].tensor_type.weight_format
            assert kind is not None, "bind accepts supported types only"
            weight_bytes += _native.packed_bytes(int(kind), n, k)
            if op.out.rows is Rows.SAMPLED:
                head += n * k
            else:
                body += n * k
        return ModelWork(weight_bytes, body, head, program.kv_groups, program.vocab_size)
