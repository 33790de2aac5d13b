"""A tiny model that speaks, and servers around it: real processes, started by the command line."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

NAME = "tiny"
SMALL = ("--memory", "600MB", "--max-model-len", "2048", "--threads", "1", "--max-num-seqs", "8")


class RunningServer:
    """A server process and what it has written."""

    def __init__(self, process: subprocess.Popen[str], url: str, log: list[str]) -> None:
        self.process = process
        self.url = url
        self.log = log
        self._client = httpx.Client(timeout=120, trust_env=False, verify=False)

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def get(self, path: str, **options: object) -> httpx.Response:
        return self._client.get(self.url + path, **options)  # type: ignore[arg-type]

    def post(self, path: str, body: object = None, **options: object) -> httpx.Response:
        return self._client.post(self.url + path, json=body, **options)  # type: ignore[arg-type]

    def complete(self, prompt: object = "hello", **parameters: object) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": prompt, "temperature": 0, "ignore_eos": True, **parameters})

    def engine_pid(self) -> int:
        """Of the only child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        assert len(children) == 1
        return int(children[0])

    def metric(self, name: str, **labels: str) -> float:
        """A sample's value, summed over labels that are not given; 0 if there is none."""
        total = 0.0
        for line in self.get("/metrics").text.splitlines():
            match = re.match(rf"{re.escape(name)}(?:{{(.*)}})? (\S+)$", line)
            if match and all(f'{label}="{value}"' in (match[1] or "") for label, value in labels.items()):
                total += float(match[2])
        return total

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n" + "\n".join(self.log[-20:])
            time.sleep(0.02)

    def until_idle(self) -> None:
        """Until no request runs and no page is held."""
        self.until(
            lambda: (
                self.metric("tokenmill:kv_pages", state="used") == 0
                and self.metric("vllm:num_requests_running") == 0
                and self.metric("vllm:num_requests_waiting") == 0
            ),
            "every page is back",
        )

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


def command(model: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "tokenmill", "serve", str(model), *options]


@contextlib.contextmanager
def serving(model: Path, *options: str, name: str = NAME, port: int = 0) -> Iterator[RunningServer]:
    """``tokenmill serve`` on a free port until the block ends."""
    process = subprocess.Popen(
        command(model, "--served-model-name", name, "--port", str(port), *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    log: list[str] = []
    assert process.stderr is not None
    assert process.stdout is not None
    reader = threading.Thread(
        target=lambda lines: log.extend(line.rstrip("\n") for line in lines), args=[process.stderr]
    )
    reader.start()
    try:
        address = re.search(r"(https?://\S+)/v1$", process.stdout.readline().rstrip())
        assert address is not None, "\n".join(log)
        yield RunningServer(process, address[1], log)
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()
        process.stderr.close()
