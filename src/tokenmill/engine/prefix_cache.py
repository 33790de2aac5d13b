"""Finds the KV pages of a prompt's beginning that an earlier request has already computed.

Full pages are the nodes of a tree: a node's key in its parent is the exact tokens of its page, so a hit compares every
token of the prefix and two prefixes can never be taken for each other, whatever their hashes. Requests that must not
share (another adapter, a salt) start from another root.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from tokenmill.program.kv import PAGE_TOKENS
from tokenmill.program.step import Int32

if TYPE_CHECKING:
    from tokenmill.engine.kv_cache import SequencePages


class PrefixNode:
    """One full page of tokens after a given prefix: its page in each KV group that (still) has it."""

    __slots__ = ("children", "computing", "key", "pages", "parent", "users")

    def __init__(self, parent: PrefixNode | None, key: Hashable, groups: int) -> None:
        self.parent = parent
        self.key = key
        """Tokens of the page as bytes; the salt in a root."""
        self.children: dict[Hashable, PrefixNode] = {}
        self.pages: list[int | None] = [None] * groups
        self.users = 0
        """Sequences whose committed pages end here; they keep the path to the root alive."""
        self.computing: SequencePages | None = None
        """The running sequence that is about to compute this page; others may wait for it."""


class PrefixTree:
    """The nodes by prefix. Page lifetimes are the business of :class:`tokenmill.engine.kv_cache.KvCache`."""

    def __init__(self, groups: int) -> None:
        self._groups = groups
        self._roots: dict[Hashable, PrefixNode] = {}

    def root(self, salt: Hashable = None) -> PrefixNode:
        """The empty prefix of everything that shares ``salt``."""
        if salt not in self._roots:
            self._roots[salt] = PrefixNode(None, salt, self._groups)
        return self._roots[salt]

    def walk(self, root: PrefixNode, tokens: Int32, blocks: int) -> list[PrefixNode]:
        """Nodes of the longest known prefix of ``tokens``, at most ``blocks`` pages."""
        path: list[PrefixNode] = []
        node = root
        for block in range(blocks):
            child = node.children.get(block_key(tokens, block))
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def child(self, parent: PrefixNode, key: bytes) -> PrefixNode:
        """The node of page ``key`` after ``parent``, made if new."""
        node = parent.children.get(key)
        if node is None:
            node = parent.children[key] = PrefixNode(parent, key, self._groups)
        return node

    def prune(self, node: PrefixNode) -> None:
        """Removes ``node`` and its ancestors as far as nothing needs them."""
        while not (node.users or node.children or node.computing or any(p is not None for p in node.pages)):
            siblings = self._roots if node.parent is None else node.parent.children
            if siblings.get(node.key) is node:
                del siblings[node.key]
            if node.parent is None:
                return
            node = node.parent

    def roots(self) -> Sequence[PrefixNode]:
        """The empty prefixes, one for each salt."""
        return list(self._roots.values())

    def nodes(self) -> Sequence[PrefixNode]:
        """All nodes but the roots."""
        found: list[PrefixNode] = []
        stack = list(self._roots.values())
        while stack:
            children = list(stack.pop().children.values())
            found += children
            stack += children
        return found


def block_key(tokens: Int32, block: int) -> bytes:
    """The tokens of page ``block`` as bytes."""
    return tokens[block * PAGE_TOKENS : (block + 1) * PAGE_TOKENS].tobytes()
