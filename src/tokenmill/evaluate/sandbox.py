"""Runs code that nobody has read: a model wrote it.

Each program runs in an interpreter of its own with no network, no files to write, no processes or threads to start and
limits on memory, CPU and wall time; a system-call filter in the kernel sees to it (:mod:`tokenmill.evaluate.seccomp`).
It may read files that this user may read, and has nowhere to send them. Where the filter cannot be installed nothing
runs: there is no weaker mode.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tokenmill.errors import TokenmillError

_CHILD = Path(__file__).with_name("sandbox_child.py")
_START_SECONDS = 60.0
_MOST_ANSWER = 4096


class SandboxError(TokenmillError):
    """This system cannot contain code, so none is run."""


class Outcome(Enum):
    PASSED = "passed"
    FAILED = "failed"
    TIMED_OUT = "timed out"
    DIED = "died"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a program. ``detail`` is its exception, or the signal that ended it."""

    outcome: Outcome
    detail: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.outcome is Outcome.PASSED


def run_program(source: str, *, seconds: float = 3.0, memory: int = 1 << 30) -> Verdict:
    """Runs ``source`` to its end, an exception, ``seconds`` of wall time, or its limits.

    ``memory`` bounds its address space in bytes. A program passes if its last statement has run: leaving early, by
    ``sys.exit`` or ``os._exit``, is no pass. Raises SandboxError where code cannot be contained.
    """
    token = secrets.token_hex(16).encode()
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_CHILD), str(memory), str(int(seconds) + 1)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(token + b"\n" + source.encode(errors="replace"))
                process.stdin.close()
            return _judge(process, token, seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


def _judge(process: subprocess.Popen[bytes], token: bytes, seconds: float) -> Verdict:
    assert process.stdout is not None
    assert process.stderr is not None
    ready, rest = _line(process.stdout.fileno(), b"", _START_SECONDS)
    if ready != b"ready":
        last = process.stderr.read(2000).strip().splitlines() if ready is None else [ready]
        reason = last[-1].decode(errors="replace") if last else "the sandbox did not start"
        raise SandboxError(f"code cannot be contained here: {reason}")
    start = time.monotonic()
    answer, _ = _line(process.stdout.fileno(), rest, seconds)
    took = time.monotonic() - start
    if answer is None:
        if took >= seconds:
            return Verdict(Outcome.TIMED_OUT, f"ran longer than {seconds:g} s", took)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        status = process.returncode or 0
        how = signal.Signals(-status).name if status < 0 else f"exit code {status}"
        return Verdict(Outcome.DIED, f"ended early: {how}", took)
    if answer == token + b" passed":
        return Verdict(Outcome.PASSED, "", took)
    return Verdict(Outcome.FAILED, answer.decode(errors="replace"), took)


def _line(descriptor: int, read: bytes, seconds: float) -> tuple[bytes | None, bytes]:
    """The next line and what came after it; None at the end of the stream, after too much, or after ``seconds``."""
    deadline = time.monotonic() + seconds
    while b"\n" not in read:
        left = deadline - time.monotonic()
        if left <= 0 or len(read) > _MOST_ANSWER or not select.select([descriptor], [], [], left)[0]:
            return None, read
        part = os.read(descriptor, _MOST_ANSWER)
        if not part:
            return None, read
        read += part
    line, _, rest = read.partition(b"\n")
    return line, rest
