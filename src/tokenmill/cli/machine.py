"""What this machine offers: the processor and the part of it that this process may use."""

from __future__ import annotations

import math
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
    from tokenmill import _native

    quota = _native.cgroup_cpu_quota("/proc/self/cgroup", "/sys/fs/cgroup")
    return quota if math.isfinite(quota) else None
