"""A backend whose "model" is a hash of the context, read back through the paged tables.

Every step writes each token's id and slot into its page and then derives the row's logits from all (token, slot) pairs
that the row can see, found through the page table as the attention kernel would find keys. A page given away too early,
shared while being written, or a table entry that is wrong changes the logits, and with them the tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from tokenmill.backends.backend import Float32, StepLimits, UInt8
from tokenmill.program.hidden_rows import HIDDEN_ROWS
from tokenmill.program.kv import PAGE_TOKENS, KvGroupSpec
from tokenmill.program.step import StepPlan


class ToyBackend:
    def __init__(
        self, groups: tuple[KvGroupSpec, ...], kv_pages: list[int], limits: StepLimits, vocab_size: int = 101
    ) -> None:
        self.kv_groups = groups
        self.limits = limits
        self.vocab_size = vocab_size
        # -1: never written. Stale contents of a reused page are left in place, as in a real cache.
        self.pages = [np.full((count, PAGE_TOKENS, 2), -1, dtype=np.int64) for count in kv_pages]
        self.steps: list[StepPlan] = []
        self.outputs: list[tuple[str, ...]] = []
        """What each step was asked for."""
        self.poisoned: set[int] = set()
        """Token ids whose rows give NaN."""
        self.fails: Exception | None = None
        self.gate = threading.Event()
        """While clear, a step waits before it runs."""
        self.gate.set()

    def scratch_bytes(self) -> int:
        return 0

    def kv_bytes(self) -> int:
        return sum(pages.nbytes for pages in self.pages)

    def close(self) -> None:
        pass

    def copy_page(self, group: int, from_page: int, to_page: int) -> None:
        self.pages[group][to_page] = self.pages[group][from_page]

    def read_page(self, group: int, page: int) -> tuple[UInt8, ...]:
        return (self.pages[group][page].reshape(-1).view(np.uint8),)

    def write_page(self, group: int, page: int, planes: Sequence[UInt8]) -> None:
        self.pages[group][page].reshape(-1).view(np.uint8)[:] = planes[0]

    def diagnose(self, plan: StepPlan, row: int) -> str | None:
        return f"toy.row of token {plan.token_ids[row]}"

    def run(
        self, plan: StepPlan, first_op: int = 0, last_op: int | None = None, outputs: Iterable[str] = ("logits",)
    ) -> Mapping[str, Float32]:
        self.gate.wait()
        if self.fails is not None:
            raise self.fails
        assert plan.tokens <= self.limits.tokens
        assert plan.sequences <= self.limits.sequences
        assert plan.sampled <= self.limits.sampled
        self.steps.append(plan)
        tables = plan.page_tables
        self.outputs.append(tuple(outputs))
        looked_at = set(range(plan.tokens) if HIDDEN_ROWS in self.outputs[-1] else plan.sampled_rows.tolist())
        rows: dict[int, Float32] = {}
        for sequence in range(plan.sequences):
            begin, end = int(plan.row_starts[sequence]), int(plan.row_starts[sequence + 1])
            for row in range(begin, end):  # all writes of a sequence come before its reads, as in a chunk of attention
                slot = int(plan.slots[row])
                for group, pages in enumerate(self.pages):
                    page = int(tables[group, sequence, slot // PAGE_TOKENS])
                    assert page >= 0, "a token is written to a page that was given back"
                    pages[page, slot % PAGE_TOKENS] = (plan.token_ids[row], slot)
        for sequence in range(plan.sequences):
            begin, end = int(plan.row_starts[sequence]), int(plan.row_starts[sequence + 1])
            for row in range(begin, end):
                if row in looked_at:
                    rows[row] = self._logits(plan, tables, sequence, int(plan.slots[row]), int(plan.token_ids[row]))
        of_rows = {"logits": plan.sampled_rows.tolist(), HIDDEN_ROWS: sorted(rows)}
        widths = {"logits": self.vocab_size, HIDDEN_ROWS: 8}
        return {
            name: np.array([rows[row][: widths[name]] for row in of_rows[name]], np.float32).reshape(-1, widths[name])
            for name in self.outputs[-1]
        }

    def _logits(self, plan: StepPlan, tables: np.ndarray, sequence: int, slot: int, token: int) -> Float32:
        if token in self.poisoned:
            return np.full(self.vocab_size, np.nan, dtype=np.float32)
        state = 17
        for group, (spec, pages) in enumerate(zip(self.kv_groups, self.pages, strict=True)):
            first = 0 if spec.window is None else max(0, slot - spec.window + 1)
            for visible in range(first, slot + 1):
                page = int(tables[group, sequence, visible // PAGE_TOKENS])
                assert page >= 0, f"slot {slot} sees slot {visible}, whose page was given back"
                written, where = pages[page, visible % PAGE_TOKENS].tolist()
                assert where == visible, f"slot {visible} holds what was written for slot {where}"
                state = (state * 6364136223846793005 + written * 1442695040888963407 + group + 1) % 2**64
        return toy_logits(state, self.vocab_size)


def toy_logits(state: int, vocab_size: int) -> Float32:
    """Logits in -3..3 from a hash."""
    ids = np.arange(vocab_size, dtype=np.uint64)
    mixed = (ids + np.uint64(state)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    return ((mixed % np.uint64(60001)).astype(np.float32) / 10000 - 3).astype(np.float32)


def expected_greedy(prompt: list[int], count: int, groups: tuple[KvGroupSpec, ...], vocab_size: int = 101) -> list[int]:
    """What a request alone must give: the toy model written without any cache."""
    tokens = list(prompt)
    for _ in range(count):
        state = 17
        slot = len(tokens) - 1
        for group, spec in enumerate(groups):
            first = 0 if spec.window is None else max(0, slot - spec.window + 1)
            for token in tokens[first:]:
                state = (state * 6364136223846793005 + token * 1442695040888963407 + group + 1) % 2**64
        tokens.append(int(np.argmax(toy_logits(state, vocab_size))))
    return tokens[len(prompt) :]
