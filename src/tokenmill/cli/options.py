"""Options that several verbs share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tokenmill.llm import LLM
    from tokenmill.sampling import SamplingParams

MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens to generate.")]
Temperature = Annotated[
    float | None, typer.Option("--temperature", help="0 picks the likeliest token. Default: the model's, else 1.")
]
TopP = Annotated[float | None, typer.Option("--top-p", help="Keep the likeliest tokens up to this probability.")]
TopK = Annotated[int | None, typer.Option("--top-k", help="Keep this many likeliest tokens.")]
MinP = Annotated[float | None, typer.Option("--min-p", help="Keep tokens of at least this share of the likeliest.")]
RepetitionPenalty = Annotated[float | None, typer.Option("--repetition-penalty", help="Above 1 discourages repeats.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Same seed, same text.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="Text that ends the answer; may be given repeatedly.")]
Memory = Annotated[
    str | None, typer.Option("--memory", help="Memory budget, e.g. 4GB. Default: from the machine or its cgroup.")
]
MaxModelLen = Annotated[
    int | None, typer.Option("--max-model-len", min=1, help="Longest context in tokens. Default: what fits.")
]


def sampling_params(
    llm: LLM,
    *,
    max_tokens: int,
    stop: list[str] | None = None,
    **given: float | int | None,
) -> SamplingParams:
    """The model's own defaults, overridden by the options that were given (those that are not None)."""
    from tokenmill.sampling import SamplingParams

    overrides: dict[str, object] = {name: value for name, value in given.items() if value is not None}
    return SamplingParams.from_defaults(
        llm.generation_defaults, max_tokens=max_tokens, stop=tuple(stop or ()), **overrides
    )
