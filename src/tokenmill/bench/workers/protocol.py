"""What a worker is asked and what it answers: one JSON object a line, on its standard input and output.

======================================================  ===============================================================
request                                                 answer
======================================================  ===============================================================
``{"do": "open", "model", "threads", "context",         ``{"engine", "version", "build", "settings", "load_seconds"}``
"sequences", "scratch"}``
``{"do": "latency", "prompt", "output_tokens"}``        ``{"prefill_seconds", "decode_seconds", "prompt_tokens",
                                                        "output_tokens"}``
``{"do": "throughput", "prompts", "output_tokens"}``    ``{"seconds", "prompt_tokens", "output_tokens"}``
``{"do": "logits", "windows", "out"}``                  ``{"rows", "vocabulary"}``; the file ``out`` holds them, fp32
======================================================  ===============================================================

Prompts are token ids. All engines decode greedily and go on past an end token. A request that fails is answered with
``{"error"}``. End of input ends the worker.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol


@dataclass
class Task:
    """What an engine has to be ready for."""

    model: str
    threads: int
    context: int
    """Most tokens of one sequence, prompt and output."""
    sequences: int
    """Most sequences at once."""
    scratch: str
    """A folder that lasts, for weights in another format."""


@dataclass
class Latency:
    """One request. Seconds from its arrival to its first token, and from there to its last."""

    prefill_seconds: float
    decode_seconds: float
    prompt_tokens: int
    output_tokens: int


@dataclass
class Throughput:
    """Many requests that arrive at once."""

    seconds: float
    prompt_tokens: int
    output_tokens: int


@dataclass
class Logits:
    """Logits at every position of some windows, each run as a new sequence."""

    rows: int
    vocabulary: int


@dataclass
class Identity:
    """What answered: enough to install the same again. ``settings`` are those that differ from the defaults."""

    engine: str
    version: str
    build: str
    settings: dict[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """An open engine. One that can say what it thinks of each token also has ``logits(windows, out) -> Logits``."""

    identity: Identity

    def latency(self, prompt: list[int], output_tokens: int) -> Latency:
        """Runs one prompt."""

    def throughput(self, prompts: list[list[int]], output_tokens: int) -> Throughput:
        """Runs all prompts together, as fast as the engine can."""


class CannotError(Exception):
    """What this engine cannot do, in a sentence."""


def serve(open_engine: Callable[[Task], Engine]) -> None:
    """Answers requests until the input ends. Whatever the engine prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    engine: Engine | None = None
    for line in sys.stdin:
        request = json.loads(line)
        what = request.pop("do")
        try:
            if what == "open":
                start = time.perf_counter()
                engine = open_engine(Task(**request))
                answer = {**asdict(engine.identity), "load_seconds": time.perf_counter() - start}
            elif engine is None:
                raise CannotError("no model is open")
            elif what == "latency":
                answer = asdict(engine.latency(**request))
            elif what == "throughput":
                answer = asdict(engine.throughput(**request))
            elif what == "logits" and hasattr(engine, "logits"):
                answer = asdict(engine.logits(**request))
            else:
                raise CannotError(f"does not know the request {what!r}")
        except CannotError as error:
            answer = {"error": str(error)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def processor_has(feature: str) -> bool:
    """Whether /proc/cpuinfo lists ``feature`` in its first processor's flags."""
    try:
        with open("/proc/cpuinfo") as file:
            return any(feature in line.split() for line in file if line.startswith(("flags", "Features")))
    except OSError:
        return False


def computes_bf16() -> bool:
    """True if the processor has instructions for bfloat16; without them, libraries emulate it."""
    return processor_has("avx512_bf16") or processor_has("amx_bf16")
