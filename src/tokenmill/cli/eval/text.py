"""``tokenmill eval`` perplexity, kl and corpus: measures on running text."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenmill.cli.bench.options import JsonFile, Threads, write
from tokenmill.cli.terminal import print_table, say

if TYPE_CHECKING:
    from tokenmill.evaluate.scoring import Float64, Window

Run = Annotated[str, typer.Argument(help="A model, or MODEL@BACKEND/KV: smollm2-135m@torch, model.gguf@native/bf16.")]
Text = Annotated[
    list[str] | None,
    typer.Option("--text", help="A UTF-8 file, or corpus:code, corpus:prose, corpus:mixed; repeat it to join several."),
]


def perplexity(
    model: Run,
    text: Text = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=2, help="Most tokens of the text. Default: all.")
    ] = None,
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens of one sequence.")] = 512,
    stride: Annotated[int | None, typer.Option("--stride", min=1, help="Default: half a window.")] = None,
    joined: Annotated[
        str, typer.Option("--joined", help="sliding (each token once) or llama.cpp (second half of each window).")
    ] = "sliding",
    vs: Annotated[str | None, typer.Option("--vs", help="Another model or run, on the same tokens.")] = None,
    log: Annotated[
        Path | None, typer.Option("--log", help="Keep results here; the same command goes on where it was.")
    ] = None,
    threads: Threads = 0,
    json_file: JsonFile = None,
) -> None:
    """Measure the perplexity of a text; with --vs of two models, paired token by token."""
    from tokenmill.errors import UsageError
    from tokenmill.evaluate.paired import difference_interval
    from tokenmill.evaluate.result_log import ResultLog
    from tokenmill.evaluate.runs import open_run, parse_run, read_text_model
    from tokenmill.evaluate.scoring import Perplexity, Windowing, cut_windows, score_windows
    from tokenmill.evaluate.text import read_texts, text_digest

    try:
        windowing = Windowing(joined)
    except ValueError:
        raise UsageError(f"--joined is {joined!r}; it must be sliding or llama.cpp") from None
    stride = stride or window // 2
    if not 1 <= stride < window:
        raise UsageError(f"--stride is {stride}; it must be less than --window, {window}")
    content = read_texts(text or ["corpus:mixed"])
    specs = [parse_run(name) for name in ([model] if vs is None else [model, vs])]
    scores: list[Float64] = []
    cut: list[Window] = []
    ids: list[int] = []
    path: Path | None = None
    for spec in specs:
        source = read_text_model(spec.model)
        own = source.encode(content)[:tokens]
        if path is not None and own != ids:
            raise UsageError(f"{model} and {vs} cut the text into different tokens: they cannot be paired")
        ids, path = own, path or source.path
        cut = cut_windows(ids, window, stride, windowing, source.bos)
        identity = {
            "model": source.digest,
            "run": spec.settings,
            "text": text_digest(content),
            "tokens": len(ids),
            "windows": [window, stride, joined],
        }
        own_log = None if log is None else log if vs is None else log.with_name(f"{log.stem}-{len(scores)}{log.suffix}")
        results = ResultLog(own_log, identity)

        def progress(number: int, spec: object = spec, total: int = len(cut)) -> None:
            say(f"{spec}: window {number + 1} of {total}")

        with open_run(spec, window, threads) as backend:
            scores.append(score_windows(backend, cut, results, progress))
    measured = [Perplexity.of(nll, stride) for nll in scores]
    print(f"{len(ids)} tokens, {len(cut)} windows of {window}, stride {stride}, {joined}")
    print_table(
        ("run", "scored tokens", "perplexity", "nats per token (95 %)"),
        [
            (str(spec), str(each.tokens), f"{each.perplexity:.4f}", str(each.nll))
            for spec, each in zip(specs, measured, strict=True)
        ],
        right=(1, 2),
    )
    figures: dict[str, object] = {
        "model": model,
        "text_sha256": text_digest(content),
        "window": window,
        "stride": stride,
        "joined": joined,
        "runs": [{"run": str(spec), **asdict(each)} for spec, each in zip(specs, measured, strict=True)],
    }
    if vs is not None:
        difference = difference_interval(scores[0], scores[1], block=stride)
        ratio = [math.exp(value) for value in (difference.value, difference.lower, difference.upper)]
        print(f"perplexity of the first over the second: {ratio[0]:.5f} (95 %: {ratio[1]:.5f} to {ratio[2]:.5f})")
        figures["difference"] = asdict(difference)
    write(json_file, "perplexity", figures, path)


def kl(
    model: Annotated[str, typer.Argument(help="Name, .gguf file, folder, or org/name on the hub.")],
    reference: Annotated[
        str | None, typer.Option("--reference", help="MODEL@BACKEND/KV. Default: the same model with torch, fp32.")
    ] = None,
    run: Annotated[
        list[str] | None,
        typer.Option("--run", help="native, native/bf16, torch/f16, torch/f32+int8 ...; repeat it. Default: native."),
    ] = None,
    vs: Annotated[
        str | None, typer.Option("--vs", help="Another model (or MODEL@BACKEND/KV) against the same reference.")
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option("--peer", help="llama.cpp or llama.cpp=PYTHON: on the same file.")
    ] = None,
    text: Text = None,
    tokens: Annotated[int, typer.Option("--tokens", min=2)] = 2048,
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens of one sequence.")] = 128,
    threads: Threads = 0,
    json_file: JsonFile = None,
) -> None:
    """Measure how far next-token distributions are from a reference run's, token by token.

    The reference run is stored once per model and text. Ratios are of the first run to each other one, paired, with
    an interval over windows.
    """
    from tokenmill.bench.peers import parse_peer
    from tokenmill.cache_folder import cache_folder
    from tokenmill.evaluate.divergence import measure_divergence
    from tokenmill.evaluate.runs import parse_run
    from tokenmill.evaluate.text import read_texts
    from tokenmill.sources import resolve

    base = parse_run(reference if reference is not None else f"{model}@torch")
    specs = [parse_run(each, model) for each in run or ["native"]] + ([] if vs is None else [parse_run(vs)])
    report = measure_divergence(
        base,
        specs,
        [parse_peer(name) for name in peer or ()],
        read_texts(text or ["corpus:mixed"]),
        cache_folder() / "references",
        tokens=tokens,
        window=window,
        threads=threads,
        say=say,
    )
    print(f"{report.tokens} tokens in windows of {report.window}; KL in nats from {report.reference}")
    rows = []
    for each in report.runs:
        if each.summary is None:
            continue
        s, q = each.summary, each.kl_quantiles
        figures = [f"{value:.5f}" for value in (s.mean, s.median, q["90 %"], q["99 %"], q["max"])]
        top, change = f"{100 * s.same_top_token:.2f} %", f"{100 * each.probability_error['rms']:.3f} %"
        rows.append((each.name, *figures, top, change, "" if each.ratio is None else str(each.ratio)))
    head = ("run", "mean", "median", "90 %", "99 %", "max", "same top token", "rms change of p", "first / it")
    print_table(head, rows, right=range(1, 8))
    for each in report.runs:
        if each.build:
            print(f"{each.name}: {each.build}")
        if each.error is not None:
            print(f"{each.name} FAILED: {each.error}")
    write(json_file, "kl", {"model": model, **asdict(report)}, resolve(model))


def corpus(
    out: Annotated[Path, typer.Argument(help="File to write.")],
    kind: Annotated[str, typer.Option("--kind", help="code, prose or mixed.")] = "mixed",
    part: Annotated[
        str, typer.Option("--part", help="calibration or evaluation: no document is in both.")
    ] = "evaluation",
    characters: Annotated[int, typer.Option("--characters", min=1000)] = 500_000,
) -> None:
    """Write a text made of what is on this machine: standard library sources, documentation, licences."""
    from tokenmill.errors import UsageError
    from tokenmill.evaluate.text import Kind, Part, text_digest
    from tokenmill.evaluate.text import corpus as assemble

    try:
        chosen = Kind(kind), Part(part)
    except ValueError as error:
        raise UsageError(f"{error}: --kind is code, prose or mixed, --part calibration or evaluation") from None
    content = assemble(*chosen, characters)
    out.write_text(content, encoding="utf-8")
    facts = {"file": str(out), "characters": len(content), "sha256": text_digest(content)}
    print(json.dumps(facts))
