"""``tokenmill bench`` roofline, latency, throughput and startup: the limits, and this engine against them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from tokenmill.cli.measuring import JsonFile, Plot, Rounds, numbers, write
from tokenmill.cli.options import Memory, Model, Threads
from tokenmill.cli.terminal import megabytes, print_table, say


def roofline(threads: Threads = 0, json_file: JsonFile = None, plot: Plot = None) -> None:
    """Measure the limits: read bandwidth by level and threads, int8, bf16 and fp32 peaks of each path."""
    from tokenmill import _native
    from tokenmill.bench.plot import check_ending, draw_roofline
    from tokenmill.bench.record import processor_name
    from tokenmill.bench.roofline import measure_paths, measure_read_rates

    check_ending(plot)
    limits = measure_paths(threads)
    best = limits[_native.active_isa()]
    rates = measure_read_rates(sorted({1, best.threads}))
    print(f"limits with {best.threads} threads ({best.isa} in use)")
    print_table(
        ("path", "memory read GB/s", "int8 TOPS", "bf16 TFLOPS", "fp32 TFLOPS"),
        [
            (
                isa,
                f"{r.memory_read_bytes_per_second / 1e9:.1f}",
                f"{r.int8_operations_per_second / 1e12:.3f}",
                "" if r.bf16_operations_per_second is None else f"{r.bf16_operations_per_second / 1e12:.3f}",
                f"{r.f32_operations_per_second / 1e12:.3f}",
            )
            for isa, r in limits.items()
        ],
        right=range(1, 5),
    )
    print("\nread bandwidth")
    print_table(
        ("level", "working set", "threads", "GB/s"),
        [(r.level, megabytes(r.working_set_bytes), str(r.threads), f"{r.bytes_per_second / 1e9:.1f}") for r in rates],
        right=(1, 2, 3),
    )
    paths = {isa: asdict(limit) for isa, limit in limits.items()}
    figures = {**asdict(best), "paths": paths, "read_rates": [asdict(rate) for rate in rates]}
    figures["machine"] = processor_name()
    write(json_file, "roofline", figures)
    if plot is not None:
        draw_roofline(plot, figures)


def latency(
    model: Model,
    prompt_tokens: Annotated[str, typer.Option("--prompt-tokens", help="One number, or several: 128,512.")] = "512",
    depth: Annotated[
        str | None, typer.Option("--depth", help="Measure after this many tokens, multiples of 32: 0,1024.")
    ] = None,
    batch: Annotated[str | None, typer.Option("--batch", help="Sequences that decode together: 1,4.")] = None,
    output_tokens: Annotated[int, typer.Option("--output-tokens", min=2)] = 64,
    rounds: Rounds = 5,
    threads: Threads = 0,
    memory: Memory = None,
    json_file: JsonFile = None,
    plot: Plot = None,
) -> None:
    """Measure prefill and decode, and their shares of the machine's limits.

    By default one request, from its prompt to its last token. With several prompt lengths, --depth or --batch, each
    combination apart.
    """
    from tokenmill import _native
    from tokenmill.bench.latency import measure_latency
    from tokenmill.bench.plot import check_ending, draw_latency
    from tokenmill.bench.sweep import sweep_latency
    from tokenmill.errors import UsageError
    from tokenmill.llm import LLM

    check_ending(plot)
    lengths = numbers("--prompt-tokens", prompt_tokens, 1)
    if len(lengths) == 1 and depth is None and batch is None:
        if plot is not None:
            raise UsageError("--plot draws speed against depth: give several --depth")
        with LLM(
            model,
            threads=threads,
            memory=memory,
            max_model_len=lengths[0] + output_tokens,
            max_num_seqs=1,
            enable_prefix_caching=False,
        ) as llm:
            report = measure_latency(llm, lengths[0], output_tokens, rounds)
        print(f"{model}: {lengths[0]} tokens in, {output_tokens} out, {report.threads} threads, {report.isa}")
        print_table(
            ("phase", "tokens/s", "of limit", "limits"),
            [
                (
                    "prefill",
                    report.prefill_tokens_per_second.text(1),
                    f"{100 * report.prefill_share_of_limit.median:.1f} %",
                    f"int8 {report.int8_operations_per_second.median / 1e12:.3f} TOPS",
                ),
                (
                    "decode",
                    report.decode_tokens_per_second.text(1),
                    f"{100 * report.decode_share_of_limit.median:.1f} %",
                    f"read {report.memory_read_bytes_per_second.median / 1e9:.1f} GB/s",
                ),
            ],
        )
        write(json_file, "latency", asdict(report), llm.path)
        return
    depths, batches = numbers("--depth", depth or "0", 0), numbers("--batch", batch or "1", 1)
    with LLM(
        model,
        threads=threads,
        memory=memory,
        max_model_len=max(depths) + max(*lengths, output_tokens) + 1,
        max_num_seqs=max(batches),
        max_batch_tokens=max(512, *batches),
    ) as llm:
        points = list(
            sweep_latency(
                llm,
                prompt_tokens=lengths,
                depths=depths,
                batches=batches,
                output_tokens=output_tokens,
                rounds=rounds,
                say=say,
            )
        )
    used = threads or _native.usable_cpu_count()
    print(f"{model}: {used} threads, {_native.active_isa()}, medians of {rounds}")
    print_table(
        ("phase", "tokens", "depth", "batch", "tokens/s", "of limit"),
        [
            (
                point.phase,
                str(point.tokens),
                str(point.depth),
                str(point.batch),
                point.tokens_per_second.text(1),
                f"{100 * point.share_of_limit.median:.1f} %",
            )
            for point in points
        ],
        right=(1, 2, 3),
    )
    figures = {"model": model, "isa": _native.active_isa(), "threads": used, "points": [asdict(p) for p in points]}
    write(json_file, "latency-sweep", figures, llm.path)
    if plot is not None:
        draw_latency(plot, figures)


def startup(
    model: Model,
    peer: Annotated[list[str] | None, typer.Option("--peer", help="NAME or NAME=PYTHON; repeat it.")] = None,
    rounds: Rounds = 5,
    threads: Threads = 0,
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="Seconds an engine may take to start.")] = 600.0,
    json_file: JsonFile = None,
) -> None:
    """Measure the time from an empty interpreter to the first token, and peak memory; other engines in turn."""
    from tokenmill.bench.peers import parse_peer
    from tokenmill.bench.startup import measure_startup
    from tokenmill.sources import resolve

    path = resolve(model)
    peers = [parse_peer(name) for name in peer or ()]
    report = measure_startup(path, peers, rounds=rounds, threads=threads, timeout=timeout, say=say)
    excess = report.first.peak_bytes - report.model_bytes - report.largest_tensor_bytes
    print(
        f"first load: {report.first.seconds:.2f} s, peak {megabytes(report.first.peak_bytes)} = model "
        f"{megabytes(report.model_bytes)} + largest tensor {megabytes(report.largest_tensor_bytes)} "
        f"{'+' if excess >= 0 else '-'} {megabytes(abs(excess))}"
    )
    print_table(
        ("later loads", "seconds to first token", "peak memory", "tokenmill / it"),
        [
            (
                engine.name,
                "failed" if engine.seconds is None else engine.seconds.text(2),
                "" if engine.peak_bytes is None else megabytes(round(engine.peak_bytes.median)),
                "" if engine.ratio is None else engine.ratio.text(2),
            )
            for engine in report.engines
        ],
    )
    for engine in report.engines:
        if engine.error is not None:
            print(f"{engine.name} FAILED: {engine.error}")
    write(json_file, "startup", {"model": model, **asdict(report)}, path)


def throughput(
    model: Model,
    requests: Annotated[int, typer.Option("--requests", min=1)] = 32,
    input_tokens: Annotated[int, typer.Option("--input-tokens", min=1)] = 128,
    output_tokens: Annotated[int, typer.Option("--output-tokens", min=1)] = 64,
    rounds: Rounds = 3,
    threads: Threads = 0,
    json_file: JsonFile = None,
) -> None:
    """Measure many requests at once, offline."""
    from tokenmill.bench.throughput import measure_throughput
    from tokenmill.llm import LLM

    with LLM(
        model,
        threads=threads,
        max_model_len=input_tokens + output_tokens,
        max_num_seqs=requests,
        max_batch_tokens=max(512, requests),
        enable_prefix_caching=False,
    ) as llm:
        report = measure_throughput(llm, requests, input_tokens, output_tokens, rounds)
    print(
        f"{model}: {requests} requests of {input_tokens} in, {output_tokens} out each, "
        f"{report.threads} threads, {report.isa}"
    )
    print_table(
        ("output tokens/s", "of limit", "with prompt tokens"),
        [
            (
                report.output_tokens_per_second.text(1),
                f"{100 * report.share_of_limit.median:.1f} %",
                report.total_tokens_per_second.text(1),
            )
        ],
    )
    write(json_file, "throughput", asdict(report), llm.path)
