"""How messages cross from the front process to the engine's and back: msgpack frames on a Unix socket.

A frame is a length (4 bytes, little-endian) and a list of messages, each with the name of its class. Both ends run the
same code on the same machine, so a frame needs no version and arrays travel as they lie in memory. Nothing is pickled:
what arrives can only become one of the classes named here.
"""

from __future__ import annotations

import functools
import operator
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from tokenmill.backends.backend import Float32
from tokenmill.engine.kv_cache import PoolUsage
from tokenmill.engine.ledger import MemoryLedger
from tokenmill.engine.messages import AbortRequest, AddRequest, Embedded, Failed, Finished, PromptScored, TokenOutput
from tokenmill.engine.statistics import StepRecord

LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 1 << 30
"""A frame beyond this is a fault of the program, not a message."""


@dataclass(frozen=True, slots=True)
class LoadModel:
    """The first message to an engine process: load ``path`` with the fields of an ``EngineConfig``."""

    path: str
    config: dict[str, str | int | float | bool | None]


@dataclass(frozen=True, slots=True)
class ResetPrefixCache:
    """Forget what was computed so far: no request that starts later finds it."""


@dataclass(frozen=True, slots=True)
class Ping:
    """Asks for a report, which comes between two steps: whoever hangs does not answer."""


@dataclass(frozen=True, slots=True)
class Loading:
    """The model is being loaded, and it got a step further: whoever hangs does not say so."""


@dataclass(frozen=True, slots=True)
class EngineReady:
    """The model is loaded and requests may come."""

    architecture: str
    vocab_size: int
    """Rows of logits: ids below it are valid in prompts."""
    hidden_size: int
    """Width of an embedding."""
    max_position: int
    """Longest context that the model itself allows."""
    ledger: MemoryLedger
    seconds: dict[str, float]
    """Where the time of the start went."""


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """The model could not be loaded, or a step went wrong; the process ends. ``exit_code`` is that of the error."""

    error: str
    exit_code: int = 1


@dataclass(frozen=True, slots=True)
class EngineReport:
    """State between two steps."""

    preemptions: int
    """Since the start."""
    usage: list[PoolUsage]
    """Pages of each KV group."""
    running: int
    """Sequences that hold pages."""
    waiting: int
    prefix_queries: int
    """Tokens of the sequences that have started, and those of them that the prefix cache had; since the start."""
    prefix_hits: int
    step: StepRecord | None
    """What ran since the last report."""


ToEngine = LoadModel | AddRequest | AbortRequest | ResetPrefixCache | Ping
FromEngine = (
    Loading | EngineReady | EngineFailed | EngineReport | PromptScored | Embedded | TokenOutput | Finished | Failed
)

_CLASSES: tuple[type[Any], ...] = (
    LoadModel,
    AddRequest,
    AbortRequest,
    ResetPrefixCache,
    Ping,
    Loading,
    EngineReady,
    EngineFailed,
    EngineReport,
    PromptScored,
    Embedded,
    TokenOutput,
    Finished,
    Failed,
)
# A union of plain dataclasses cannot be told apart when it is read, one of tagged structs can.
_TAGGED: dict[type[Any], Any] = {
    each: msgspec.defstruct(each.__name__, [("message", each)], tag=each.__name__, array_like=True, frozen=True)
    for each in _CLASSES
}


def _plain(value: object) -> bytes:
    if isinstance(value, np.ndarray):
        return value.astype(np.float32 if value.dtype.kind == "f" else np.int32, copy=False).tobytes()
    raise TypeError(f"a {type(value).__name__} cannot be sent to the engine")


def _from_plain(kind: object, value: bytes) -> np.ndarray[Any, Any]:
    return np.frombuffer(value, dtype=np.float32 if kind == Float32 else np.int32)


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(
    list[functools.reduce(operator.or_, _TAGGED.values())],  # type: ignore[misc]
    dec_hook=_from_plain,
)


def encode_frame(messages: Sequence[ToEngine | FromEngine]) -> bytes:
    """One frame, its length in front."""
    body = _encoder.encode([_TAGGED[type(message)](message) for message in messages])
    return LENGTH.pack(len(body)) + body


def decode_body(body: bytes | bytearray) -> list[Any]:
    """The messages of a frame without its length. Raises msgspec.MsgspecError for bytes that are none."""
    return [tagged.message for tagged in _decoder.decode(body)]
