"""Options that several verbs share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

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
    int | None, typer.Option("--max-model-len", min=2, help="Longest context in tokens. Default: what fits.")
]
Threads = Annotated[int, typer.Option("--threads", min=0, help="0: all that the process may use.")]
BackendName = Annotated[str, typer.Option("--backend", help="native, or torch (slow; the reference).")]


def sampling_overrides(**given: Any) -> dict[str, Any]:
    """The sampling parameters that were given, for the model's defaults to be overridden with.

    Raises SamplingError for one that no model can take, which is then known before a model is fetched and loaded.
    """
    from tokenmill.sampling import SamplingParams

    overrides = {name: value for name, value in given.items() if value is not None}
    SamplingParams(**overrides)
    return overrides
