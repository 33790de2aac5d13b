"""The machine's own limits, measured within seconds; every other figure is quoted as a share of them.

Decode is bound by memory bandwidth and prefill by integer arithmetic (Williams, Waterman and Patterson 2009). All
figures are the best of several runs, since other tenants of a machine only ever make a run slower.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def measure_roofline(threads: int = 0, seconds: float = 0.3) -> Roofline:
    """Measures each limit for about ``seconds`` on the instruction-set path in use; 0 threads means all usable."""
    return Roofline(
        isa=_native.active_isa(),
        threads=threads or _native.usable_cpu_count(),
        memory_read_bytes_per_second=_native.read_bytes_per_second(MEMORY_WORKING_SET, threads, seconds),
        int8_operations_per_second=_native.int8_operations_per_second(threads, seconds),
        f32_operations_per_second=_native.f32_operations_per_second(threads, seconds),
    )
