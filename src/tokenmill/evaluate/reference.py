"""A reference run: log-probabilities of every next token, kept on disk for any number of runs to be compared with.

Stored as ``-log p`` in 16-bit fixed point, rows ``[positions, vocabulary]``, in steps of 2^-11 up to 32 nats (less
probable tokens count as e^-32): half the size of fp32, and closer than fp16, whose steps are 2^-8 at the 4 to 8 nats
where most of the distribution lies. Tests bound what this does to a KL divergence. Rows go to the file as they come,
so memory holds one block of them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tokenmill.errors import TokenmillError
from tokenmill.evaluate.kl import LOG_ROWS, log_softmax

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

_STEPS = 2048  # per nat
_LEAST = -65535 / _STEPS


class ReferenceError(TokenmillError):
    """A reference that cannot be stored, or does not fit the run that is compared with it."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """A run against its reference, one value a position."""

    kl: Float64
    same_top: npt.NDArray[np.bool_]
    probability_error: Float64
    """Change of the probability of the token that the text has next: run minus reference."""


class Reference:
    """Stored rows of one run."""

    def __init__(self, path: Path, positions: int, vocabulary: int) -> None:
        self._rows = np.memmap(path, np.uint16, "r", shape=(positions, vocabulary))

    @property
    def shape(self) -> tuple[int, int]:
        """Positions and vocabulary."""
        return self._rows.shape[0], self._rows.shape[1]

    def compare(self, rows: Iterable[Float32], targets: npt.NDArray[np.int64]) -> Divergence:
        """Divergence of streamed logit rows, all positions in order; ``targets`` are the text's next tokens.

        Raises ReferenceError if rows have another vocabulary or number.
        """
        kl, same, error, start = [], [], [], 0
        for block in rows:
            for begin in range(0, len(block), LOG_ROWS):
                q = np.maximum(log_softmax(block[begin : begin + LOG_ROWS]), _LEAST)
                if q.shape[1] != self.shape[1] or start + len(q) > self.shape[0]:
                    raise ReferenceError(
                        f"the run has rows of {q.shape[1]} tokens beyond position {start}, "
                        f"the reference {self.shape[0]} rows of {self.shape[1]}"
                    )
                p = self._rows[start : start + len(q)] / -float(_STEPS)
                p -= np.log(np.exp(p).sum(axis=1, keepdims=True))  # rounding left the sum a little off 1
                mass = np.exp(p)
                kl.append((mass * (p - q)).sum(axis=1))
                same.append(p.argmax(axis=1) == q.argmax(axis=1))
                at = np.arange(len(q)), targets[start : start + len(q)]
                error.append(np.exp(q[at]) - mass[at])
                start += len(q)
        if start != self.shape[0]:
            raise ReferenceError(f"the run has {start} rows, the reference {self.shape[0]}")
        return Divergence(np.concatenate(kl), np.concatenate(same), np.concatenate(error))


def stored_reference(
    folder: Path, identity: Mapping[str, object], positions: int, vocabulary: int, run: Callable[[], Iterable[Float32]]
) -> tuple[Reference, bool]:
    """The reference of ``identity`` (model, text, windows, backend): from ``folder``, or run and stored there.

    Returns it and whether it was there. ``run`` yields blocks of logits. Raises ReferenceError if the disk is full.
    """
    key = hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()[:32]
    path = folder / f"{key}.log"
    if path.exists() and path.stat().st_size == 2 * positions * vocabulary:
        return Reference(path, positions, vocabulary), True
    part = path.with_suffix(f".part{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            # Room is taken first: a full disk is found out now and not after an hour.
            os.posix_fallocate(file.fileno(), 0, 2 * positions * vocabulary)
            written = 0
            for block in run():
                for begin in range(0, len(block), LOG_ROWS):
                    logs = log_softmax(block[begin : begin + LOG_ROWS])
                    file.write(np.rint(np.maximum(logs, _LEAST) * -_STEPS).astype(np.uint16).tobytes())
                    written += len(logs)
        if written != positions:
            raise ReferenceError(f"the reference run gave {written} rows, {positions} were expected")
        path.with_suffix(".json").write_text(json.dumps(dict(identity), indent=2) + "\n")
        part.rename(path)
    except OSError as error:
        need = 2 * positions * vocabulary / 1e9
        raise ReferenceError(f"{folder}: the reference ({need:.1f} GB) cannot be stored: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
    return Reference(path, positions, vocabulary), False
