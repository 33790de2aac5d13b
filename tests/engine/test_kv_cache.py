"""The KV cache against a dictionary that remembers what each page must hold."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from tokenmill.engine.kv_cache import KvCache, SequencePages
from tokenmill.engine.page_pool import PagePool
from tokenmill.program.kv import PAGE_TOKENS, KvGroupSpec

FULL = KvGroupSpec(layers=1, kv_heads=1, head_dim=16)
WINDOW = KvGroupSpec(layers=1, kv_heads=1, head_dim=16, window=70)
CONTEXT = 512
CHUNK = 48


def _prefix_hashes(tokens: list[int]) -> list[int]:
    """Entry p stands for tokens 0..p, on all of which the keys at slot p depend."""
    hashes = [0]
    for token in tokens:
        hashes.append(hash((hashes[-1], token)))
    return hashes[1:]


def start(
    cache: KvCache,
    tokens: Sequence[int],
    *,
    reusable: int | None = None,
    reserve: Sequence[int] | None = None,
    chunk: int = CONTEXT,
    salt: str | None = None,
) -> tuple[SequencePages, int] | None:
    array = np.array(tokens, np.int32)
    match = cache.match(array, len(array) - 1 if reusable is None else reusable, salt)
    return cache.open(match, CONTEXT, reserve=reserve or [0] * cache.groups, chunk=chunk)


class Model:
    """Sequences as plain token lists, and per group what every page was written with."""

    def __init__(self, seed: int, groups: tuple[KvGroupSpec, ...], pages: list[int], *, caching: bool) -> None:
        self.random = random.Random(seed)
        self.groups = groups
        self.cache = KvCache(groups, pages, prefix_caching=caching, copy_page=self.copy)
        self.contents = [dict[int, list[int]]() for _ in groups]
        self.live: list[tuple[SequencePages, list[int], int]] = []
        self.stored: list[tuple[list[int], int, dict[tuple[int, int], list[int]]]] = []
        self.hits = self.copies = self.reopened = self.awaited = 0

    def copy(self, group: int, from_page: int, to_page: int) -> None:
        self.contents[group][to_page] = list(self.contents[group][from_page])
        self.copies += 1

    def prompt(self) -> list[int]:
        """Prompts that share beginnings: few different blocks, in few different orders."""
        blocks = [[block] * PAGE_TOKENS for block in range(3)]
        shared = [token for _ in range(self.random.randint(0, 7)) for token in self.random.choice(blocks)]
        return shared + [self.random.randint(0, 3) for _ in range(self.random.randint(1, 40))]

    def open(self) -> None:
        tokens = self.prompt()
        match = self.cache.match(np.array(tokens, np.int32), len(tokens) - 1)
        if match.computing is not None:
            owner = match.computing.computing
            assert owner in {pages for pages, _, _ in self.live}, "nobody computes what is waited for"
            self.awaited += 1
        opened = self.cache.open(match, CONTEXT, reserve=[0] * len(self.groups), chunk=CHUNK)
        if opened is None:
            return
        pages, computed = opened
        assert computed % PAGE_TOKENS == 0
        assert computed < len(tokens)
        self.hits += computed > 0
        self.live.append((pages, tokens, computed))
        self.check_contents(pages, tokens, computed)

    def compute(self) -> None:
        if not self.live:
            return
        place = self.random.randrange(len(self.live))
        pages, tokens, computed = self.live[place]
        if computed == len(tokens):
            if len(tokens) == CONTEXT:
                return
            tokens.append(self.random.randint(0, 3))
        count = min(self.random.randint(1, CHUNK), len(tokens) - computed)
        if not self.cache.extend(pages, computed + count):
            return
        hashes = _prefix_hashes(tokens)
        for slot in range(computed, computed + count):
            for group in range(len(self.groups)):
                page = int(pages.table(group)[slot // PAGE_TOKENS])
                assert page >= 0
                if slot % PAGE_TOKENS == 0:
                    self.contents[group][page] = []
                written = self.contents[group][page]
                assert len(written) == slot % PAGE_TOKENS, "another sequence writes to this page too"
                written.append(hashes[slot])
        self.check_contents(pages, tokens, computed + count)
        self.cache.commit(pages, np.array(tokens, np.int32), computed + count)
        self.live[place] = (pages, tokens, computed + count)

    def fork(self) -> None:
        if self.live and len(self.live) < 12:
            pages, tokens, computed = self.random.choice(self.live)
            self.live.append((self.cache.fork(pages), list(tokens), computed))

    def store(self) -> None:
        """Takes a sequence out of the cache and keeps the contents of its pages elsewhere."""
        if self.live and len(self.stored) < 6:
            pages, tokens, computed = self.live.pop(self.random.randrange(len(self.live)))
            kept = {
                (group, logical): list(self.contents[group][int(pages.table(group)[logical])])
                for group in range(len(self.groups))
                for logical in range(pages.first[group], -(-computed // PAGE_TOKENS))
            }
            self.stored.append((tokens, computed, kept))
            self.cache.release(pages)

    def reopen(self) -> None:
        if not self.stored:
            return
        tokens, computed, kept = self.stored[0]
        array = np.array(tokens, np.int32)
        opened = self.cache.reopen(array, computed, CONTEXT, reserve=[0] * len(self.groups), chunk=CHUNK)
        if opened is None:
            return
        del self.stored[0]
        pages, missing = opened
        for group, logical, page in missing:
            self.contents[group][page] = kept[group, logical]
        self.reopened += 1
        self.live.append((pages, tokens, computed))
        self.check_contents(pages, tokens, computed)

    def reset(self) -> None:
        if self.random.random() < 0.02:
            self.cache.reset()
            assert all(usage.cached == 0 for usage in self.cache.usage())

    def release(self) -> None:
        if self.live:
            pages, _, _ = self.live.pop(self.random.randrange(len(self.live)))
            self.cache.release(pages, discard=self.random.random() < 0.1)

    def run(self, operations: int) -> None:
        for _ in range(operations):
            rare = self.random.choice((self.fork, self.store, self.reopen, self.reset))
            self.random.choice((self.open, *[self.compute] * 5, self.release, rare))()
            self.check()

    def check_contents(self, pages: SequencePages, tokens: list[int], computed: int) -> None:
        """Every slot that the next token sees holds what this very prefix wrote."""
        hashes = _prefix_hashes(tokens)
        for group, spec in enumerate(self.groups):
            first = 0 if spec.window is None else max(0, computed - spec.window + 1)
            for block in range(first // PAGE_TOKENS, -(-computed // PAGE_TOKENS)):
                page = int(pages.table(group)[block])
                assert page >= 0, "a page that the next token sees is gone"
                begin, end = block * PAGE_TOKENS, min((block + 1) * PAGE_TOKENS, computed)
                assert self.contents[group][page][: end - begin] == hashes[begin:end]

    def check(self) -> None:
        self.cache.check()
        for usage in self.cache.usage():
            assert usage.free + usage.used + usage.cached == usage.total
        for pages, tokens, computed in self.live:
            if self.random.random() < 0.05:
                self.check_contents(pages, tokens, computed)


@pytest.mark.parametrize("groups", [(FULL,), (WINDOW,), (FULL, WINDOW)], ids=["full", "window", "both"])
def test_ten_thousand_random_operations_keep_every_page_accounted_for(groups: tuple[KvGroupSpec, ...]) -> None:
    model = Model(7, groups, [40] * len(groups), caching=True)
    model.run(10_000)
    assert min(model.hits, model.copies, model.reopened, model.awaited) > 20
    while model.live:
        model.release()
    model.check()
    assert all(usage.used == 0 for usage in model.cache.usage())


def test_without_copy_on_write_forks_corrupt_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    monkeypatch.setattr(PagePool, "is_shared", lambda pool, page: False)
    model = Model(7, (FULL,), [40], caching=True)
    with pytest.raises(AssertionError):
        model.run(1000)


def test_without_prefix_caching_nothing_is_cached() -> None:
    model = Model(3, (FULL,), [40], caching=False)
    for _ in range(500):
        model.random.choice((model.open, model.compute, model.compute, model.release))()
        model.check()
        assert model.cache.usage()[0].cached == 0
    assert model.hits == 0


def _filled(cache: KvCache, tokens: list[int]) -> SequencePages:
    array = np.array(tokens, np.int32)
    opened = start(cache, tokens)
    assert opened is not None
    assert cache.extend(opened[0], len(tokens))
    cache.commit(opened[0], array, len(tokens))
    return opened[0]


def test_the_last_prompt_token_is_always_computed() -> None:
    cache = KvCache((FULL,), [8])
    tokens = list(range(2 * PAGE_TOKENS))
    cache.release(_filled(cache, tokens))
    opened = start(cache, tokens)
    assert opened is not None
    assert opened[1] == PAGE_TOKENS


def test_equal_page_after_another_prefix_is_no_hit() -> None:
    cache = KvCache((FULL,), [8])
    cache.release(_filled(cache, [1] * PAGE_TOKENS + [2] * PAGE_TOKENS + [3]))
    opened = start(cache, [9] * PAGE_TOKENS + [2] * PAGE_TOKENS + [3])
    assert opened is not None
    assert opened[1] == 0


def test_another_salt_is_no_hit() -> None:
    cache = KvCache((FULL,), [8])
    tokens = [1] * PAGE_TOKENS + [2]
    cache.release(_filled(cache, tokens))
    opened = start(cache, tokens, salt="another tenant")
    assert opened is not None
    assert opened[1] == 0


def test_the_end_of_a_prompt_is_evicted_before_its_beginning() -> None:
    cache = KvCache((FULL,), [4])
    first = [1] * PAGE_TOKENS + [2] * PAGE_TOKENS + [3] * PAGE_TOKENS + [4]
    cache.release(_filled(cache, first))
    cache.release(_filled(cache, [9] * PAGE_TOKENS + [8]))  # takes the free page and one cached page
    opened = start(cache, first)
    assert opened is not None
    assert opened[1] == 2 * PAGE_TOKENS


def test_a_window_group_returns_what_it_left_behind() -> None:
    cache = KvCache((WINDOW,), [20], prefix_caching=False)
    pages = _filled(cache, [1] * (10 * PAGE_TOKENS))
    # The next slot is 320 and sees from slot 251 on, which is in page 7.
    assert pages.table(0).tolist()[:7] == [-1] * 7
    assert min(pages.table(0).tolist()[7:]) >= 0
    assert cache.usage()[0].used == 3


def test_pages_promised_to_others_are_not_given() -> None:
    cache = KvCache((FULL,), [4])
    tokens = list(range(3 * PAGE_TOKENS))
    assert start(cache, tokens, reserve=[1]) is None
    assert start(cache, tokens, reserve=[0]) is not None


def test_who_begins_alike_is_told_to_wait_until_the_pages_are_there() -> None:
    cache = KvCache((FULL,), [20])
    tokens = np.arange(4 * PAGE_TOKENS, dtype=np.int32)
    first = start(cache, tokens)
    assert first is not None
    other = np.concatenate([tokens[: 2 * PAGE_TOKENS], np.full(PAGE_TOKENS, 9, np.int32)])
    awaited = cache.match(other, len(other) - 1).computing
    assert awaited is not None
    for computed in (10, PAGE_TOKENS + 5):
        assert cache.extend(first[0], computed)
        cache.commit(first[0], tokens, computed)
        assert awaited.computing is first[0]
    assert cache.extend(first[0], 2 * PAGE_TOKENS)
    cache.commit(first[0], tokens, 2 * PAGE_TOKENS)
    assert awaited.computing is None
    match = cache.match(other, len(other) - 1)
    assert (len(match.path), match.computing) == (2, None)


def test_who_gives_up_is_not_waited_for() -> None:
    cache = KvCache((FULL,), [20])
    tokens = np.arange(4 * PAGE_TOKENS, dtype=np.int32)
    first = start(cache, tokens)
    assert first is not None
    awaited = cache.match(tokens, len(tokens) - 1).computing
    assert awaited is not None
    cache.release(first[0])
    assert awaited.computing is None
    cache.check()


def test_a_fork_copies_only_the_page_that_is_filling_and_only_once() -> None:
    copies: list[tuple[int, int, int]] = []
    cache = KvCache((FULL,), [20], copy_page=lambda *pages: copies.append(pages))
    parent = _filled(cache, [1] * (PAGE_TOKENS + 5))
    child = cache.fork(parent)
    assert cache.usage()[0].used == 2
    assert cache.extend(child, PAGE_TOKENS + 6)
    assert cache.extend(parent, PAGE_TOKENS + 6)  # now nobody else holds the page: no second copy
    assert copies == [(0, int(parent.table(0)[1]), int(child.table(0)[1]))]
    assert parent.table(0)[0] == child.table(0)[0]
    cache.check()


def test_salts_that_nobody_uses_leave_nothing_behind() -> None:
    cache = KvCache((FULL,), [4])
    for number in range(50):
        opened = start(cache, [1] * (3 * PAGE_TOKENS), salt=f"tenant {number}")
        assert opened is not None
        cache.release(opened[0])
        assert start(cache, [1] * (8 * PAGE_TOKENS), salt=f"large {number}") is None
    assert cache._tree.roots() == []


def test_after_a_reset_nothing_is_found() -> None:
    cache = KvCache((FULL,), [20])
    tokens = [1] * (3 * PAGE_TOKENS + 1)
    cache.release(_filled(cache, tokens))
    running = _filled(cache, [2] * (3 * PAGE_TOKENS + 1))
    cache.reset()
    assert cache.usage()[0].cached == 0
    for again in (tokens, [2] * (3 * PAGE_TOKENS + 1)):
        opened = start(cache, again)
        assert opened is not None
        assert opened[1] == 0
        cache.release(opened[0])
    cache.release(running)
    cache.check()
    assert cache.usage()[0].free == 20


def test_returning_a_page_twice_is_an_error() -> None:
    cache = KvCache((FULL,), [4])
    pages = _filled(cache, [1, 2, 3])
    cache.release(pages)
    with pytest.raises(KeyError):
        cache.release(pages)
