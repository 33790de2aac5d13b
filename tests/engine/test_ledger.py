"""The memory ledger: budgets, limits and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tokenmill.engine.kv_cache import KvCache
from tokenmill.engine.ledger import MemoryBudget, MemoryLedger, memory_budget, parse_size, plan_memory, size
from tokenmill.errors import MemoryLimitError, UsageError
from tokenmill.program.kv import KvGroupSpec

FULL = KvGroupSpec(layers=4, kv_heads=2, head_dim=64)  # 64 kB a page
WINDOW = KvGroupSpec(layers=20, kv_heads=2, head_dim=64, window=512)
MB = 10**6


def plan(
    limit: int,
    groups: tuple[KvGroupSpec, ...] = (FULL,),
    *,
    max_model_len: int | None = None,
    max_num_seqs: int = 4,
    given: bool = True,
) -> MemoryLedger:
    cache = KvCache(groups, [0] * len(groups))
    return plan_memory(
        MemoryBudget(limit, "memory=test", given=given),
        weights=100 * MB,
        scratch=10 * MB,
        groups=groups,
        pages_needed=lambda length: cache.pages_needed(length, 512),
        longest=8192,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
    )


def test_with_room_every_sequence_may_be_as_long_as_the_context() -> None:
    ledger = plan(1000 * MB, max_model_len=1024)
    assert ledger.kv_pages == (4 * 32,)
    assert ledger.kv == 4 * 32 * FULL.page_bytes
    assert ledger.total == 110 * MB + ledger.kv


@pytest.mark.parametrize("groups", [(FULL,), (FULL, WINDOW)], ids=["full", "both"])
@pytest.mark.parametrize("limit", [160, 200, 300, 500, 2000])
def test_the_budget_is_kept_and_one_whole_sequence_always_fits(limit: int, groups: tuple[KvGroupSpec, ...]) -> None:
    ledger = plan(limit * MB, groups)
    assert ledger.total <= limit * MB
    needed = KvCache(groups, [0] * len(groups)).pages_needed(ledger.max_model_len, 512)
    assert all(has >= needs for has, needs in zip(ledger.kv_pages, needed, strict=True))


def test_the_context_shrinks_to_what_fits_if_none_is_asked_for() -> None:
    assert plan(1000 * MB).max_model_len == 8192
    assert plan(120 * MB).max_model_len == 10 * MB // FULL.page_bytes * 32


def test_a_context_that_does_not_fit_is_refused_with_numbers_and_advice() -> None:
    with pytest.raises(MemoryLimitError) as refusal:
        plan(120 * MB, max_model_len=8192)
    message = str(refusal.value)
    assert "17 MB" in message  # the KV cache
    assert "127 MB" in message  # everything
    assert "120 MB" in message  # the budget
    assert "lower max_model_len" in message


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(MemoryLimitError, match="choose a smaller model or raise memory"):
        plan(105 * MB)


def test_without_a_given_budget_the_cache_stays_moderate() -> None:
    assert plan(10**12, max_num_seqs=64, given=False).kv_pages == (64 * 64,)  # 2048 tokens each
    assert plan(10**12, max_num_seqs=1, given=False).kv_pages == (256,)  # never less than one whole sequence


def test_actual_bytes_over_the_budget_are_refused() -> None:
    ledger = plan(1000 * MB, max_model_len=1024)
    assert ledger.checked() is ledger
    with pytest.raises(MemoryLimitError, match="lower max_num_seqs"):
        replace(ledger, weights=990 * MB).checked()


def test_the_table_names_every_part() -> None:
    table = str(plan(1000 * MB, (FULL, WINDOW), max_model_len=1024))
    for part in ("weights", "KV group 0", "KV group 1", "window 512", "scratch", "total", "budget", "memory=test"):
        assert part in table


@pytest.mark.parametrize(
    ("text", "count"),
    [(123, 123), ("123", 123), ("1.5GB", 1_500_000_000), ("2 GiB", 2 << 30), ("512mib", 512 << 20), ("3g", 3 << 30)],
)
def test_sizes(text: int | str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "4 parsecs", "-1GB", 0, "0", True, 1.5])
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(UsageError, match="memory is"):
        parse_size(text)  # type: ignore[arg-type]


def test_sizes_for_people() -> None:
    assert [size(n) for n in (12, 3400, 134 * MB, 1_530 * MB)] == ["12 B", "3 kB", "134 MB", "1.53 GB"]


def machine(root: Path, *, groups: str = "0::/\n", **files: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_machines_available_memory_bounds_the_budget(tmp_path: Path) -> None:
    budget = memory_budget(None, machine(tmp_path))
    assert budget.limit == int(8_000_000 * 1024 * 0.9)
    assert "machine" in budget.source


def test_a_cgroup_v2_limit_above_the_process_bounds_it(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        groups="0::/service/worker\n",
        service__worker__memory_dot_max="max\n",
        service__worker__memory_dot_current="1\n",
        service__memory_dot_max=f"{4 << 30}\n",
        service__memory_dot_current=f"{3 << 30}\n",
        service__memory_dot_stat=f"anon 5\ninactive_file {1 << 30}\n",
    )
    assert memory_budget(None, root).limit == int((2 << 30) * 0.9)


def test_a_cgroup_v1_limit_bounds_it(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        groups="5:cpu,cpuacct:/other\n4:memory:/box\n",
        memory__box__memory_dot_limit_in_bytes=f"{2 << 30}\n",
        memory__box__memory_dot_usage_in_bytes="0\n",
    )
    assert memory_budget(None, root).limit == int((2 << 30) * 0.9)


def test_a_cgroup_of_a_container_seen_from_inside(tmp_path: Path) -> None:
    root = machine(tmp_path, groups="0::/not/visible/here\n", memory_dot_max=f"{1 << 30}\n", memory_dot_current="0\n")
    assert memory_budget(None, root).limit == int((1 << 30) * 0.9)
