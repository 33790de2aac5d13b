"""The thread pool: every thread runs every job, idles without burning, and fits the machine's limits."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import subprocess
import sys
import time

import pytest

from tokenmill import _native


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_every_thread_runs_every_job_once(threads):
    assert _native.ThreadPool(threads).fork_join(500) == [500] * threads


def test_a_hundred_thousand_forks():
    assert _native.ThreadPool(2).fork_join(100_000) == [100_000] * 2


def test_forks_after_sleeping():
    pool = _native.ThreadPool(3)
    for _ in range(30):
        time.sleep(0.001)
        assert pool.fork_join(1) == [1] * 3


def test_idle_workers_sleep():
    pool = _native.ThreadPool(4)
    pool.fork_join(10)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.005  # under 1 % of one CPU
    assert pool.size == 4


def test_negative_thread_counts_are_refused():
    with pytest.raises(ValueError, match="threads must be 0"):
        _native.ThreadPool(-1)


def test_zero_means_all_usable():
    assert _native.ThreadPool(0).size == _native.usable_cpu_count() >= 1


@pytest.mark.skipif(platform.machine() != "x86_64", reason="sets the x86 control register")
def test_every_thread_has_the_default_floating_point_environment():
    pool = _native.ThreadPool(3)
    libm = ctypes.CDLL("libm.so.6")
    saved, disturbed = (ctypes.c_ubyte * 32)(), (ctypes.c_ubyte * 32)()
    libm.fegetenv(saved)
    libm.fegetenv(disturbed)
    disturbed[28:32] = list((0x1F80 | 0x8040 | 0x4000).to_bytes(4, "little"))  # flush, denormals are zero, round up
    libm.fesetenv(disturbed)
    try:
        inherited = _native.ThreadPool(3).default_environment()  # threads inherit their creator's environment
        existing = pool.default_environment()
        control = (ctypes.c_ubyte * 32)()
        libm.fegetenv(control)
    finally:
        libm.fesetenv(saved)
    assert inherited == existing == [True] * 3
    assert list(control[28:30]) == list(disturbed[28:30])  # and the caller gets its own back


def test_a_forked_child_runs_jobs_alone():
    pool = _native.ThreadPool(3)
    pool.fork_join(5)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        counts = pool.fork_join(7)
        del pool
        os.write(writer, bytes(counts))
        os._exit(0)
    os.close(writer)
    assert os.waitpid(child, 0)[1] == 0
    assert list(os.read(reader, 16)) == [7, 0, 0]
    assert pool.fork_join(2) == [2] * 3


# ---- limits of the machine -------------------------------------------------------------------------------------------


def run(code: str, **environment: str) -> str:
    script = f"import os\nfrom tokenmill import _native\n{code}"
    search = os.pathsep.join(path for path in sys.path if path)
    variables = {**os.environ, "PYTHONPATH": search, **environment}
    return subprocess.run(
        [sys.executable, "-c", script], env=variables, check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity")
def test_affinity_limits_the_count_and_decides_pinning():
    cpus = sorted(os.sched_getaffinity(0))
    one = f"os.sched_setaffinity(0, {{{cpus[0]}}}); print(_native.usable_cpu_count(), _native.ThreadPool(2).pinned)"
    assert run(one).split() == ["1", "False"]
    if len(cpus) > 1:
        two = f"os.sched_setaffinity(0, {set(cpus[:2])}); print(_native.ThreadPool(2).pinned)"
        assert run(two).strip() == "True"
        assert run(two, TOKENMILL_PIN="0").strip() == "False"


def quota_of(tmp_path, membership: str, files: dict[str, str]) -> float:
    (tmp_path / "cgroup").write_text(membership)
    for name, text in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return _native.cgroup_cpu_quota(str(tmp_path / "cgroup"), str(tmp_path / "mount"))


def test_quota_of_a_container(tmp_path):
    assert quota_of(tmp_path, "0::/\n", {"cpu.max": "150000 100000\n"}) == 1.5


def test_no_quota(tmp_path):
    assert quota_of(tmp_path, "0::/a\n", {"cpu.max": "max 100000\n", "a/cpu.max": "max 100000\n"}) == math.inf
    assert _native.cgroup_cpu_quota(str(tmp_path / "missing"), str(tmp_path)) == math.inf


def test_tightest_quota_of_nested_groups(tmp_path):
    files = {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n", "a/b/c/cpu.max": "700000 100000\n"}
    assert quota_of(tmp_path, "0::/a/b/c\n", files) == 2.0


def test_quota_of_version_1(tmp_path):
    files = {
        "cpu,cpuacct/job/cpu.cfs_quota_us": "300000\n",
        "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
        "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    }
    assert quota_of(tmp_path, "5:cpuset:/x\n4:cpu,cpuacct:/job\n", files) == 3.0
