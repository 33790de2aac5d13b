"""``tokenmill bench profile``: where a step's time goes, op by op."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from tokenmill.cli.measuring import JsonFile, Plot, Rounds, write
from tokenmill.cli.options import Memory, Model, Threads
from tokenmill.cli.terminal import print_table

if TYPE_CHECKING:
    from tokenmill.bench.profile import EngineStep, StepProfile


def profile(
    model: Model,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Tokens of the prefill chunk.")] = 512,
    depth: Annotated[int, typer.Option("--depth", min=0, help="Tokens before those of the decode step.")] = 512,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences of the decode step.")] = 1,
    rounds: Rounds = 10,
    threads: Threads = 0,
    memory: Memory = None,
    json_file: JsonFile = None,
    plot: Plot = None,
) -> None:
    """Time each op of a prefill chunk and of a decode step, and set it against the machine's limits."""
    from tokenmill.bench.plot import check_ending, draw_profile
    from tokenmill.bench.profile import profile_model
    from tokenmill.sources import resolve

    check_ending(plot)
    path = resolve(model)
    result = profile_model(
        path,
        prompt_tokens=prompt_tokens,
        depth=depth,
        sequences=batch,
        rounds=rounds,
        threads=threads,
        memory=memory,
    )
    limits = result.limits
    print(
        f"{model}: {result.threads} threads, {result.isa}; limits: memory {limits.memory / 1e9:.1f} GB/s, "
        f"cache {limits.cache / 1e9:.1f} GB/s, int8 {limits.int8 / 1e12:.3f} TOPS, fp32 {limits.f32 / 1e12:.3f} TFLOPS"
    )
    for step in result.steps:
        _print(step)
    if result.engine is not None:
        _print_engine(result.engine, result.steps[-1])
    figures = {"model": model, **asdict(result)}
    write(json_file, "profile", figures, path)
    if plot is not None:
        draw_profile(plot, figures)


def _print(step: StepProfile) -> None:
    named = f"prefill of {step.tokens} tokens"
    if step.phase == "decode":
        named = f"decode of {step.sequences} sequence{'s' * (step.sequences > 1)} at depth {step.depth}"
    inside = sum(op.seconds for op in step.ops)
    print(
        f"\n{named}: {1e3 * step.seconds:.3f} ms a step, {100 * step.limit_seconds / step.seconds:.1f} % of the limit "
        f"({1e3 * step.limit_seconds:.3f} ms); without clocks {1e3 * step.untimed_seconds:.3f} ms"
    )
    rows = [
        (
            role.role,
            str(role.count),
            f"{1e3 * role.seconds:.3f}",
            f"{100 * role.seconds / step.seconds:.1f} %",
            f"{role.bytes / 1e6:.2f}",
            f"{role.operations / 1e9:.3f}",
            f"{100 * role.share_of_limit:.1f} %",
        )
        for role in sorted(step.roles, key=lambda role: -role.seconds)
    ]
    outside = step.seconds - inside - step.prepare_seconds
    for name, seconds in (("preparing the step", step.prepare_seconds), ("call from Python", outside)):
        rows.append((name, "", f"{1e3 * seconds:.3f}", f"{100 * seconds / step.seconds:.1f} %", "", "", ""))
    print(
        f"{step.forks} forks: {1e6 * step.joining_seconds:.0f} us of the step are no thread's work; "
        f"a thread waits {1e6 * step.waiting_seconds:.0f} us for others "
        f"({100 * step.waiting_seconds / step.seconds:.1f} %)"
    )
    print_table(("op", "count", "ms", "of step", "MB", "Gop", "of limit"), rows, right=range(1, 7))


def _print_engine(engine: EngineStep, decode: StepProfile) -> None:
    between = engine.seconds - engine.network_seconds
    outside = between + decode.prepare_seconds + decode.joining_seconds
    print(
        f"\nin the engine: {1e3 * engine.seconds:.3f} ms a decode step, {1e6 * between:.0f} us of it between two runs "
        f"of the network (Python and the sampler); with preparing, forking and joining {1e6 * outside:.0f} us, "
        f"{100 * outside / engine.seconds:.1f} %"
    )
