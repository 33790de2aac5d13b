"""A worker's process: started in its own virtual environment, asked line by line, stopped while others measure."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WORKERS = Path(__file__).parent / "workers"


class WorkerError(Exception):
    """A worker that is missing, crashed, hung or says that it cannot; the message is for the report."""


class WorkerProcess:
    """One worker. Between requests it is stopped (SIGSTOP), so that its idle threads take nothing from the others."""

    def __init__(self, worker: str, python: str, environment: Mapping[str, str] | None = None) -> None:
        """Starts ``worker`` (a file name in ``workers``) with the interpreter ``python``. Raises WorkerError."""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  as long as the process
        # One that forbids writing bytecode would compile its libraries at every start.
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        try:
            self._process = subprocess.Popen(
                [python, str(WORKERS), worker],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**kept, **(environment or {})},
                start_new_session=True,
            )
        except OSError as error:
            self._log.close()
            raise WorkerError(f"{python} cannot be started: {error.strerror}") from error
        self._unread = b""

    def ask(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """The worker's answer within ``timeout`` seconds, after which it is stopped again.

        Raises WorkerError if it answers with an error, dies, or does not answer; it is ended in the last two cases.
        """
        if self._process.poll() is not None:
            raise WorkerError(self._obituary())
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._obituary()) from None
        line = self._read_line(timeout)
        self._signal(signal.SIGSTOP)
        try:
            answer = json.loads(line)
        except ValueError:
            raise WorkerError(f"answered what is no JSON: {line[:200]!r}") from None
        if "error" in answer:
            raise WorkerError(str(answer["error"]) + self._last_words())
        return dict(answer)

    def peak_bytes(self) -> int:
        """The most memory the process had resident (VmHWM), mapped files included. Raises WorkerError if it ended."""
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) * 1024
        except (OSError, IndexError):
            raise WorkerError(self._obituary()) from None

    def close(self) -> None:
        """Ends the process and all that it started."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def _read_line(self, timeout: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                self._signal(signal.SIGKILL)
                raise WorkerError(f"did not answer within {timeout:.0f} s and was ended" + self._last_words())
            part = os.read(descriptor, 1 << 16)
            if not part:
                raise WorkerError(self._obituary())
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _signal(self, number: int) -> None:
        # The group outlives its leader, whose id cannot be used again before it has been waited for.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _obituary(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        status = self._process.returncode
        how = f"with exit code {status}"
        if status is not None and status < 0:
            how = f"by signal {signal.Signals(-status).name}"
        return f"ended {how}" + self._last_words()

    def _last_words(self) -> str:
        """The last lines of standard error."""
        try:
            size = self._log.seek(0, os.SEEK_END)
            self._log.seek(max(0, size - 2000))
            lines = self._log.read().decode(errors="replace").strip().splitlines()
        except ValueError:
            return ""
        return "; its last words: " + " | ".join(line.strip() for line in lines[-3:]) if lines else ""
