"""One answer on the command line: opening the model, streaming text to standard output, and what it took."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from tokenmill.cli.terminal import say
from tokenmill.errors import UsageError

if TYPE_CHECKING:
    from tokenmill.cli.options import LoadOptions
    from tokenmill.llm import LLM
    from tokenmill.sampling import SamplingParams


@dataclass(slots=True)
class Answer:
    """Text and timing of one answer. Times are in seconds from the request."""

    prompt_tokens: int
    text: str = ""
    tokens: int = 0
    first_token: float = 0.0
    total: float = 0.0
    finish_reason: str | None = None
    """"stop", "length", or "interrupted" after Ctrl-C."""

    def summary(self) -> str:
        """One line: tokens in, time to the first, tokens out and their rate."""
        parts = [f"{self.prompt_tokens} prompt tokens"]
        if self.tokens:
            parts.append(f"first token after {self.first_token:.2f} s")
        parts.append(f"{self.tokens} tokens in {self.total:.2f} s")
        if self.tokens > 1 and self.total > self.first_token:
            parts.append(f"{(self.tokens - 1) / (self.total - self.first_token):.1f} tokens/s")
        if self.finish_reason in ("length", "interrupted"):
            parts.append("stopped at --max-tokens" if self.finish_reason == "length" else "interrupted")
        return ", ".join(parts)


def open_model(model: str, loading: LoadOptions, quiet: bool = False) -> LLM:
    """Resolves (and pulls) ``model`` and loads it, saying on standard error where the time goes."""
    from tokenmill.engine.config import EngineConfig
    from tokenmill.sources import SilentProgress, TerminalProgress, resolve

    given = asdict(loading) | {"backend": backend_name(loading.backend)}
    EngineConfig(model=model, **given)  # refuses what no model can have before one is fetched
    path = resolve(model, SilentProgress() if quiet else TerminalProgress())
    started = time.perf_counter()
    from tokenmill.llm import LLM

    imported = time.perf_counter()
    if not quiet:
        say(f"loading {path}")
    llm = LLM(path, **given)
    if not quiet:
        laps = {"import the engine": imported - started, **llm.start_seconds}
        parts = ", ".join(f"{what} {seconds:.2f}" for what, seconds in laps.items() if seconds >= 0.01)
        say(f"ready in {time.perf_counter() - started:.2f} s ({parts})")
    return llm


def backend_name(name: str) -> Literal["native", "torch"]:
    """The backend that ``--backend`` names. Raises UsageError."""
    if name == "native":
        return "native"
    if name == "torch":
        return "torch"
    raise UsageError(f"--backend is {name!r}; it must be native or torch")


def stream_answer(llm: LLM, prompt: Sequence[int], params: SamplingParams) -> Answer:
    """Writes the answer to standard output as it comes.

    Ctrl-C ends the answer: the request is cancelled, and what was written so far is returned as "interrupted".
    """
    answer = Answer(prompt_tokens=len(prompt))
    started = time.perf_counter()
    try:
        with closing(llm.stream(prompt, params)) as chunks:
            for chunk in chunks:
                if answer.tokens == 0:
                    answer.first_token = time.perf_counter() - started
                answer.tokens += len(chunk.token_ids)
                answer.text += chunk.text
                answer.finish_reason = chunk.finish_reason or answer.finish_reason
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
    except KeyboardInterrupt:
        answer.finish_reason = "interrupted"
    answer.total = time.perf_counter() - started
    return answer
