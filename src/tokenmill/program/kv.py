"""What the KV cache of a program looks like: groups of layers, pages, and the arrangement inside a page.

A page holds ``PAGE_TOKENS`` consecutive slots of one sequence for all layers and KV heads of a group. Element (token
t, dimension d) of a page lies, for one layer and head, in elements of two or four bytes, at

* K plane: ``[t // 16][d][t % 16]`` (one vector register holds one dimension of 16 tokens),
* V plane: ``[t][d]``.

A plane of a group is one array ``[pages, layers, kv_heads, PAGE_TOKENS * head_dim]``. Kernels get base and strides of
each plane and never assume that V follows K.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

PAGE_TOKENS = 32


class KvElement(IntEnum):
    """Element type of keys and values. Numbers shared with ``csrc/kernels/attention.h``."""

    F16 = 1
    BF16 = 2
    F32 = 3


@dataclass(frozen=True, slots=True)
class KvGroupSpec:
    """Layers that share page table, window and format."""

    layers: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    element: KvElement = KvElement.F16

    @property
    def plane_page_bytes(self) -> int:
        """Bytes that one page takes in the K plane (and in the V plane)."""
        element_bytes = 4 if self.element is KvElement.F32 else 2
        return self.layers * self.kv_heads * PAGE_TOKENS * self.head_dim * element_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, all planes."""
        return 2 * self.plane_page_bytes
