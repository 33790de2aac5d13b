"""The KV cache against a dictionary that remembers what each page must hold."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tokenmill.engine.kv_cache import KvCache, SequencePages
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


class Model:
    """Sequences as plain token lists, and per group what every page was written with."""

    def __init__(self, seed: int, groups: tuple[KvGroupSpec, ...], pages: list[int], *, caching: bool) -> None:
        self.random = random.Random(seed)
        self.groups = groups
        self.cache = KvCache(groups, pages, prefix_caching=caching)
        self.contents = [dict[int, list[int]]() for _ in groups]
        self.live: list[tuple[SequencePages, list[int], int]] = []
        self.hits = 0

    def prompt(self) -> list[int]:
        """Prompts that share beginnings: few different blocks, in few different orders."""
        blocks = [[block] * PAGE_TOKENS for block in range(3)]
        shared = [token for _ in range(self.random.randint(0, 7)) for token in self.random.choice(blocks)]
        return shared + [self.random.randint(0, 3) for _ in range(self.random.randint(1, 40))]

    def open(self) -> None:
        tokens = self.prompt()
        opened = self.cache.open(
            np.array(tokens, np.int32), CONTEXT, reusable=len(tokens) - 1, reserve=[0] * len(self.groups), chunk=CHUNK
        )
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

    def release(self) -> None:
        if self.live:
            pages, _, _ = self.live.pop(self.random.randrange(len(self.live)))
            self.cache.release(pages, discard=self.random.random() < 0.1)

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
    for _ in range(10_000):
        model.random.choice((model.open, model.compute, model.compute, model.compute, model.compute, model.release))()
        model.check()
    assert model.hits > 100
    while model.live:
        model.release()
    model.check()
    assert all(usage.used == 0 for usage in model.cache.usage())


def test_without_prefix_caching_nothing_is_cached() -> None:
    model = Model(3, (FULL,), [40], caching=False)
    for _ in range(500):
        model.random.choice((model.open, model.compute, model.compute, model.release))()
        model.check()
        assert model.cache.usage()[0].cached == 0
    assert model.hits == 0


def _filled(cache: KvCache, tokens: list[int]) -> SequencePages:
    array = np.array(tokens, np.int32)
    opened = cache.open(array, CONTEXT, reusable=len(tokens) - 1, reserve=[0], chunk=CONTEXT)
    assert opened is not None
    assert cache.extend(opened[0], len(tokens))
    cache.commit(opened[0], array, len(tokens))
    return opened[0]


def test_the_last_prompt_token_is_always_computed() -> None:
    cache = KvCache((FULL,), [8])
    tokens = list(range(2 * PAGE_TOKENS))
    cache.release(_filled(cache, tokens))
    opened = cache.open(np.array(tokens, np.int32), CONTEXT, reusable=len(tokens) - 1, reserve=[0], chunk=CONTEXT)
    assert opened is not None
    assert opened[1] == PAGE_TOKENS


def test_equal_page_after_another_prefix_is_no_hit() -> None:
    cache = KvCache((FULL,), [8])
    cache.release(_filled(cache, [1] * PAGE_TOKENS + [2] * PAGE_TOKENS + [3]))
    other = np.array([9] * PAGE_TOKENS + [2] * PAGE_TOKENS + [3], np.int32)
    opened = cache.open(other, CONTEXT, reusable=len(other) - 1, reserve=[0], chunk=CONTEXT)
    assert opened is not None
    assert opened[1] == 0


def test_another_salt_is_no_hit() -> None:
    cache = KvCache((FULL,), [8])
    tokens = np.array([1] * PAGE_TOKENS + [2], np.int32)
    cache.release(_filled(cache, tokens.tolist()))
    opened = cache.open(tokens, CONTEXT, reusable=len(tokens) - 1, reserve=[0], chunk=CONTEXT, salt="adapter")
    assert opened is not None
    assert opened[1] == 0


def test_the_end_of_a_prompt_is_evicted_before_its_beginning() -> None:
    cache = KvCache((FULL,), [4])
    first = [1] * PAGE_TOKENS + [2] * PAGE_TOKENS + [3] * PAGE_TOKENS + [4]
    cache.release(_filled(cache, first))
    cache.release(_filled(cache, [9] * PAGE_TOKENS + [8]))  # takes the free page and one cached page
    opened = cache.open(np.array(first, np.int32), CONTEXT, reusable=len(first) - 1, reserve=[0], chunk=CONTEXT)
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
    tokens = np.arange(3 * PAGE_TOKENS, dtype=np.int32)
    assert cache.open(tokens, CONTEXT, reusable=0, reserve=[1], chunk=CONTEXT) is None
    assert cache.open(tokens, CONTEXT, reusable=0, reserve=[0], chunk=CONTEXT) is not None


def test_returning_a_page_twice_is_an_error() -> None:
    cache = KvCache((FULL,), [4])
    pages = _filled(cache, [1, 2, 3])
    cache.release(pages)
    with pytest.raises(KeyError):
        cache.release(pages)
