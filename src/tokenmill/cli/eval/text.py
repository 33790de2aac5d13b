"""``tokenmill eval`` perplexity, kl and corpus: measures on running text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenmill.cli.measuring import JsonFile, write
from tokenmill.cli.options import Memory, Model, Threads
from tokenmill.cli.terminal import print_table, say

if TYPE_CHECKING:
    from tokenmill.bench.peers import Peer
    from tokenmill.evaluate.runs import TextModel
    from tokenmill.evaluate.scoring import Float64, Window

Run = Annotated[str, typer.Argument(help="A model, or MODEL@BACKEND/KV: smollm2-135m@torch, model.gguf@native/bf16.")]
Peers = Annotated[
    list[str] | None, typer.Option("--peer", help="llama.cpp or llama.cpp=PYTHON: on the same file and tokens.")
]
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
    peer: Peers = None,
    log: Annotated[
        Path | None, typer.Option("--log", help="Keep results here; the same command goes on where it was.")
    ] = None,
    threads: Threads = 0,
    memory: Memory = None,
    json_file: JsonFile = None,
) -> None:
    """Measure the perplexity of a text; with --vs or --peer of several runs, paired token by token."""
    from tokenmill.bench.peers import parse_peer
    from tokenmill.errors import UsageError
    from tokenmill.evaluate.result_log import ResultLog
    from tokenmill.evaluate.runs import open_run, parse_run, read_text_model
    from tokenmill.evaluate.scoring import Windowing, cut_windows, score_windows
    from tokenmill.evaluate.text import read_texts, text_digest

    try:
        windowing = Windowing(joined)
    except ValueError:
        raise UsageError(f"--joined is {joined!r}; it must be sliding or llama.cpp") from None
    stride = stride or window // 2
    if not 1 <= stride < window:
        raise UsageError(f"--stride is {stride}; it must be less than --window, {window}")
    peers = [parse_peer(name) for name in peer or ()]
    content = read_texts(text or ["corpus:mixed"])
    specs = [parse_run(name) for name in ([model] if vs is None else [model, vs])]
    first = read_text_model(specs[0].model)
    ids = first.encode(content)[:tokens]
    cut = cut_windows(ids, window, stride, windowing, first.bos)
    scores: dict[str, Float64] = {}
    for number, spec in enumerate(specs):
        source = first if spec.model == specs[0].model else read_text_model(spec.model)
        if source.encode(content)[:tokens] != ids or source.bos != first.bos:
            raise UsageError(f"{model} and {vs} cut the text into different tokens: they cannot be paired")
        identity = {
            "model": source.digest,
            "run": spec.settings,
            "text": text_digest(content),
            "tokens": len(ids),
            "windows": [window, stride, joined],
        }
        results = ResultLog(log if log is None or vs is None else log.with_stem(f"{log.stem}-{number}"), identity)
        with open_run(spec, window, threads, memory, source.vocabulary) as backend:
            scores[str(spec)] = score_windows(backend, cut, results, _progress(str(spec), len(cut)))
    errors = _score_peers(peers, specs[0].model, first, cut, threads, scores)
    how = f"stride {stride}" if windowing is Windowing.SLIDING else "side by side, second halves scored"
    print(f"{len(ids)} tokens, {len(cut)} windows of {window}, {how}")
    runs = _perplexities(scores, stride)
    for name, reason in errors.items():
        print(f"{name} FAILED: {reason}")
    figures: dict[str, object] = {
        "model": model,
        "text_sha256": text_digest(content),
        "window": window,
        "stride": stride,
        "joined": joined,
        "runs": runs,
        "errors": errors,
    }
    write(json_file, "perplexity", figures, first.path)


def _score_peers(
    peers: Sequence[tuple[Peer, str]],
    model: str,
    source: TextModel,
    cut: Sequence[Window],
    threads: int,
    scores: dict[str, Float64],
) -> dict[str, str]:
    """Adds the peers' scores; returns why a peer has none."""
    import numpy as np

    from tokenmill.bench.worker_process import WorkerError
    from tokenmill.evaluate.peer import open_peer
    from tokenmill.evaluate.scoring import score_rows

    errors = {}
    longest = max(len(each.token_ids) for each in cut)
    for peer, python in peers:
        tell = _progress(peer.name, len(cut))
        try:
            with open_peer(peer, python, model, source.vocabulary, longest, threads) as opened:
                parts = []
                for number, rows in enumerate(opened.rows([each.token_ids for each in cut])):
                    parts.append(score_rows(cut[number], [rows]))
                    tell(number)
                scores[f"{peer.name}, {opened.build.split(';')[0]}"] = np.concatenate(parts)
        except WorkerError as error:
            errors[peer.name] = str(error)
    return errors


def _perplexities(scores: Mapping[str, Float64], block: int) -> list[dict[str, object]]:
    """Prints the runs and returns their records; all but the first are paired with it."""
    from tokenmill.evaluate.paired import difference_interval
    from tokenmill.evaluate.scoring import Perplexity

    rows, runs = [], []
    ours = next(iter(scores.values()))
    for name, nll in scores.items():
        own = Perplexity.of(nll, block)
        difference = None if nll is ours else difference_interval(ours, nll, block=block)
        ratio = "{:.5f} (95 %: {:.5f} to {:.5f})".format(*map(math.exp, astuple(difference))) if difference else ""
        rows.append((name, str(own.tokens), f"{own.perplexity:.4f}", str(own.nll), ratio))
        runs.append({"run": name, **asdict(own), "difference": difference and asdict(difference)})
    print_table(("run", "scored tokens", "perplexity", "nats per token (95 %)", "first / it"), rows, right=(1, 2))
    return runs


def _progress(name: str, total: int) -> Callable[[int], None]:
    return lambda number: say(f"{name}: window {number + 1} of {total}")


def kl(
    model: Model,
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
    peer: Peers = None,
    text: Text = None,
    tokens: Annotated[int, typer.Option("--tokens", min=2)] = 2048,
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens of one sequence.")] = 128,
    threads: Threads = 0,
    memory: Memory = None,
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
        memory=memory,
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
