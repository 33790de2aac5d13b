"""The limit loops run on every path and are not optimized away."""

from pathlib import Path

import pytest

from tokenmill import _native
from tokenmill.bench.roofline import Cache, data_caches, measure_paths, measure_read_rates, measure_roofline


@pytest.fixture(params=_native.available_isas())
def isa(request):
    before = _native.active_isa()
    _native.set_active_isa(request.param)
    yield request.param
    _native.set_active_isa(before)


def test_limits_are_those_of_a_processor(isa):
    limits = measure_roofline(threads=1, seconds=0.01)
    assert limits.isa == isa
    assert 1e8 < limits.memory_read_bytes_per_second < 1e12
    # Upper bounds: 4 GHz x 2 ports x 64 bytes x 2 operations, with room; a folded loop exceeds them by far.
    assert 1e9 < limits.int8_operations_per_second < 4e12
    assert 1e8 < limits.f32_operations_per_second < 1e12


def test_small_working_sets_are_refused():
    with pytest.raises(ValueError, match="at least 1 KiB"):
        _native.read_bytes_per_second(100, 1)


def test_bf16_has_a_peak_only_where_the_processor_has_the_instruction(monkeypatch):
    monkeypatch.setattr("tokenmill.bench.roofline.MEMORY_WORKING_SET", 1 << 20)
    peak = _native.bf16_operations_per_second(1, 0.01)
    has = any("avx512_bf16" in line.split() for line in Path("/proc/cpuinfo").read_text().splitlines())
    assert (peak is not None) == has
    assert peak is None or 1e9 < peak < 4e12
    paths = measure_paths(threads=1, seconds=0.01)
    assert list(paths) == _native.available_isas()
    assert all(limit.bf16_operations_per_second is None for isa, limit in paths.items() if "avx512" not in isa)


def test_cache_levels_are_read_from_the_system(tmp_path):
    levels = [("1", "Data", "32K", "0"), ("1", "Instruction", "32K", "0"), ("2", "Unified", "2M", "0,4")]
    for index, values in enumerate([*levels, ("3", "Unified", "32768K", "0-3,8")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in zip(("level", "type", "size", "shared_cpu_list"), values, strict=True):
            (folder / name).write_text(value + "\n")
    assert data_caches(tmp_path) == [Cache(1, 32 << 10, 1), Cache(2, 2 << 20, 2), Cache(3, 32 << 20, 5)]
    assert data_caches(tmp_path / "nothing") == []


def test_read_rates_cover_levels_and_thread_counts():
    rates = measure_read_rates([1, 2], seconds=0.01)
    assert {rate.threads for rate in rates} == {1, 2}
    assert {"memory"} | {f"L{cache.level}" for cache in data_caches() if cache.level >= 2} == {r.level for r in rates}
    assert all(1e8 < rate.bytes_per_second < 1e13 for rate in rates)
