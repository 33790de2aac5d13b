"""The pages of one KV group: which are free, which are cached, who counts on the rest."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass

from tokenmill.engine.prefix_cache import PrefixNode, PrefixTree


@dataclass(frozen=True, slots=True)
class PoolUsage:
    """Pages of one KV group."""

    free: int
    used: int
    cached: int
    total: int


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

    def is_shared(self, page: int) -> bool:
        """True if more than one sequence holds the page."""
        return self._references[page] > 1

    def share(self, page: int) -> None:
        """One more reference to a page that the tree knows or a sequence holds."""
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
        """Takes every page out of the tree; what was cached is free then."""
        for page in range(self.total):
            self.forget(page)
        self._free += self._cached
        self._cached.clear()

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
