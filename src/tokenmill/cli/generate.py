"""``tokenmill generate MODEL PROMPT``: one answer, its text alone on standard output."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from tokenmill.cli import options
from tokenmill.cli.answer import open_model, stream_answer
from tokenmill.cli.terminal import say
from tokenmill.errors import UsageError

if TYPE_CHECKING:
    from tokenmill.llm import LLM


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    *,
    max_tokens: options.MaxTokens = 256,
    sampling: options.SamplingOptions,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="Text that ends the answer; may be given repeatedly.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message, for chat models.")] = None,
    raw: Annotated[
        bool | None,
        typer.Option(
            "--raw/--chat", help="Continue the prompt as it is, or answer it. Default: --chat if the model can."
        ),
    ] = None,
    loading: options.LoadOptions,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on standard error but errors.")] = False,
) -> None:
    """Generate text from a prompt."""
    if raw and system is not None:
        raise UsageError("--system needs a chat template, and --raw switches it off")
    text = read_prompt(prompt)
    overrides = sampling.overrides(max_tokens=max_tokens, stop=stop)
    with open_model(model, loading, quiet=quiet) as llm:
        params = llm.default_params(**overrides)
        answer = stream_answer(llm, prompt_tokens(llm, text, system, raw), params)
        sys.stdout.write("\n")
        sys.stdout.flush()
        if not quiet:
            say(answer.summary())
        if answer.finish_reason == "interrupted":
            raise KeyboardInterrupt


def read_prompt(prompt: str) -> str:
    """The prompt, or standard input for "-". Raises UsageError if it is empty or not text."""
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise UsageError(f"standard input is not UTF-8 text: {error}") from error
    else:
        try:
            prompt = os.fsencode(prompt).decode()  # the argument's own bytes, whatever the locale made of them
        except UnicodeDecodeError as error:
            raise UsageError(f"the prompt is not UTF-8 text: {error}") from error
    if not prompt:
        raise UsageError("the prompt is empty")
    return prompt


def prompt_tokens(llm: LLM, text: str, system: str | None, raw: bool | None) -> list[int]:
    """Token ids of the prompt: through the chat template, or as it is.

    ``raw`` None uses the template if the model has one.
    """
    tokenizer = llm.tokenizer
    if raw or (raw is None and tokenizer.chat_template is None):
        if system is not None:
            raise UsageError("--system needs a chat template, and this model has none")
        return tokenizer.encode(text)
    if tokenizer.chat_template is None:
        raise UsageError("--chat needs a chat template, and this model has none; use --raw")
    messages = [{"role": "system", "content": system}] if system is not None else []
    return tokenizer.encode_chat([*messages, {"role": "user", "content": text}])
