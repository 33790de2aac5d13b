"""How a pull tells what it is doing: lines and a bar on standard error, or nothing."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

SetBytes = Callable[[int], None]
"""Moves a bar: this many bytes of its total are there."""


class PullProgress(Protocol):
    """Receives the state of a pull."""

    def note(self, message: str) -> None:
        """A line for the user: a source tried, a source that failed, waiting for another process."""

    def transfer(self, description: str, total: int) -> AbstractContextManager[SetBytes]:
        """Shows a bar over ``total`` bytes inside of a ``with`` block."""


class SilentProgress:
    """Reports nothing."""

    def note(self, message: str) -> None:
        pass

    @contextmanager
    def transfer(self, description: str, total: int) -> Iterator[SetBytes]:
        yield lambda done: None


class TerminalProgress:
    """Lines and bars on standard error; without a terminal a bar becomes one line."""

    def note(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    @contextmanager
    def transfer(self, description: str, total: int) -> Iterator[SetBytes]:
        if not sys.stderr.isatty():
            self.note(f"{description} ({total / 1e6:,.0f} MB)")
            yield lambda done: None
            return
        from rich import progress as bars
        from rich.console import Console

        with bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.DownloadColumn(),
            bars.TransferSpeedColumn(),
            bars.TimeRemainingColumn(),
            console=Console(stderr=True),
        ) as progress:
            task = progress.add_task(description, total=total)
            yield lambda done: progress.update(task, completed=min(done, total))


@contextmanager
def follow_folder(folder: Path, set_bytes: SetBytes, interval: float = 0.2) -> Iterator[None]:
    """Reports the size of everything in ``folder`` while the block runs.

    The tools that download for us (pip, huggingface_hub) differ in how they report, and by version; the bytes that
    they have written do not.
    """
    done = threading.Event()

    def watch() -> None:
        while not done.wait(interval):
            set_bytes(folder_bytes(folder))

    watcher = threading.Thread(target=watch, name="pull-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def folder_bytes(folder: Path) -> int:
    """Bytes in the files below ``folder``; what is unreadable or vanishes meanwhile counts as nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size  # a link's target is counted where it lies
    return total
