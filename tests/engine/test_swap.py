"""Preempted sequences go to a file and come back as they were; whatever fails there, they are computed again."""

from __future__ import annotations

import errno
import logging
import os
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
from test_core import FULL, WINDOW, make_core, outputs, random_prompt, request, run

from tokenmill.engine.core import EngineCore
from tokenmill.engine.messages import AbortRequest, AddRequest
from tokenmill.engine.swap import SwapSpace
from tokenmill.program.kv import KvGroupSpec
from tokenmill.sampling import SamplingParams

PLENTY = 1 << 30
BOTH = (FULL, WINDOW)


def space_of(core: EngineCore) -> SwapSpace:
    assert core.scheduler.swap is not None
    return core.scheduler.swap


def requests() -> list[AddRequest]:
    rng = random.Random(5)
    return [
        request(i, random_prompt(rng), SamplingParams(max_tokens=70, seed=i, n=rng.choice((1, 1, 2))))
        for i in range(10)
    ]


@cache
def alone(groups: tuple[KvGroupSpec, ...]) -> dict[tuple[int, int], list[int]]:
    found: dict[tuple[int, int], list[int]] = {}
    for message in requests():
        found.update(outputs(run(make_core(groups=groups, caching=False, tokens=512)[0], [message])))
    return found


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("groups", [(FULL,), BOTH], ids=["full", "both"])
def test_swapped_sequences_go_on_where_they_were(
    tmp_path: Path, groups: tuple[KvGroupSpec, ...], caching: bool
) -> None:
    core, _ = make_core(pages=11, tokens=48, groups=groups, caching=caching, swap=(tmp_path, PLENTY))
    assert outputs(run(core, requests())) == alone(groups)
    space = space_of(core)
    assert space.swapped_out == space.swapped_in == core.statistics.preemptions >= 3
    assert space.used == 0
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_computed_twice(tmp_path: Path) -> None:
    messages = [request(i, [i + 1] * 40, SamplingParams(max_tokens=60, seed=i)) for i in range(6)]
    needed = 6 * (40 + 59)
    core, backend = make_core(pages=10, caching=False, swap=(tmp_path, PLENTY))
    run(core, messages)
    assert core.statistics.preemptions > 0
    assert sum(plan.tokens for plan in backend.steps) == needed
    # The negative control: without the file, the same requests are computed again in part.
    core, backend = make_core(pages=10, caching=False)
    run(core, messages)
    assert sum(plan.tokens for plan in backend.steps) > needed


def test_what_does_not_fit_the_limit_is_computed_again(tmp_path: Path) -> None:
    page = 32 * 2 * 8
    core, _ = make_core(pages=11, tokens=48, swap=(tmp_path, 3 * page))
    assert outputs(run(core, requests())) == alone((FULL,))
    space = space_of(core)
    assert 0 < space.swapped_out < core.statistics.preemptions


def test_the_limit_holds_at_every_moment(tmp_path: Path) -> None:
    core, _ = make_core(pages=11, tokens=48, swap=(tmp_path, 9000))
    for message in requests():
        core.handle(message)
    while core.busy:
        core.step()
        held = [s.swapped.nbytes for s in core.scheduler.waiting if s.swapped is not None]
        assert space_of(core).used == sum(held) <= 9000


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """The kernel refuses to let any file grow beyond ``nbytes``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_means_one_warning_and_the_same_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reference = alone((FULL,))
    core, _ = make_core(pages=11, tokens=48, swap=(tmp_path, PLENTY))
    with largest_file(600), caplog.at_level(logging.WARNING, "tokenmill.engine"):
        found = outputs(run(core, requests()))
    assert found == reference
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        f"cannot write the swap file in {tmp_path}"
    ]
    assert space_of(core).used == 0


def test_a_folder_that_cannot_be_made_means_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    core, _ = make_core(pages=11, tokens=48, swap=(tmp_path / "file" / "swap", PLENTY))
    assert outputs(run(core, requests())) == alone((FULL,))
    assert len(caplog.records) == 1


def test_a_file_that_cannot_be_read_is_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reference = alone(BOTH)

    def broken(descriptor: int, buffers: object, offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    core, _ = make_core(pages=11, tokens=48, groups=BOTH, swap=(tmp_path, PLENTY))
    assert outputs(run(core, requests())) == reference
    assert space_of(core).swapped_out > 0
    assert len(caplog.records) == 1
    assert space_of(core).used == 0


def test_a_cancelled_sequence_gives_its_file_back(tmp_path: Path) -> None:
    core, _ = make_core(pages=11, tokens=48, swap=(tmp_path, PLENTY))
    for message in requests():
        core.handle(message)
    while not any(sequence.swapped for sequence in core.scheduler.waiting):
        core.step()
    for message in requests():
        core.handle(AbortRequest(message.request_id))
    assert not core.busy
    assert space_of(core).used == 0
    assert core.usage()[0].used == 0


def test_swapping_cannot_livelock(tmp_path: Path) -> None:
    core, _ = make_core(pages=11, tokens=32, swap=(tmp_path, PLENTY))
    for i in range(8):
        core.handle(request(i, [i] * 40, SamplingParams(temperature=0, max_tokens=200, seed=0)))
    while core.busy:
        best = min([*core.scheduler.running, *core.scheduler.waiting], key=lambda s: s.rank)
        before = best.computed
        core.step()
        core.cache.check()
        assert best.swapped is None
        assert best.computed > before, "the best sequence made no step"
    assert core.statistics.preemptions > 0
