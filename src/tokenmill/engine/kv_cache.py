"""Who holds which KV page.

Each KV group has a pool of pages. A page is used (some sequence's table names it), cached (nobody does, but the prefix
tree knows its contents) or free; free + used + cached = total, always. Cached pages are given away least recently used
first, and a sequence returns its pages last first, so that the beginning of a prompt outlives its end. A page that a
sequence is still filling is never shared, so nothing is ever copied.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from tokenmill.engine.prefix_cache import PrefixNode, PrefixTree, block_key
from tokenmill.program.kv import PAGE_TOKENS, KvGroupSpec
from tokenmill.program.step import Int32


@dataclass(frozen=True, slots=True)
class PoolUsage:
    """Pages of one KV group."""

    free: int
    used: int
    cached: int
    total: int


class SequencePages:
    """One sequence's page tables. Made by :meth:`KvCache.open`, ended by :meth:`KvCache.release`."""

    __slots__ = ("_tables", "committed", "first", "length", "tail")

    def __init__(self, groups: int, capacity: int, tail: PrefixNode) -> None:
        self._tables: list[Int32] = [np.full(capacity, -1, dtype=np.int32) for _ in range(groups)]
        self.length = 0
        """Logical pages, the same in all groups."""
        self.first = [0] * groups
        """First logical page that each group still holds; those before it left the window."""
        self.committed = 0
        """Full pages known to the prefix tree; ``tail`` is the last one's node."""
        self.tail = tail

    def table(self, group: int) -> Int32:
        """Page of each logical page, -1 left of the window."""
        return self._tables[group][: self.length]

    def held(self, group: int) -> int:
        """Pages that the sequence holds in ``group``."""
        return self.length - self.first[group]

    def append(self, group: int, logical: int, page: int) -> None:
        self._tables[group][logical] = page

    def forget(self, group: int, logical: int) -> int:
        """Takes a page out of the table and returns it."""
        page = int(self._tables[group][logical])
        self._tables[group][logical] = -1
        return page


class PagePool:
    """The pages of one KV group: reference counts, the free list, and cached pages in order of last use."""

    def __init__(self, group: int, total: int, tree: PrefixTree) -> None:
        self._group = group
        self._tree = tree
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._references = [0] * total
        self._nodes: list[PrefixNode | None] = [None] * total

    @property
    def available(self) -> int:
        """Pages that :meth:`take` can give: free and cached ones."""
        return len(self._free) + len(self._cached)

    def usage(self) -> PoolUsage:
        free, cached = len(self._free), len(self._cached)
        return PoolUsage(free=free, used=self.total - free - cached, cached=cached, total=self.total)

    def is_cached(self, page: int) -> bool:
        """True if the tree knows the page and no sequence holds it."""
        return page in self._cached

    def take(self) -> int:
        """A page for writing, with one reference. Raises IndexError if none is available."""
        if self._free:
            page = self._free.pop()
        elif self._cached:
            page, _ = self._cached.popitem(last=False)
            self.forget(page)
        else:
            raise IndexError(f"KV group {self._group} has no page left")
        self._references[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more reference to a page that the tree knows."""
        self._cached.pop(page, None)
        self._references[page] += 1

    def drop(self, page: int, *, discard: bool = False) -> None:
        """One reference less; at zero the page becomes cached if the tree knows it, else (or with discard) free."""
        if self._references[page] <= 0:
            raise AssertionError(f"page {page} of KV group {self._group} returned twice")
        self._references[page] -= 1
        if self._references[page]:
            return
        if discard:
            self.forget(page)
        if self._nodes[page] is None:
            self._free.append(page)
        else:
            self._cached[page] = None

    def publish(self, page: int, node: PrefixNode) -> None:
        """Lets the tree find ``page`` under ``node``, unless either is taken."""
        if self._nodes[page] is None and node.pages[self._group] is None:
            self._nodes[page] = node
            node.pages[self._group] = page

    def forget(self, page: int) -> None:
        """Takes ``page`` out of the tree."""
        node = self._nodes[page]
        if node is not None:
            node.pages[self._group] = None
            self._nodes[page] = None
            self._tree.prune(node)

    def forget_all(self) -> None:
        """Takes every page out of the tree; those that no sequence holds become free."""
        while self._cached:
            page, _ = self._cached.popitem(last=False)
            self.forget(page)
            self._free.append(page)
        for page in range(self.total):
            self.forget(page)

    def check(self, holders: Counter[int]) -> None:
        """Raises AssertionError if counts, lists or tree contradict each other or ``holders``, references by page."""
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a page is in the free list twice"
        assert not free & cached, "a page is both free and cached"
        for page in range(self.total):
            count = self._references[page]
            assert count == holders[page], f"page {page}: counted {count}, held {holders[page]}"
            assert (count == 0) == (page in free or page in cached), f"page {page} is lost"
            node = self._nodes[page]
            assert node is None or node.pages[self._group] == page, f"page {page}: its node names another page"
            assert (page in cached) <= (node is not None), f"page {page} is cached but unknown to the tree"
            assert not (page in free and node is not None), f"page {page} is free but known to the tree"


class KvCache:
    """The pages of all KV groups. Sizes are in pages of ``PAGE_TOKENS`` slots; slots are positions in a sequence."""

    def __init__(self, groups: Sequence[KvGroupSpec], pages: Sequence[int], *, prefix_caching: bool = True) -> None:
        if len(groups) != len(pages):
            raise ValueError(f"{len(groups)} KV groups but {len(pages)} page counts")
        self._windows = [spec.window for spec in groups]
        self._tree = PrefixTree(len(groups))
        self._pools = [PagePool(group, count, self._tree) for group, count in enumerate(pages)]
        self._prefix_caching = prefix_caching
        self._sequences: set[SequencePages] = set()

    @property
    def groups(self) -> int:
        return len(self._pools)

    def usage(self) -> list[PoolUsage]:
        """Free, used and cached pages of each group."""
        return [pool.usage() for pool in self._pools]

    def pages_needed(self, length: int, chunk: int) -> list[int]:
        """Most pages per group that a sequence of ``length`` slots holds at once, ``chunk`` slots to a step."""
        whole = _pages(length)
        return [whole if w is None else min(whole, _pages(w - 1 + chunk) + 1) for w in self._windows]

    def open(
        self, tokens: Int32, capacity: int, *, reusable: int, reserve: Sequence[int], chunk: int, salt: Hashable = None
    ) -> tuple[SequencePages, int] | None:
        """Starts a sequence: its page tables, and how many leading slots an earlier sequence has computed.

        ``capacity`` is the most slots that it may get, ``reusable`` how many leading tokens may come from the cache.
        None, and nothing changes, unless each group has the pages for all of ``tokens`` and one more besides
        ``reserve`` pages that are promised to others.
        """
        root = self._tree.root(salt)
        path = self._longest_prefix(root, tokens, reusable // PAGE_TOKENS) if self._prefix_caching else []
        needed = self.pages_needed(min(len(tokens) + 1, capacity), chunk)
        slots = len(path) * PAGE_TOKENS
        for group, pool in enumerate(self._pools):
            hits = [node.pages[group] for node in path[self._first_page(group, slots) :]]
            unused = sum(pool.is_cached(page) for page in hits if page is not None)
            if pool.available - unused - reserve[group] < needed[group] - len(hits):
                return None
        pages = SequencePages(self.groups, _pages(capacity) + 1, path[-1] if path else root)
        pages.length = pages.committed = len(path)
        for group, pool in enumerate(self._pools):
            pages.first[group] = self._first_page(group, slots)
            for logical in range(pages.first[group], len(path)):
                page = path[logical].pages[group]
                assert page is not None
                pool.share(page)
                pages.append(group, logical, page)
        pages.tail.users += 1
        self._sequences.add(pages)
        return pages, slots

    def extend(self, pages: SequencePages, slots: int) -> bool:
        """Makes room for slots 0..slots - 1. False, and nothing changes, if a group lacks the pages."""
        missing = _pages(slots) - pages.length
        if missing <= 0:
            return True
        if any(pool.available < missing for pool in self._pools):
            return False
        for group, pool in enumerate(self._pools):
            for logical in range(pages.length, pages.length + missing):
                pages.append(group, logical, pool.take())
        pages.length += missing
        return True

    def commit(self, pages: SequencePages, tokens: Int32, computed: int) -> None:
        """Slots 0..computed - 1 hold the keys and values of ``tokens``: full pages become findable, and pages that no
        later slot can see are returned."""
        if self._prefix_caching:
            for block in range(pages.committed, computed // PAGE_TOKENS):
                node = self._tree.child(pages.tail, block_key(tokens, block))
                for group, pool in enumerate(self._pools):
                    page = int(pages.table(group)[block])
                    if page >= 0:
                        pool.publish(page, node)
                node.users += 1
                pages.tail.users -= 1
                pages.tail = node
                pages.committed = block + 1
        for group, pool in enumerate(self._pools):
            first = min(self._first_page(group, computed), pages.length)
            for logical in range(pages.first[group], first):
                pool.drop(pages.forget(group, logical))
            pages.first[group] = max(pages.first[group], first)

    def release(self, pages: SequencePages, *, discard: bool = False) -> None:
        """Returns all pages, last first; ``discard`` keeps nothing of what only this sequence held in the cache."""
        self._sequences.remove(pages)
        for group, pool in enumerate(self._pools):
            for logical in range(pages.length - 1, pages.first[group] - 1, -1):
                pool.drop(pages.forget(group, logical), discard=discard)
        pages.tail.users -= 1
        self._tree.prune(pages.tail)
        pages.length = 0

    def reset(self) -> None:
        """Forgets everything that was computed so far: no sequence that starts later finds it."""
        for pool in self._pools:
            pool.forget_all()

    def check(self) -> None:
        """Raises AssertionError if pages are lost, held twice or miscounted (for tests and when idle)."""
        for group, pool in enumerate(self._pools):
            pool.check(Counter(int(p) for pages in self._sequences for p in pages.table(group) if p >= 0))
        for node in self._tree.nodes():
            assert node.users or node.children or any(p is not None for p in node.pages), "the tree holds an empty leaf"

    def _first_page(self, group: int, slots: int) -> int:
        """First logical page that slot ``slots`` and later ones see."""
        window = self._windows[group]
        return 0 if window is None else max(0, slots - window + 1) // PAGE_TOKENS

    def _longest_prefix(self, root: PrefixNode, tokens: Int32, blocks: int) -> list[PrefixNode]:
        """The longest known path at whose end every group still has all pages that the next slot sees."""
        path = self._tree.walk(root, tokens, blocks)
        runs = [0] * self.groups  # present pages in a row, up to the current block
        longest = 0
        for block, node in enumerate(path):
            runs = [run + 1 if page is not None else 0 for run, page in zip(runs, node.pages, strict=True)]
            end = block + 1
            if all(run >= end - self._first_page(g, end * PAGE_TOKENS) for g, run in enumerate(runs)):
                longest = end
        return path[:longest]


def _pages(slots: int) -> int:
    return -(-slots // PAGE_TOKENS)
