"""Who holds which KV page.

Each KV group has a pool of pages. A page is used (some sequence's table names it), cached (nobody does, but the prefix
tree knows its contents) or free; free + used + cached = total, always. Cached pages are given away least recently used
first, and a sequence returns its pages last first, so that the beginning of a prompt outlives its end.

Sequences share pages in two ways. Full pages are found by their tokens through the prefix tree, and never change. A
fork holds all pages of its parent, the one that is still filling included; whoever first writes to a page that others
hold too gets a copy of it (copy-on-write, as in PagedAttention, SOSP 2023). A sequence that starts names the full pages
that it is going to compute, so that another one with the same beginning can wait for them.
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from tokenmill.engine.page_pool import PagePool, PoolUsage
from tokenmill.engine.prefix_cache import PrefixNode, PrefixTree, block_key
from tokenmill.program.kv import PAGE_TOKENS, KvGroupSpec
from tokenmill.program.step import Int32

__all__ = ["KvCache", "PoolUsage", "PrefixMatch", "SequencePages"]

CopyPage = Callable[[int, int, int], None]
"""Copies, in a group, the contents of one page to another: (group, from page, to page)."""


class SequencePages:
    """One sequence's page tables. Made by :class:`KvCache`, ended by :meth:`KvCache.release`."""

    __slots__ = ("_tables", "changes", "committed", "computed", "due", "first", "length", "planned", "room", "tail")

    def __init__(self, groups: int, capacity: int, tail: PrefixNode) -> None:
        self._tables: list[Int32] = [np.full(capacity, -1, dtype=np.int32) for _ in range(groups)]
        self.length = 0
        """Logical pages, the same in all groups."""
        self.computed = 0
        """Leading slots that hold keys and values."""
        self.changes = 0
        """How often an entry of a table changed: equal counts, equal tables."""
        self.room = 0
        """Leading slots that can be written as the tables are: no page has to be taken or copied for them."""
        self.due = 0
        """Computed slots at which :meth:`KvCache.commit` has more to do than to count them."""
        self.first = [0] * groups
        """First logical page that each group still holds; those before it left the window."""
        self.committed = 0
        """Full pages known to the prefix tree; ``tail`` is the last one's node."""
        self.tail = tail
        self.planned: deque[PrefixNode] = deque()
        """Nodes of full pages that this sequence is going to commit, in their order."""

    def table(self, group: int, spare: int = 0) -> Int32:
        """Page of each logical page, -1 left of the window; and up to ``spare`` entries of -1 for pages to come."""
        return self._tables[group][: self.length + spare]

    def held(self, group: int) -> int:
        """Pages that the sequence holds in ``group``."""
        return self.length - self.first[group]

    def assign(self, group: int, logical: int, page: int) -> None:
        self._tables[group][logical] = page
        self.changes += 1

    def forget(self, group: int, logical: int) -> int:
        """Takes a page out of the table and returns it."""
        page = int(self._tables[group][logical])
        self._tables[group][logical] = -1
        self.changes += 1
        return page

    def fork(self) -> SequencePages:
        """The same pages in other tables; nothing is planned."""
        twin = SequencePages(len(self._tables), len(self._tables[0]), self.tail)
        for own, other in zip(self._tables, twin._tables, strict=True):
            other[:] = own
        twin.length, twin.computed, twin.committed = self.length, self.computed, self.committed
        twin.first = list(self.first)
        return twin


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """What the cache knows of a sequence's beginning. Valid until the cache changes."""

    tokens: Int32
    root: PrefixNode
    path: list[PrefixNode]
    """Full pages that can be used now."""
    computing: PrefixNode | None
    """The last of the pages right after them that a running sequence is about to compute."""


class KvCache:
    """The pages of all KV groups. Sizes are in pages of ``PAGE_TOKENS`` slots; slots are positions in a sequence."""

    def __init__(
        self,
        groups: Sequence[KvGroupSpec],
        pages: Sequence[int],
        *,
        prefix_caching: bool = True,
        copy_page: CopyPage | None = None,
    ) -> None:
        """``copy_page`` is the backend's; without it nothing can be forked."""
        if len(groups) != len(pages):
            raise ValueError(f"{len(groups)} KV groups but {len(pages)} page counts")
        self._windows = [spec.window for spec in groups]
        self._tree = PrefixTree(len(groups))
        self._pools = [PagePool(group, count, self._tree) for group, count in enumerate(pages)]
        self._prefix_caching = prefix_caching
        self._copy_page = copy_page
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

    # ---- starting --------------------------------------------------------------------------------------------------

    def match(self, tokens: Int32, reusable: int, salt: Hashable = None) -> PrefixMatch:
        """The longest beginning of ``tokens`` that is known, of the ``reusable`` leading tokens that may come from the
        cache, among the sequences of the same ``salt``."""
        root = self._tree.root(salt)
        known = self._tree.walk(root, tokens, reusable // PAGE_TOKENS) if self._prefix_caching else []
        usable = self._usable(known)
        computing = None
        for node in known[usable:]:
            if node.computing is None:
                break
            computing = node
        return PrefixMatch(tokens, root, known[:usable], computing)

    def open(
        self, match: PrefixMatch, capacity: int, *, reserve: Sequence[int], chunk: int
    ) -> tuple[SequencePages, int] | None:
        """Starts a sequence: its page tables, and how many leading slots an earlier sequence has computed.

        ``capacity`` is the most slots that it may get. None, and nothing changes, unless each group has the pages for
        all of the tokens and one more besides ``reserve`` pages that are promised to others.
        """
        tokens, path = match.tokens, match.path
        slots = len(path) * PAGE_TOKENS
        first = [self._first_page(group, slots) for group in range(self.groups)]
        if not self._fits(match.root, path, first, min(len(tokens) + 1, capacity), reserve, chunk):
            return None
        pages = self._start(path[-1] if path else match.root, capacity, slots, first)
        pages.length = pages.committed = len(path)
        self._share(pages, path)
        self._plan(pages, tokens)
        return pages, slots

    def reopen(
        self,
        tokens: Int32,
        computed: int,
        capacity: int,
        *,
        reserve: Sequence[int],
        chunk: int,
        salt: Hashable = None,
    ) -> tuple[SequencePages, list[tuple[int, int, int]]] | None:
        """Starts a sequence again whose slots 0..``computed`` - 1 were computed before and are kept elsewhere.

        Returns its tables and the pages whose contents have to be brought back before anything else happens, as
        (group, logical page, page); the others are still known. None, and nothing changes, as in :meth:`open`.
        """
        root = self._tree.root(salt)
        blocks = computed // PAGE_TOKENS if self._prefix_caching else 0
        known = self._tree.walk(root, tokens, blocks)
        first = [self._first_page(group, computed) for group in range(self.groups)]
        if not self._fits(root, known, first, min(len(tokens) + 1, capacity), reserve, chunk):
            return None
        tail = root
        for block in range(blocks):
            tail = self._tree.child(tail, block_key(tokens, block))
        pages = self._start(tail, capacity, computed, first)
        pages.length, pages.committed = _pages(computed), blocks
        self._share(pages, known)
        missing = []
        for group, pool in enumerate(self._pools):
            for logical in range(first[group], pages.length):
                if pages.table(group)[logical] < 0:
                    page = pool.take()
                    pages.assign(group, logical, page)
                    missing.append((group, logical, page))
        if blocks:
            self._publish(pages, tokens, blocks)
        self._plan(pages, tokens)
        return pages, missing

    def fork(self, pages: SequencePages) -> SequencePages:
        """Another sequence with the same tokens so far, over the same pages."""
        if self._copy_page is None:
            raise ValueError("this cache cannot fork: it was given no way to copy a page")
        twin = pages.fork()
        for group, pool in enumerate(self._pools):
            for logical in range(twin.first[group], twin.length):
                pool.share(int(twin.table(group)[logical]))
        twin.tail.users += 1
        pages.room = twin.room = 0  # whoever writes to the page that is filling copies it first
        self._sequences.add(twin)
        return twin

    # ---- growing ---------------------------------------------------------------------------------------------------

    def extend(self, pages: SequencePages, slots: int) -> bool:
        """Makes room to write the slots from the computed ones up to ``slots`` - 1: new pages, and a copy of the one
        that is filling if another sequence holds it too. False, and nothing changes, if a group lacks the pages."""
        missing = max(_pages(slots) - pages.length, 0)
        filling, used = divmod(pages.computed, PAGE_TOKENS)
        copied = [
            used > 0 and slots > pages.computed and pool.is_shared(int(pages.table(group)[filling]))
            for group, pool in enumerate(self._pools)
        ]
        if any(pool.available < missing + copy for pool, copy in zip(self._pools, copied, strict=True)):
            return False
        for group, pool in enumerate(self._pools):
            if copied[group]:
                shared, own = int(pages.table(group)[filling]), pool.take()
                assert self._copy_page is not None
                self._copy_page(group, shared, own)
                pages.assign(group, filling, own)
                pool.drop(shared)
            for logical in range(pages.length, pages.length + missing):
                pages.assign(group, logical, pool.take())
        pages.length += missing
        pages.room = pages.length * PAGE_TOKENS
        return True

    def commit(self, pages: SequencePages, tokens: Int32, computed: int) -> None:
        """Slots 0..computed - 1 hold the keys and values of ``tokens``: full pages become findable, and pages that no
        later slot can see are returned."""
        pages.computed = computed
        if self._prefix_caching:
            for block in range(pages.committed, computed // PAGE_TOKENS):
                node = self._tree.child(pages.tail, block_key(tokens, block))
                for group, pool in enumerate(self._pools):
                    page = int(pages.table(group)[block])
                    if page >= 0:
                        pool.publish(page, node)
                if pages.planned and pages.planned[0] is node:
                    pages.planned.popleft().computing = None
                node.users += 1
                pages.tail.users -= 1
                pages.tail = node
                pages.committed = block + 1
        for group, pool in enumerate(self._pools):
            first = min(self._first_page(group, computed), pages.length)
            for logical in range(pages.first[group], first):
                pool.drop(pages.forget(group, logical))
            pages.first[group] = max(pages.first[group], first)
        pages.due = self._due(pages)

    # ---- ending ----------------------------------------------------------------------------------------------------

    def release(self, pages: SequencePages, *, discard: bool = False) -> None:
        """Returns all pages, last first; ``discard`` keeps nothing of what only this sequence held in the cache."""
        self._sequences.remove(pages)
        for group, pool in enumerate(self._pools):
            for logical in range(pages.length - 1, pages.first[group] - 1, -1):
                pool.drop(pages.forget(group, logical), discard=discard)
        while pages.planned:
            node = pages.planned.pop()
            node.computing = None
            self._tree.prune(node)
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
        planned = {id(node): pages for pages in self._sequences for node in pages.planned}
        for node in self._tree.nodes():
            kept = node.users or node.children or node.computing or any(p is not None for p in node.pages)
            assert kept, "the tree holds an empty leaf"
            assert node.computing is planned.get(id(node)), "a page is waited for that nobody is about to compute"
        assert all(root.children or root.users for root in self._tree.roots()), "the tree holds an empty root"

    # ---- parts -----------------------------------------------------------------------------------------------------

    def _fits(
        self,
        root: PrefixNode,
        known: Sequence[PrefixNode],
        first: Sequence[int],
        length: int,
        reserve: Sequence[int],
        chunk: int,
    ) -> bool:
        """True if every group has the pages of ``length`` slots beside those of ``known``, from page ``first`` on."""
        needed = self.pages_needed(length, chunk)
        for group, pool in enumerate(self._pools):
            hits = [page for node in known[first[group] :] if (page := node.pages[group]) is not None]
            unused = sum(pool.is_cached(page) for page in hits)
            if pool.available - unused - reserve[group] < needed[group] - len(hits):
                self._tree.prune(root)
                return False
        return True

    def _start(self, tail: PrefixNode, capacity: int, computed: int, first: list[int]) -> SequencePages:
        pages = SequencePages(self.groups, _pages(capacity) + 1, tail)
        pages.computed, pages.first = computed, first
        tail.users += 1
        self._sequences.add(pages)
        return pages

    def _share(self, pages: SequencePages, known: Sequence[PrefixNode]) -> None:
        """Puts the pages of ``known`` that the sequence sees into its tables."""
        for group, pool in enumerate(self._pools):
            for logical in range(pages.first[group], len(known)):
                page = known[logical].pages[group]
                if page is not None:
                    pool.share(page)
                    pages.assign(group, logical, page)

    def _plan(self, pages: SequencePages, tokens: Int32) -> None:
        """Names the full pages of ``tokens`` that are not committed as this sequence's to compute."""
        if not self._prefix_caching:
            return
        node = pages.tail
        for block in range(pages.committed, len(tokens) // PAGE_TOKENS):
            node = self._tree.child(node, block_key(tokens, block))
            if node.computing is None:  # else this sequence has to compute what another one does already
                node.computing = pages
                pages.planned.append(node)

    def _publish(self, pages: SequencePages, tokens: Int32, blocks: int) -> None:
        """Makes the first ``blocks`` pages findable; their nodes exist."""
        node = pages.tail
        for block in range(blocks - 1, -1, -1):
            for group, pool in enumerate(self._pools):
                page = int(pages.table(group)[block])
                if page >= 0:
                    pool.publish(page, node)
            assert node.parent is not None
            node = node.parent

    def _due(self, pages: SequencePages) -> int:
        """Computed slots at which a page of the sequence is full next, or leaves a window."""
        leaving = [
            (first + 1) * PAGE_TOKENS + window - 1
            for first, window in zip(pages.first, self._windows, strict=True)
            if window is not None
        ]
        return min([(pages.committed + 1) * PAGE_TOKENS if self._prefix_caching else sys.maxsize, *leaving])

    def _first_page(self, group: int, slots: int) -> int:
        """First logical page that slot ``slots`` and later ones see."""
        window = self._windows[group]
        return 0 if window is None else max(0, slots - window + 1) // PAGE_TOKENS

    def _usable(self, path: Sequence[PrefixNode]) -> int:
        """Length of the longest beginning of ``path`` at whose end every group still has all pages that the next slot
        sees."""
        runs = [0] * self.groups  # present pages in a row, up to the current block
        longest = 0
        for block, node in enumerate(path):
            runs = [run + 1 if page is not None else 0 for run, page in zip(runs, node.pages, strict=True)]
            end = block + 1
            if all(run >= end - self._first_page(g, end * PAGE_TOKENS) for g, run in enumerate(runs)):
                longest = end
        return longest


def _pages(slots: int) -> int:
    return -(-slots // PAGE_TOKENS)
