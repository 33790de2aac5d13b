"""The machine's own limits, measured within seconds; every other figure is quoted as a share of them.

Decode is bound by memory bandwidth and prefill by integer arithmetic (Williams, Waterman and Patterson 2009). All
figures are the best of several runs, since other tenants of a machine only ever make a run slower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tokenmill import _native

MEMORY_WORKING_SET = 512 << 20
"""Bytes read when measuring memory: several times any last-level cache of a small machine."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """Limits of this machine with ``threads`` threads on one instruction-set path."""

    isa: str
    threads: int
    memory_read_bytes_per_second: float
    int8_operations_per_second: float
    f32_operations_per_second: float
    bf16_operations_per_second: float | None
    """None where the processor has no bf16 dot product, or the path does not use 512-bit registers."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine allows at one moment, on the instruction-set path in use: bytes and operations per second."""

    memory: float
    int8: float

    @classmethod
    def now(cls, threads: int = 0, seconds: float = 0.15) -> Limits:
        """Measured within about 1.5 times ``seconds``; 0 threads means all usable. For use beside a sample."""
        return cls(
            _native.read_bytes_per_second(MEMORY_WORKING_SET, threads, seconds),
            _native.int8_operations_per_second(threads, seconds / 3),
        )

    def best(self, other: Limits) -> Limits:
        """The larger of each: the limit of what ran between two moments."""
        return Limits(max(self.memory, other.memory), max(self.int8, other.int8))


@dataclass(frozen=True, slots=True)
class ReadRate:
    """Read bandwidth over a working set that all threads share evenly."""

    level: str
    """L2, L3 or memory: the smallest level that holds the working set."""
    working_set_bytes: int
    threads: int
    bytes_per_second: float


@dataclass(frozen=True, slots=True)
class Cache:
    """One level of the processor's data caches. ``bytes`` is one cache's size; ``shared_by`` counts CPUs."""

    level: int
    bytes: int
    shared_by: int


def measure_roofline(threads: int = 0, seconds: float = 0.3) -> Roofline:
    """Measures each limit for about ``seconds`` on the instruction-set path in use; 0 threads means all usable."""
    isa = _native.active_isa()
    return Roofline(
        isa=isa,
        threads=threads or _native.usable_cpu_count(),
        memory_read_bytes_per_second=_native.read_bytes_per_second(MEMORY_WORKING_SET, threads, seconds),
        int8_operations_per_second=_native.int8_operations_per_second(threads, seconds),
        f32_operations_per_second=_native.f32_operations_per_second(threads, seconds),
        bf16_operations_per_second=(
            _native.bf16_operations_per_second(threads, seconds) if isa.startswith("avx512") else None
        ),
    )


def measure_paths(threads: int = 0, seconds: float = 0.3) -> dict[str, Roofline]:
    """:func:`measure_roofline` on each path that this processor runs. Not while an engine runs in this process."""
    limits = {}
    for isa in _native.available_isas():
        with _path(isa):
            limits[isa] = measure_roofline(threads, seconds)
    return limits


def measure_read_rates(threads: Sequence[int], seconds: float = 0.1) -> list[ReadRate]:
    """Read bandwidth of each cache level from L2 on and of memory, for each number of threads.

    A level's working set is half of what the threads have of it: for private caches half of one cache each.
    """
    caches = [cache for cache in data_caches() if cache.level >= 2]
    rates = []
    for count in threads:
        sets = {"memory": MEMORY_WORKING_SET}
        for cache in caches:
            copies = -(-count // cache.shared_by)
            sets[f"L{cache.level}"] = min(copies * cache.bytes // 2, MEMORY_WORKING_SET // 2)
        for level, size in sorted(sets.items()):
            rates.append(ReadRate(level, size, count, _native.read_bytes_per_second(size, count, seconds)))
    return rates


def data_caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> list[Cache]:
    """The first processor's data caches, smallest level first; empty where the system does not tell."""
    found = []
    for index in sorted(folder.glob("index[0-9]*")):
        try:
            kind, level, size, cpus = (
                (index / name).read_text().strip() for name in ("type", "level", "size", "shared_cpu_list")
            )
        except OSError:
            continue
        if kind != "Instruction":
            scale = {"K": 1 << 10, "M": 1 << 20}[size[-1]]
            found.append(Cache(int(level), int(size[:-1]) * scale, _count(cpus)))
    return sorted(found, key=lambda cache: cache.level)


def _count(cpus: str) -> int:
    """CPUs of a list like ``0-3,8``."""
    ranges = [part.partition("-") for part in cpus.split(",")]
    return sum(int(last or first) - int(first) + 1 for first, _, last in ranges)


@contextmanager
def _path(isa: str) -> Iterator[None]:
    active = _native.active_isa()
    _native.set_active_isa(isa)
    try:
        yield
    finally:
        _native.set_active_isa(active)
