"""``tokenmill bench serve``: load on a server that speaks OpenAI's API."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenmill.cli.measuring import JsonFile, Plot, numbers, write
from tokenmill.cli.terminal import print_table, say

if TYPE_CHECKING:
    from tokenmill.bench.load import LoadReport, LoadRequest, Quantiles


def serve(
    url: Annotated[str, typer.Argument(help="The server's root: http://127.0.0.1:8000")],
    model: Annotated[str, typer.Option("--model", help="The name that the server knows the model by.")],
    concurrency: Annotated[
        str | None, typer.Option("--concurrency", help="Closed loop: users, one run each: 1,4,16. Default: 1.")
    ] = None,
    rate: Annotated[
        str | None, typer.Option("--rate", help="Poisson arrivals: requests per second, one run each: 0.5,1,2.")
    ] = None,
    requests: Annotated[int, typer.Option("--requests", min=1, help="Requests of each run.")] = 32,
    input_tokens: Annotated[int, typer.Option("--input-tokens", min=1, help="Random token ids a prompt.")] = 128,
    output_tokens: Annotated[int, typer.Option("--output-tokens", min=1)] = 64,
    vocabulary: Annotated[
        int, typer.Option("--vocabulary", min=1, help="Random ids are below this; keep below the model's.")
    ] = 30000,
    text: Annotated[
        str | None,
        typer.Option("--text", help="Cut prompts from this file or corpus:KIND instead (4 characters a token)."),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help='Replay JSONL: "prompt" or "messages", "max_tokens", "arrival".')
    ] = None,
    ttft: Annotated[float | None, typer.Option("--ttft", help="Bound for goodput: ms to the first token.")] = None,
    itl: Annotated[float | None, typer.Option("--itl", help="Bound for goodput: mean ms between tokens.")] = None,
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="Seconds to wait for any next byte.")] = 300.0,
    api_key: Annotated[str | None, typer.Option("--api-key", envvar="OPENAI_API_KEY")] = None,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Token by token, or whole answers.")] = True,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Of prompts and arrivals; another one for a server that saw these.")
    ] = 0,
    json_file: JsonFile = None,
    plot: Plot = None,
) -> None:
    """Send requests to a running server and report what users would wait: closed loop, Poisson or a trace."""
    from tokenmill.bench.load import poisson_arrivals, random_requests, read_trace, run_load, text_requests
    from tokenmill.bench.plot import check_ending, draw_load
    from tokenmill.errors import UsageError
    from tokenmill.evaluate.text import read_texts

    check_ending(plot)
    if rate is not None and concurrency is not None:
        raise UsageError("--rate and --concurrency are two kinds of load: give one")
    traced = [] if trace is None else read_trace(trace)
    source = "" if text is None else read_texts([text])

    def prompts(number: int) -> list[LoadRequest]:
        """Of one run. Every run has its own, or it would find those of the run before in the server's cache."""
        if trace is not None:
            return traced
        if text is not None:
            return text_requests(requests, source, 4 * input_tokens, output_tokens, seed + number)
        return random_requests(requests, input_tokens, output_tokens, vocabulary, seed + number)

    replayed = trace is not None and all(r.arrival is not None for r in traced) and not (rate or concurrency)
    runs: list[LoadReport] = []
    loads = [0.0] if replayed else _rates(rate) if rate is not None else numbers("--concurrency", concurrency or "1", 1)
    for number, load in enumerate(loads):
        chosen, done = prompts(number), 0

        def tell(exchange: object, total: int = len(chosen)) -> None:
            nonlocal done
            done += 1
            say(f"{done}/{total}: {getattr(exchange, 'error', None) or 'ended'}")

        arriving = poisson_arrivals(chosen, load, seed) if rate is not None else chosen
        runs.append(
            run_load(
                url,
                model,
                arriving,
                users=None if rate is not None or replayed else int(load),
                load=float(load),
                ttft_bound=float("inf") if ttft is None else ttft / 1000,
                itl_bound=float("inf") if itl is None else itl / 1000,
                timeout=timeout,
                api_key=api_key,
                stream=stream,
                on_exchange=tell,
            )
        )
    unit = "trace" if replayed else "requests per second" if rate is not None else "users"
    _print(unit, runs)
    figures = {
        "model": model,
        "url": url,
        "load_unit": unit,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "seed": seed,
        "ttft_bound_ms": ttft,
        "itl_bound_ms": itl,
        "runs": [asdict(run) for run in runs],
    }
    write(json_file, "serve", figures)
    if plot is not None:
        draw_load(plot, figures)


def _rates(text: str) -> list[float]:
    from tokenmill.errors import UsageError

    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < 1e6 for rate in rates):
        raise UsageError(f"--rate is {text!r}; it must be a number above 0, or several with commas between")
    return rates


def _print(unit: str, runs: list[LoadReport]) -> None:
    def ms(quantiles: Quantiles | None) -> str:
        if quantiles is None:
            return ""
        return " / ".join(f"{1e3 * value:.1f}" for value in (quantiles.p50, quantiles.p90, quantiles.p99))

    print_table(
        (
            unit,
            "done",
            "failed",
            "req/s",
            "goodput req/s",
            "out tok/s",
            "TTFT ms p50/90/99",
            "between tokens p50/90/99",
            "client CPU",
        ),
        [
            (
                f"{run.load:g}",
                str(run.requests - run.failed),
                str(run.failed),
                f"{run.requests_per_second:.2f}",
                f"{run.goodput_requests_per_second:.2f}",
                f"{run.output_tokens_per_second:.1f}",
                ms(run.ttft_seconds),
                ms(run.itl_seconds),
                f"{run.client_cpu_seconds / run.seconds:.0%}",
            )
            for run in runs
        ],
        right=range(6),
    )
    for run in runs:
        come_in = "tokens in not told" if run.prompt_tokens is None else f"{run.prompt_tokens} tokens in"
        counted = f"{come_in}, {run.output_tokens} out"
        fewer = f" of {run.asked_tokens} asked for" if run.output_tokens < run.asked_tokens else ""
        print(f"{unit} {run.load:g}: {counted}{fewer}")
        for error, count in run.errors.items():
            print(f"{unit} {run.load:g}: {count} failed: {error}")
