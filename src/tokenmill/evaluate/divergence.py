"""How far runs are from a reference run on the same text: engines, number formats and whole models, paired."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokenmill.bench.peers import Peer
from tokenmill.bench.worker_process import WorkerError
from tokenmill.errors import UsageError
from tokenmill.evaluate.kl import KlSummary, ratio_interval, summarize, windows
from tokenmill.evaluate.paired import Interval
from tokenmill.evaluate.peer import open_peer
from tokenmill.evaluate.reference import Divergence, Float32, stored_reference
from tokenmill.evaluate.runs import RunSpec, all_rows, open_run, read_text_model
from tokenmill.evaluate.text import TextError, text_digest

_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class RunDivergence:
    """One run against the reference. ``error`` says why there are no figures."""

    name: str
    summary: KlSummary | None
    kl_quantiles: dict[str, float]
    """90 %, 99 %, 99.9 % and the largest, in nats."""
    probability_error: dict[str, float]
    """Quantiles of the change of the next token's probability, and its root mean square."""
    ratio: Interval | None
    """The first run's mean divergence over this one's, with an interval over windows."""
    error: str | None = None
    build: str = ""


@dataclass(frozen=True, slots=True)
class DivergenceReport:
    """All runs of one text."""

    reference: str
    tokens: int
    window: int
    text_sha256: str
    runs: tuple[RunDivergence, ...]


def measure_divergence(
    reference: RunSpec,
    runs: Sequence[RunSpec],
    peers: Sequence[tuple[Peer, str]],
    text: str,
    folder: Path,
    *,
    tokens: int = 2048,
    window: int = 128,
    threads: int = 0,
    memory: str | None = None,
    timeout: float = 3600.0,
    say: Callable[[str], None] = lambda _: None,
) -> DivergenceReport:
    """Runs the reference once per model and text (kept in ``folder``), then each run, then each peer.

    Windows of ``window`` tokens, each a new sequence, at least ``tokens`` in all. Peers run the first run's model.
    Raises TextError if the text is too short, UsageError if a run's vocabulary is not the reference's, and
    MemoryLimitError if a run does not fit ``memory``.
    """
    source = read_text_model(reference.model)
    cut = windows(source.encode(text), window, source.bos)[: -(-tokens // window)]
    if len(cut) * window < tokens:
        raise TextError(f"the text gives {len(cut)} windows of {window} tokens; {tokens} tokens were asked for")
    positions = len(cut) * window
    targets = np.array([token for each in cut for token in [*each[1:], each[0]]], dtype=np.int64)

    def run_reference() -> Iterator[Float32]:
        say(f"reference {reference}")
        with open_run(reference, window, threads, memory, source.vocabulary) as backend:
            yield from all_rows(backend, cut)

    identity = {"model": source.digest, "run": reference.settings, "windows": text_digest(json.dumps(cut))}
    stored, found = stored_reference(folder, identity, positions, source.vocabulary, run_reference)
    if found:
        say(f"reference {reference}: stored before")
    done: list[tuple[str, Divergence | None, str | None, str]] = []
    for spec in runs:
        say(f"run {spec}")
        other = source if spec.model == reference.model else read_text_model(spec.model)
        if other.vocabulary != source.vocabulary:
            raise UsageError(
                f"{spec.model} has {other.vocabulary} tokens, the reference {source.vocabulary}: "
                "their distributions cannot be compared"
            )
        with open_run(spec, window, threads, memory, source.vocabulary) as backend:
            done.append((str(spec), stored.compare(all_rows(backend, cut), targets), None, ""))
    for peer, python in peers:
        say(f"run {peer.name}")
        try:
            with open_peer(peer, python, runs[0].model, source.vocabulary, window, threads, timeout) as opened:
                done.append((peer.name, stored.compare(opened.rows(cut), targets), None, opened.build))
        except WorkerError as error:
            done.append((peer.name, None, str(error), ""))
    first = done[0][1]
    return DivergenceReport(
        str(reference),
        positions,
        window,
        text_digest(text),
        tuple(_conclude(name, first, divergence, error, build, window) for name, divergence, error, build in done),
    )


def _conclude(
    name: str, first: Divergence | None, own: Divergence | None, error: str | None, build: str, window: int
) -> RunDivergence:
    if own is None:
        return RunDivergence(name, None, {}, {}, None, error, build)
    ratio = None
    if first is not None and own is not first and own.kl.mean() > 0:
        ratio = Interval(*ratio_interval(first.kl, own.kl, block=window))
    # A window's last position predicts no token of it.
    counted = np.arange(len(own.kl)) % window != window - 1
    change = own.probability_error[counted]
    quantiles = {f"{100 * q:g} %": float(np.quantile(change, q)) for q in _QUANTILES}
    quantiles["rms"] = float(np.sqrt((change**2).mean()))
    high = {f"{100 * q:g} %": float(np.quantile(own.kl, q)) for q in (0.9, 0.99, 0.999)}
    return RunDivergence(
        name, summarize(own.kl, own.same_top), {**high, "max": float(own.kl.max())}, quantiles, ratio, None, build
    )
