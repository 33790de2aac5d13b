"""Options that several verbs share, and groups of them that verbs take as one (:mod:`tokenmill.cli.verbs`)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Argument(help="Name, .gguf file, folder, or org/name on the hub.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens to generate.")]
Memory = Annotated[
    str | None, typer.Option("--memory", help="Memory budget, e.g. 4GB. Default: from the machine or its cgroup.")
]
MaxModelLen = Annotated[
    int | None, typer.Option("--max-model-len", min=2, help="Longest context in tokens. Default: what fits.")
]
Threads = Annotated[int, typer.Option("--threads", min=0, help="0: all that the process may use.")]
BackendName = Annotated[str, typer.Option("--backend", help="native, or torch (slow; the reference).")]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a model is loaded to answer."""

    memory: Memory = None
    max_model_len: MaxModelLen = None
    threads: Threads = 0
    backend: BackendName = "native"


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How tokens are chosen; what is not given is the model's default."""

    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0 picks the likeliest token. Default: the model's, else 1.")
    ] = None
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Keep the likeliest tokens up to this probability.")
    ] = None
    top_k: Annotated[int | None, typer.Option("--top-k", help="Keep this many likeliest tokens.")] = None
    min_p: Annotated[
        float | None, typer.Option("--min-p", help="Keep tokens of at least this share of the likeliest.")
    ] = None
    repetition_penalty: Annotated[
        float | None, typer.Option("--repetition-penalty", help="Above 1 discourages repeats.")
    ] = None
    seed: Annotated[int | None, typer.Option("--seed", help="Same seed, same text.")] = None

    def overrides(self, **more: Any) -> dict[str, Any]:
        """These and ``more``, as far as they were given, for the model's defaults to be overridden with.

        Raises SamplingError for one that no model can take, which is then known before a model is fetched and loaded.
        """
        from tokenmill.sampling import SamplingParams

        overrides = {name: value for name, value in (asdict(self) | more).items() if value is not None}
        SamplingParams(**overrides)
        return overrides
