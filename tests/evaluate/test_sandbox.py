"""Code that nobody has read cannot fork, write, connect, outlive its time or claim to have passed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tokenmill.evaluate import sandbox
from tokenmill.evaluate.sandbox import Outcome, SandboxError, run_program

# Each program tries one thing and ends well only if that worked; MARK is a path outside, PID the test's process.
HOSTILE = {
    "fork": "import os\nif os.fork() == 0: os._exit(0)",
    "fork bomb": "import os\nwhile True: os.fork()",
    "vfork through subprocess": "import subprocess\nsubprocess.run(['/bin/true'], check=True)",
    "shell": "import os\nassert os.system('echo x > MARK') == 0",
    "exec": "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo x > MARK'])",
    "thread bomb": (
        "import threading, time\n"
        "for _ in range(9999): threading.Thread(target=time.sleep, args=(9,)).start()"
    ),
    "multiprocessing": "import multiprocessing as m\np = m.Process(target=print)\np.start()\np.join()",
    "write a file": "open('MARK', 'w').write('x')",
    "append to a file": "open('EXISTING', 'a').write('x')",
    "write through os.open": "import os\nos.write(os.open('MARK', os.O_CREAT | os.O_WRONLY), b'x')",
    "write in its own folder": "open('here', 'w').write('x')",
    "unnamed file": "import tempfile\ntempfile.TemporaryFile().write(b'x')",
    "memory file": "import os\nos.memfd_create('x')",
    "delete a file": "import os\nos.remove('EXISTING')",
    "rename a file": "import os\nos.rename('EXISTING', 'MARK')",
    "make a folder": "import os\nos.mkdir('MARK')",
    "remove a tree": "import shutil\nshutil.rmtree('FOLDER')",
    "link": "import os\nos.symlink('EXISTING', 'MARK')",
    "change a mode": "import os\nos.chmod('EXISTING', 0)",
    "truncate": "import os\nos.truncate('EXISTING', 0)",
    "tcp": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)",
    "udp": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    "unix socket": "import socket\nsocket.socket(socket.AF_UNIX)",
    "listen": "import socket\nsocket.socket().bind(('127.0.0.1', 0))",
    "http": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:PORT', timeout=1)",
    "kill the tester": "import os, signal\nos.kill(PID, signal.SIGKILL)",
    "kill its group": "import os, signal\nos.killpg(0, signal.SIGKILL)\nos.kill(-1, signal.SIGKILL)",
    "signal by owner of a descriptor": "import fcntl\nfcntl.fcntl(3, fcntl.F_SETOWN, PID)",
    "poke the tester's memory": "open('/proc/PID/mem', 'r+b').write(b'x')",
    "trace the tester": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, PID, 0, 0) == 0",
    "raise its limits": "import resource as r\nr.setrlimit(r.RLIMIT_CPU, (9999, 9999))",
    "raw system call": "import ctypes\nassert ctypes.CDLL(None).syscall(41, 2, 1, 0) >= 0",
    "new namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "ring of calls": "import ctypes\nassert ctypes.CDLL(None).syscall(425, 8, b'0' * 120) >= 0",
    "endless loop": "while True: pass",
    "loop that catches everything": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "sleep": "import time\ntime.sleep(1000)",
    "ignore signals": (
        "import signal\nfor s in range(1, 32):\n"
        "    if s not in (9, 19): signal.signal(s, signal.SIG_IGN)\nwhile True: pass"
    ),
    "slow C": "'a' * 10 ** 8 in 'b' * 10 ** 8\nimport re\nre.match('(a+)+b', 'a' * 64)",
    "all memory": "x = bytearray(1 << 34)",
    "growing list": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "deep recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): return f()\nf()",
    "flood of output": "import os\nwhile True: os.write(1, b'x' * 65536)",
    "flood of the verdict": (
        "import os\nfor d in range(3, 64):\n    try:\n        while True: os.write(d, b'x' * 65536)\n"
        "    except OSError: pass\nraise SystemExit"
    ),
    "claim to have passed": (
        "import os\nfor d in range(64):\n    try: os.write(d, b'passed\\n')\n    except OSError: pass\n"
        "os._exit(0)"
    ),
    "leave early": "import os\nos._exit(0)",
    "leave politely": "raise SystemExit(0)",
    "crash": "import ctypes\nctypes.string_at(0)",
}  # fmt: skip


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """All hostile programs at once, with a folder that they try to change and a port that they try to reach."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "existing").write_text("kept")
    reached = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept():
            try:
                server.accept()
                reached.set()
            except OSError:
                pass

        threading.Thread(target=accept, daemon=True).start()

        def run(program):
            for name, value in (
                ("MARK", folder / "mark"),
                ("EXISTING", folder / "existing"),
                ("FOLDER", folder),
                ("PORT", server.getsockname()[1]),
                ("PID", os.getpid()),
            ):
                program = program.replace(name, str(value))
            return run_program(program, seconds=1.0, memory=512 << 20)

        with ThreadPoolExecutor(8) as pool:
            results = dict(zip(HOSTILE, pool.map(run, HOSTILE.values()), strict=True))
    return results, folder, reached


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_does_not_get_what_it_wants(verdicts, name):
    assert not verdicts[0][name].passed, verdicts[0][name]


def test_nothing_outside_has_changed(verdicts):
    _, folder, reached = verdicts
    assert [path.name for path in folder.iterdir()] == ["existing"]
    assert (folder / "existing").read_text() == "kept"
    assert (folder / "existing").stat().st_mode & 0o777 != 0
    assert not reached.is_set()


def test_no_sandboxed_process_is_left(verdicts):
    assert verdicts
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    commands = [Path(f"/proc/{child}/cmdline").read_bytes() for child in children if Path(f"/proc/{child}").exists()]
    assert not [command for command in commands if b"sandbox_child" in command]


def test_outcomes_are_told_apart(verdicts):
    results = verdicts[0]
    assert results["endless loop"].outcome is Outcome.TIMED_OUT
    assert results["leave early"].outcome is Outcome.DIED
    assert results["crash"].detail == "ended early: SIGSEGV"
    assert results["all memory"].detail.startswith("MemoryError")
    assert results["leave politely"].detail.startswith("SystemExit")


@pytest.mark.parametrize(
    "program",
    [
        "assert sorted([2, 1]) == [1, 2]",
        "import math, re, collections, itertools, functools, hashlib, heapq, datetime, random, typing, string, copy\n"
        "assert hashlib.md5(b'x').hexdigest() and random.random() < 1 and re.findall('a', 'banana') == ['a'] * 3",
        "print('to nobody')\nimport sys\nsys.stderr.write('either')",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nassert A(1).x == 1",
        "assert 'pass' in open('/proc/self/status').read() + 'pass'",
    ],
)
def test_ordinary_programs_pass(program):
    verdict = run_program(program, seconds=20)
    assert verdict.passed, verdict


def test_a_failed_assertion_is_reported():
    verdict = run_program("assert 1 == 2, 'one is not two'")
    assert (verdict.outcome, verdict.detail) == (Outcome.FAILED, "AssertionError: one is not two")


def test_source_that_is_no_python_fails():
    assert run_program("def f(:").detail.startswith("SyntaxError")
    assert not run_program("x = '\ud800'\nassert False").passed


def test_without_a_filter_nothing_runs(monkeypatch, tmp_path):
    """The control: with the filter's call left out, a program does write; where it fails, none is started."""
    child = Path(sandbox.__file__).with_name("sandbox_child.py").read_text()
    seccomp = Path(sandbox.__file__).with_name("seccomp.py").read_text()
    (tmp_path / "seccomp.py").write_text(seccomp)
    (tmp_path / "sandbox_child.py").write_text(child)
    monkeypatch.setattr(sandbox, "_CHILD", tmp_path / "sandbox_child.py")
    probe = f"import os\nos.mkdir({str(tmp_path / 'mark')!r})"
    assert not run_program(probe).passed
    (tmp_path / "sandbox_child.py").write_text(child.replace("seccomp.install()", "pass"))
    assert run_program(probe).passed
    (tmp_path / "sandbox_child.py").write_text(child.replace("seccomp.install()", "raise OSError('no filter')"))
    with pytest.raises(SandboxError, match="cannot be contained here: no filter"):
        run_program("pass")


def test_the_filter_names_the_kernel_s_numbers():
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("the kernel's headers are not installed")
    from tokenmill.evaluate import seccomp

    lines = [line.split() for line in header.read_text().splitlines() if line.startswith("#define __NR_")]
    numbers = {name.removeprefix("__NR_"): int(number) for _, name, number in lines}
    assert {**seccomp._X86_64, **seccomp._MACHINES["x86_64"][2]}.items() <= numbers.items()


def test_the_child_needs_nothing_but_the_standard_library():
    source = Path(sandbox.__file__).with_name("sandbox_child.py")
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(source), str(1 << 30), "5"], input=b"t\nx = 1", capture_output=True, check=True
    )
    assert done.stdout == b"ready\nt passed\n"
