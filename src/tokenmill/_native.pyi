"""Tokenmill's CPU kernels and program executor."""

def active_isa() -> str:
    """Name of the instruction-set path in use."""

def available_isas() -> list[str]:
    """Names of the paths that this processor can run, slowest first."""

def set_active_isa(arg: str, /) -> None:
    """
    Switches the path in use, for tests and benchmarks. Not while a step runs.
    """

def usable_cpu_count() -> int:
    """Threads allowed by the affinity mask and the cgroup's CPU quota."""
