"""``tokenmill bench compare``: the same work on Tokenmill and on other engines, in turn."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from tokenmill.cli.measuring import JsonFile, Plot, Rounds, write
from tokenmill.cli.options import Model, Threads
from tokenmill.cli.terminal import print_table, say

if TYPE_CHECKING:
    from tokenmill.bench.compare import Comparison, Metric


def compare(
    model: Model,
    peer: Annotated[
        list[str] | None,
        typer.Option("--peer", help="NAME or NAME=PYTHON; repeat it. Default: all that `bench peers` installed."),
    ] = None,
    workload: Annotated[
        list[str] | None, typer.Option("--workload", help="latency or throughput; repeat it. Default: both.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Of the latency workload.")] = 512,
    requests: Annotated[int, typer.Option("--requests", min=2, help="Of the throughput workload.")] = 32,
    input_tokens: Annotated[int, typer.Option("--input-tokens", min=1, help="Of the throughput workload.")] = 128,
    output_tokens: Annotated[int, typer.Option("--output-tokens", min=2, help="Of each request.")] = 64,
    rounds: Rounds = 5,
    threads: Threads = 0,
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="Seconds an engine has for one answer.")] = 600.0,
    json_file: JsonFile = None,
    plot: Plot = None,
) -> None:
    """Run the same work on Tokenmill and on other engines in turn, and print the ratios.

    Every engine has a process of its own, the same file, threads and tokens, and its best settings, which are printed.
    """
    from tokenmill.bench.compare import Workload
    from tokenmill.bench.compare import compare as measure
    from tokenmill.bench.peers import PEERS, environment_python, parse_peer
    from tokenmill.bench.plot import check_ending, draw_comparison
    from tokenmill.errors import UsageError
    from tokenmill.sources import resolve

    check_ending(plot)
    names = peer or [name for name in PEERS if environment_python(name).exists()]
    if not names:
        raise UsageError("there is no peer to compare with: give --peer, or see `tokenmill bench peers list`")
    peers = [parse_peer(name) for name in names]
    known = {
        "latency": Workload("latency", 1, prompt_tokens, output_tokens),
        "throughput": Workload("throughput", requests, input_tokens, output_tokens),
    }
    for name in workload or ():
        if name not in known:
            raise UsageError(f"--workload is {name!r}; it must be latency or throughput")
    path = resolve(model)
    comparisons = [
        measure(path, peers, known[name], rounds=rounds, threads=threads, timeout=timeout, say=say)
        for name in workload or list(known)
    ]
    for comparison in comparisons:
        _print(model, comparison)
    figures = {"model": model, "comparisons": [asdict(comparison) for comparison in comparisons]}
    write(json_file, "compare", figures, path)
    if plot is not None:
        draw_comparison(plot, figures)


def _print(model: str, comparison: Comparison) -> None:
    w = comparison.workload
    many = "" if w.alone else f"{w.requests} requests, "
    print(
        f"\n{w.name}, {model}: {many}{w.input_tokens} tokens in, {w.output_tokens} out, "
        f"{comparison.threads} threads, {comparison.rounds} rounds in turn"
    )
    if comparison.memory_read_bytes_per_second and comparison.int8_operations_per_second:
        print(
            f"limits beside the samples: read {comparison.memory_read_bytes_per_second.median / 1e9:.1f} GB/s, "
            f"int8 {comparison.int8_operations_per_second.median / 1e12:.3f} TOPS"
        )
    for name in comparison.engines[0].metrics:
        head = (f"{name} tokens/s", "median (range)", "of limit", "tokenmill / it")
        print_table(head, [(engine.name, *_cells(engine.metrics[name])) for engine in comparison.engines])
    for engine in comparison.engines:
        if engine.build:
            settings = ", ".join(f"{name}={value}" for name, value in engine.settings.items())
            print(f"{engine.name}: {engine.version}; {engine.build}; {settings}; opened in {engine.load_seconds:.1f} s")
        if engine.error is not None:
            print(f"{engine.name} FAILED: {engine.error}")


def _cells(metric: Metric) -> tuple[str, str, str]:
    return (
        "failed" if metric.rate is None else metric.rate.text(1),
        "" if metric.share is None else f"{100 * metric.share.median:.1f} %",
        "" if metric.ratio is None else metric.ratio.text(2),
    )
