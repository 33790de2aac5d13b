"""What this machine offers: processor, cores and memory, as the process may use them."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

_FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "fphp",
    "bf16",
    "i8mm",
    "sve",
)


@dataclass(frozen=True, slots=True)
class Processor:
    """``features`` are those that matter to kernels, in Linux's spelling; ``quota`` is in CPUs, None without one."""

    model: str
    architecture: str
    features: tuple[str, ...]
    cores: int
    affinity: tuple[int, ...]
    quota: float | None


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. ``cgroup_limit`` is None where the process has none."""

    total: int
    available: int
    cgroup_limit: int | None

    @property
    def limit(self) -> int:
        """What this process may use at most."""
        return self.total if self.cgroup_limit is None else min(self.total, self.cgroup_limit)


def processor() -> Processor:
    """Reads /proc/cpuinfo, the affinity mask and the cgroup's CPU quota."""
    fields = _cpuinfo()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return Processor(
        model=fields.get("model name", platform.processor() or "unknown"),
        architecture=platform.machine(),
        features=tuple(feature for feature in _FEATURES if feature in flags),
        cores=os.cpu_count() or 1,
        affinity=tuple(sorted(os.sched_getaffinity(0))),
        quota=_cpu_quota(),
    )


def memory() -> Memory:
    """Reads /proc/meminfo and the limits of this process's cgroup and of all groups above it."""
    kilobytes = {
        line.split(":")[0]: int(line.split()[1])
        for line in Path("/proc/meminfo").read_text().splitlines()
        if ":" in line
    }
    limits = [limit for file in _memory_limit_files() if (limit := _number(file)) is not None]
    total = kilobytes["MemTotal"] * 1024
    limit = min(limits, default=None)
    return Memory(
        total=total,
        available=kilobytes["MemAvailable"] * 1024,
        cgroup_limit=limit if limit is not None and limit < total else None,
    )


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields


def _cpu_quota() -> float | None:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    folder = Path("/sys/fs/cgroup/cpu")
    quota_us, period_us = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return None if quota_us is None or not period_us or quota_us <= 0 else quota_us / period_us


def _memory_limit_files() -> list[Path]:
    files = [Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    group = next((line[3:] for line in lines if line.startswith("0::")), "/")
    folder = Path("/sys/fs/cgroup") / group.lstrip("/")
    files += [parent / "memory.max" for parent in (folder, *folder.parents) if parent.is_relative_to("/sys/fs/cgroup")]
    return files


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None
