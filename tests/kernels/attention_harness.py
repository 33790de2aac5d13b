"""Drives the attention op alone: an executor whose program is one attention, with pages handed out in random order."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tokenmill import _native
from tokenmill.program.kv import PAGE_TOKENS, KvElement
from tokenmill.program.step import SequenceStep, lay_plan

VOCABULARY = 8


@dataclass
class Shape:
    """Everything that defines an attention layer."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    window: int | None = None
    softcap: float | None = None
    element: KvElement = KvElement.F16
    scale: float = 0.0  # 0 means 1 / sqrt(head_dim)

    def __post_init__(self) -> None:
        self.scale = self.scale or self.head_dim**-0.5


@dataclass
class Sequence:
    """Queries, keys and values of one whole sequence: ``[slots, heads * head_dim]``."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    table: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.q)


def random_sequence(shape: Shape, slots: int, seed: int, spread: float = 1.0) -> Sequence:
    rng = np.random.default_rng(seed)
    widths = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.kv_heads * shape.head_dim)
    q, k, v = (rng.standard_normal((slots, width)).astype(np.float32) for width in widths)
    return Sequence(q * np.float32(spread), k, v)


class AttentionRunner:
    """One attention layer (the last of ``layers``) over a pool of pages that start out full of NaN."""

    def __init__(
        self,
        shape: Shape,
        *,
        threads: int = 1,
        tokens: int = 1200,
        sequences: int = 8,
        context: int = 2048,
        pages: int = 160,
        layers: int = 2,
    ) -> None:
        self.shape = shape
        self.executor = _native.Executor(tokens, sequences, 1, context, VOCABULARY, _native.ThreadPool(threads))
        self.executor.add_kv_group(layers, shape.kv_heads, shape.head_dim, shape.window, shape.element, pages)
        widths = [shape.heads, shape.kv_heads, shape.kv_heads, shape.heads]
        offset, ids = 0, []
        for heads in widths:
            width = heads * shape.head_dim
            row_bytes = _native.value_row_bytes(0, width)
            ids.append(self.executor.add_value(offset, row_bytes, width, 0, False))
            offset += row_bytes * tokens
        self.q, self.k, self.v, self.out = ids
        self.executor.add_attention(
            self.q, self.k, self.v, self.out, [], layers - 1, 0, shape.heads, shape.scale, shape.softcap
        )
        self.executor.prepare()
        for plane in (0, 1):
            memory = self.executor.kv_plane(0, plane)
            memory[...] = np.nan if shape.element is KvElement.F32 else 0x7FC1  # a NaN in fp16 and in bf16
        self.free = list(np.random.default_rng(pages).permutation(pages))

    def step(self, parts: list[tuple[Sequence, int, int]]) -> list[np.ndarray]:
        """Runs slots [begin, end) of each sequence in one step; returns ``[end - begin, heads * head_dim]`` each."""
        steps = []
        for sequence, begin, end in parts:
            while len(sequence.table) * PAGE_TOKENS < end:
                sequence.table.append(int(self.free.pop()))
            steps.append(SequenceStep(np.zeros(end - begin, np.int32), begin, [sequence.table]))
        plan = lay_plan(steps, 1)
        for name in ("q", "k", "v"):
            rows = np.concatenate([getattr(sequence, name)[begin:end] for sequence, begin, end in parts])
            self.executor.value(getattr(self, name), plan.tokens)[...] = rows
        out = self.executor.value(self.out, plan.tokens)
        out[...] = np.nan
        self.executor.run(_native.PlanWords(plan.buffer), 0, 1)
        return np.split(out.copy(), np.cumsum([end - begin for _, begin, end in parts])[:-1])

    def free_before_window(self, sequence: Sequence, next_slot: int) -> None:
        """What the KV cache does behind a sliding window: pages that no later token sees are taken away."""
        assert self.shape.window is not None
        first = max(0, next_slot - self.shape.window + 1) // PAGE_TOKENS
        for index in range(first):
            if sequence.table[index] >= 0:
                for plane in (0, 1):
                    self.executor.kv_plane(0, plane)[sequence.table[index]] = (
                        np.nan if self.shape.element is KvElement.F32 else 0x7FC1
                    )
                self.free.insert(0, sequence.table[index])
                sequence.table[index] = -1

    def whole(self, sequence: Sequence, chunks: list[int] | int | None = None) -> np.ndarray:
        """All rows of a sequence, prefilled in chunks of the given sizes (the last repeats; None: all at once)."""
        sequence.table = []
        sizes = [len(sequence)] if chunks is None else [chunks] if isinstance(chunks, int) else list(chunks)
        rows, begin = [], 0
        while begin < len(sequence):
            size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
            end = min(len(sequence), begin + size)
            if self.shape.window is not None and begin:
                self.free_before_window(sequence, begin)
            rows.extend(self.step([(sequence, begin, end)]))
            begin = end
        self.free.extend(page for page in sequence.table if page >= 0)
        return np.concatenate(rows)
