"""Logits of another engine for a text's windows, on the same file and tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tokenmill import _native
from tokenmill.bench.peers import Peer, problem
from tokenmill.bench.worker_process import WorkerError, WorkerProcess
from tokenmill.evaluate.kl import Float32
from tokenmill.sources import resolve


class PeerRun:
    """An open engine; ``build`` is its version and build line."""

    def __init__(self, worker: WorkerProcess, build: str, vocabulary: int, folder: Path, timeout: float) -> None:
        self.build = build
        self._worker = worker
        self._vocabulary = vocabulary
        self._file = folder / "logits.f32"
        self._timeout = timeout

    def rows(self, windows: Sequence[Sequence[int]]) -> Iterator[Float32]:
        """Logits ``[tokens, vocabulary]`` of each window, run as a sequence of its own; valid until the next.

        Raises WorkerError if the engine fails or answers for another number of tokens.
        """
        for window in windows:
            request = {"do": "logits", "windows": [list(window)], "out": str(self._file)}
            answer = self._worker.ask(request, self._timeout)
            if (answer["rows"], answer["vocabulary"]) != (len(window), self._vocabulary):
                raise WorkerError(
                    f"gave {answer['rows']} rows of {answer['vocabulary']} tokens, asked for {len(window)} rows of "
                    f"{self._vocabulary}"
                )
            yield np.memmap(self._file, np.float32, "r", shape=(len(window), self._vocabulary))


@contextmanager
def open_peer(
    peer: Peer, python: str, model: str, vocabulary: int, context: int, threads: int = 0, timeout: float = 3600.0
) -> Iterator[PeerRun]:
    """``peer`` with the interpreter ``python``, ready for windows of ``context`` tokens. Raises WorkerError."""
    if (reason := problem(peer, python)) is not None:
        raise WorkerError(reason)
    threads = threads or _native.usable_cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        worker = WorkerProcess(peer.worker, python, {"OMP_NUM_THREADS": str(threads)})
        try:
            task = {"model": str(resolve(model).absolute()), "threads": threads, "sequences": 1, "scratch": folder}
            opened = worker.ask({"do": "open", "context": context, **task}, timeout)
            yield PeerRun(worker, f"{opened['version']}; {opened['build']}", vocabulary, Path(folder), timeout)
        finally:
            worker.close()
