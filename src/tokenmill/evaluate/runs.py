"""One model run over a text's windows: which model, backend and number formats, written ``MODEL@BACKEND/KV+int8``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tokenmill.backends.backend import Backend, StepLimits
from tokenmill.bare_model import BackendName, open_bare
from tokenmill.engine.config import KV_ELEMENTS
from tokenmill.errors import UsageError
from tokenmill.evaluate.kl import LOG_ROWS
from tokenmill.evaluate.logits import logits_by_position
from tokenmill.sources import resolve
from tokenmill.tokenizer import Tokenizer, load_tokenizer
from tokenmill.weights.checkpoint import open_checkpoint

Float32 = npt.NDArray[np.float32]

ROWS = 64
"""Rows of logits at a time: what bounds memory."""
_COPIES = 6
"""Arrays of log-probabilities that scoring and comparing hold at once, in double precision."""


@dataclass(frozen=True, slots=True)
class RunSpec:
    """How to run a model. ``int8`` rounds the torch backend's activations as the native one does."""

    model: str
    backend: BackendName = "native"
    kv: str = "f16"
    int8: bool = False

    def __str__(self) -> str:
        return f"{self.model}@{self.settings}"

    @property
    def settings(self) -> str:
        """All but the model."""
        return f"{self.backend}/{self.kv}{'+int8' if self.int8 else ''}"


def parse_run(text: str, model: str | None = None) -> RunSpec:
    """``MODEL``, ``MODEL@native``, ``MODEL@native/bf16``, ``MODEL@torch/f32+int8``; ``model`` stands for a missing one.

    The torch backend's KV is fp32 unless said otherwise. Raises UsageError.
    """
    found = re.fullmatch(r"(?:(?P<model>.+)@)?(?P<backend>native|torch)(?:/(?P<kv>\w+))?(?P<int8>\+int8)?", text)
    if found is None and model is None:
        return RunSpec(text)
    if found is None or (found["model"] or model) is None:
        raise UsageError(f"{text!r} is no run; write native, native/bf16, torch, torch/f16 or torch/f32+int8")
    backend: BackendName = "torch" if found["backend"] == "torch" else "native"
    kv = found["kv"] or ("f32" if backend == "torch" else "f16")
    if kv not in KV_ELEMENTS:
        raise UsageError(f"{text!r} names the KV element {kv!r}; it must be one of {', '.join(KV_ELEMENTS)}")
    if found["int8"] and backend != "torch":
        raise UsageError(f"{text!r}: +int8 is for the torch backend; the native one always rounds activations")
    name = found["model"] or model
    assert name is not None
    return RunSpec(name, backend, kv, found["int8"] is not None)


@dataclass(frozen=True, slots=True)
class TextModel:
    """What cutting a text into windows needs, without weights."""

    path: Path
    digest: str
    vocabulary: int
    tokenizer: Tokenizer

    @property
    def bos(self) -> int | None:
        """The token that the model wants before a text, if it wants one; to others it is a token like no other."""
        prefix = self.tokenizer.encode("", add_special=True)
        return prefix[0] if prefix else None

    def encode(self, text: str) -> list[int]:
        """The text's own tokens."""
        return self.tokenizer.encode(text, add_special=False, parse_special=False)


def read_text_model(model: str) -> TextModel:
    """Raises SourceError and ModelFileError."""
    from tokenmill.models import bind

    path = resolve(model)
    with open_checkpoint(path) as checkpoint:
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        bound = bind(checkpoint.metadata, checkpoint.kind, shapes, None, checkpoint.decode)
        return TextModel(path, checkpoint.content_digest(), bound.program.vocab_size, load_tokenizer(checkpoint))


@contextmanager
def open_run(
    spec: RunSpec, context: int, threads: int = 0, memory: str | None = None, vocabulary: int = 0
) -> Iterator[Backend]:
    """The run's backend, ready for one sequence of ``context`` tokens.

    ``memory`` is its budget, with room for log-probabilities over ``vocabulary`` tokens. Raises as ``open_bare`` does.
    """
    limits = StepLimits(tokens=ROWS, sequences=1, sampled=ROWS, context=context)
    with open_bare(
        resolve(spec.model),
        limits,
        backend=spec.backend,
        kv_element=KV_ELEMENTS[spec.kv],
        emulate_activations=spec.int8,
        threads=threads,
        memory=memory,
        beside=_COPIES * 8 * LOG_ROWS * vocabulary,
    ) as model:
        yield model.backend


def all_rows(backend: Backend, windows: Sequence[Sequence[int]]) -> Iterator[Float32]:
    """Logits at every position of every window, a block at a time; a block is valid until the next."""
    for window in windows:
        for _, rows in logits_by_position(backend, window):
            yield rows
