"""``tokenmill bench`` roofline, latency and throughput: this machine's limits, and this engine against them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from tokenmill.cli.bench.options import JsonFile, Model, Rounds, Threads, write
from tokenmill.cli.terminal import print_table


def roofline(threads: Threads = 0, json_file: JsonFile = None) -> None:
    """Measure the limits: memory read bandwidth, int8 and fp32 peaks of each instruction-set path."""
    from tokenmill import _native
    from tokenmill.bench.roofline import measure_roofline

    active = _native.active_isa()
    limits = {}
    for isa in _native.available_isas():
        _native.set_active_isa(isa)
        limits[isa] = measure_roofline(threads)
    _native.set_active_isa(active)
    best = limits[active]
    print(f"limits with {best.threads} threads ({active} in use)")
    print_table(
        ("path", "memory read GB/s", "int8 TOPS", "fp32 TFLOPS"),
        [
            (
                isa,
                f"{r.memory_read_bytes_per_second / 1e9:.1f}",
                f"{r.int8_operations_per_second / 1e12:.3f}",
                f"{r.f32_operations_per_second / 1e12:.3f}",
            )
            for isa, r in limits.items()
        ],
        right=(1, 2, 3),
    )
    write(json_file, "roofline", {**asdict(best), "paths": {isa: asdict(limit) for isa, limit in limits.items()}})


def latency(
    model: Model,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1)] = 512,
    output_tokens: Annotated[int, typer.Option("--output-tokens", min=2)] = 64,
    rounds: Rounds = 5,
    threads: Threads = 0,
    json_file: JsonFile = None,
) -> None:
    """Measure one request at a time: prefill and decode, and their shares of the machine's limits."""
    from tokenmill.bench.latency import measure_latency
    from tokenmill.llm import LLM

    with LLM(
        model, threads=threads, max_model_len=prompt_tokens + output_tokens, max_num_seqs=1, enable_prefix_caching=False
    ) as llm:
        report = measure_latency(llm, prompt_tokens, output_tokens, rounds)
    print(f"{model}: {prompt_tokens} tokens in, {output_tokens} out, {report.threads} threads, {report.isa}")
    print_table(
        ("phase", "tokens/s", "share of limit", "limit"),
        [
            (
                "prefill",
                f"{report.prefill_tokens_per_second:.1f}",
                f"{100 * report.prefill_share_of_int8_peak:.1f} %",
                f"{report.int8_operations_per_second / 1e12:.3f} TOPS int8",
            ),
            (
                "decode",
                f"{report.decode_tokens_per_second:.1f}",
                f"{100 * report.decode_share_of_bandwidth:.1f} %",
                f"{report.memory_read_bytes_per_second / 1e9:.1f} GB/s read",
            ),
        ],
    )
    write(json_file, "latency", asdict(report), llm.path)


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
        ("output tokens/s", "all tokens/s", "seconds"),
        [
            (
                f"{report.output_tokens_per_second:.1f}",
                f"{report.total_tokens_per_second:.1f}",
                " ".join(f"{s:.2f}" for s in report.seconds),
            )
        ],
    )
    write(json_file, "throughput", asdict(report), llm.path)
