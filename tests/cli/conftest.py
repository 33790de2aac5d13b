"""Runs the command line in this process, with a model that answers at once or a real one."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest

from tokenmill.cli import main
from tokenmill.sampling import SamplingParams


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def run(*arguments: str, stdin: str | bytes = "") -> Result:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        monkeypatch.setattr(sys, "argv", ["tokenmill", *arguments])
        code = 0
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return run


class FakeTokenizer:
    """One token per character; chat prompts are the messages one after the other."""

    def __init__(self, chat_template: str | None = "{{ messages }}") -> None:
        self.chat_template = chat_template

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages))


@dataclass
class Chunk:
    text: str
    token_ids: list[int]
    finish_reason: str | None = None


@dataclass
class FakeLLM:
    """Answers from a script: each answer is a list of chunks; an exception in it is raised at that point."""

    answers: list[list[str | BaseException]] = field(default_factory=list)
    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)
    generation_defaults: dict[str, Any] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    params: list[Any] = field(default_factory=list)
    cancelled: int = 0
    closed: bool = False

    def stream(self, prompt: Sequence[int], params: Any) -> Iterator[Chunk]:
        self.prompts.append("".join(map(chr, prompt)))
        self.params.append(params)
        script = self.answers[len(self.prompts) - 1]
        finished = False
        try:
            for index, piece in enumerate(script):
                if isinstance(piece, BaseException):
                    raise piece
                yield Chunk(piece, [index], "stop" if index == len(script) - 1 else None)
            finished = True
        finally:
            self.cancelled += not finished

    def default_params(self, **overrides: Any) -> SamplingParams:
        return SamplingParams.from_defaults(self.generation_defaults, **overrides)

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.closed = True


@pytest.fixture
def fake_llm(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    """What `generate` and `chat` open instead of a model."""
    llm = FakeLLM()
    for verb in ("generate", "chat"):
        monkeypatch.setattr(importlib.import_module(f"tokenmill.cli.{verb}"), "open_model", lambda *_, **__: llm)
    return llm
