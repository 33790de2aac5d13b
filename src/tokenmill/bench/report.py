"""docs/benchmarks.md and the README's headline table, made from result files and from nothing else.

Every table stands with the command that printed it, the machine, the limits and the date. A figure that is in no result
file is in no document.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenmill.bench.record import ResultFileError, read_record

BEGIN, END = "<!-- headline: written by `tokenmill bench report` -->", "<!-- end of headline -->"

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Page:
    """What a set of result files says. ``text`` is the whole page, ``headline`` the README's table."""

    text: str
    headline: str


def build_page(files: Iterable[Path]) -> Page:
    """The page of all result files, in the order of kinds and then of file names.

    Raises ResultFileError for a file that is none, of an unknown kind, or without the fields of its kind.
    """
    records = []
    for path in sorted(files):
        record = read_record(path)
        if record["kind"] not in _SECTIONS:
            raise ResultFileError(f"{path} holds results of kind {record['kind']!r}, which has no place in the report")
        records.append((path, record))
    order = list(_SECTIONS)
    records.sort(key=lambda pair: order.index(str(pair[1]["kind"])))
    lines = [
        "# Benchmarks",
        "",
        "Written by `tokenmill bench report` from the result files in `docs/results`; change those, not this page.",
        "Ratios are taken within a round of alternating runs and stand for more than rates do: the rates of a shared",
        "machine move within the hour, for all engines alike. Ranges are the lowest and the highest sample.",
    ]
    previous = ""
    for path, record in records:
        title, table = _SECTIONS[str(record["kind"])]
        if title != previous:
            lines += ["", f"## {title}"]
            previous = title
        try:
            lines += ["", *table(record), "", *_source(record)]
        except (KeyError, TypeError, IndexError) as error:
            raise ResultFileError(f"{path} lacks what a result of {record['kind']} has: {error!r}") from error
    return Page("\n".join(lines) + "\n", "\n".join(_headline(record for _, record in records)))


def with_headline(readme: str, headline: str) -> str:
    """``readme`` with the table between its markers replaced. Raises ResultFileError if the markers are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ResultFileError(f"the README has no place for the headline: {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{headline}\n{END}{after}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def _source(record: Record) -> list[str]:
    command = shlex.join(str(part) for part in record["command"])
    versions = ", ".join(f"{name} {version}" for name, version in {"tokenmill": record["tokenmill"]}.items())
    model = f"; model SHA-256 {str(record['model_sha256'])[:12]}" if "model_sha256" in record else ""
    cpus = len(record["cpus"])
    return [
        f"{str(record['date'])[:10]}, {cpus} CPUs of {record['machine']}, {versions}{model}:",
        "",
        "```bash",
        command,
        "```",
    ]


def _spread(spread: Record | None, digits: int = 1) -> str:
    if spread is None:
        return ""
    return f"{spread['median']:.{digits}f} ({spread['low']:.{digits}f} to {spread['high']:.{digits}f})"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _tera(value: float | None) -> str:
    return "" if value is None else f"{value / 1e12:.3f}"


def _roofline(record: Record) -> list[str]:
    paths = _table(
        ("path", "memory read GB/s", "int8 TOPS", "bf16 TFLOPS", "fp32 TFLOPS"),
        (
            (
                isa,
                f"{limit['memory_read_bytes_per_second'] / 1e9:.1f}",
                *(_tera(limit[f"{kind}_operations_per_second"]) for kind in ("int8", "bf16", "f32")),
            )
            for isa, limit in record["paths"].items()
        ),
    )
    rates = _table(
        ("level", "working set MB", "threads", "GB/s"),
        (
            (r["level"], f"{r['working_set_bytes'] / 1e6:.1f}", str(r["threads"]), f"{r['bytes_per_second'] / 1e9:.1f}")
            for r in record["read_rates"]
        ),
    )
    return [f"{record['threads']} threads, `{record['isa']}` in use.", "", *paths, "", *rates]


def _compare(record: Record) -> list[str]:
    lines = []
    for comparison in record["comparisons"]:
        work, engines = comparison["workload"], comparison["engines"]
        many = "" if work["requests"] == 1 else f"{work['requests']} requests of "
        lines += [
            "",
            f"**{work['name']}**, {record['model']}: {many}{work['input_tokens']} tokens in, "
            f"{work['output_tokens']} out, {comparison['threads']} threads, rounds in turn: {comparison['rounds']}.",
            "",
        ]
        metrics = list(engines[0]["samples"])
        shares = {"prefill": "prefill_share_of_int8_peak", "decode": "decode_share_of_bandwidth"}
        head, rows = ["engine"], [[engine["name"]] for engine in engines]
        for metric in metrics:
            short = metric.removesuffix("_tokens_per_second")
            head += [f"{short} tokens/s", *(["of limit"] if short in shares else []), "tokenmill / it"]
            for row, engine in zip(rows, engines, strict=True):
                spread = engine["spreads"].get(metric)
                row.append("failed" if spread is None else _spread(spread))
                if short in shares:
                    share = engine["spreads"].get(shares[short])
                    row.append("" if share is None else _percent(share["median"]))
                row.append(_spread(engine["ratios"].get(metric), 2))
        lines += _table(head, rows)
        lines.append("")
        for engine in engines:
            settings = ", ".join(f"{name} = {value}" for name, value in engine["settings"].items())
            if engine["build"]:
                lines.append(f"- {engine['name']}: {engine['version']}; {engine['build']}; {settings}")
            if engine["error"]:
                lines.append(f"- {engine['name']} failed: {engine['error'].split(';')[0]}")
    return lines[1:]


def _latency(record: Record) -> list[str]:
    return _table(
        ("model", "tokens in, out", "prefill tokens/s", "of int8 peak", "decode tokens/s", "of bandwidth"),
        [
            (
                record["model"],
                f"{record['prompt_tokens']}, {record['output_tokens']}",
                f"{record['prefill_tokens_per_second']:.1f}",
                _percent(record["prefill_share_of_int8_peak"]),
                f"{record['decode_tokens_per_second']:.1f}",
                _percent(record["decode_share_of_bandwidth"]),
            )
        ],
    )


def _sweep(record: Record) -> list[str]:
    return [
        f"{record['model']}, {record['threads']} threads.",
        "",
        *_table(
            ("phase", "tokens", "depth", "batch", "tokens/s", "of limit"),
            (
                (
                    *(str(point[name]) for name in ("phase", "tokens", "depth", "batch")),
                    _spread(point["tokens_per_second"]),
                    _percent(point["share_of_limit"]["median"]),
                )
                for point in record["points"]
            ),
        ),
    ]


def _throughput(record: Record) -> list[str]:
    return _table(
        ("model", "requests", "tokens in, out", "output tokens/s", "all tokens/s"),
        [
            (
                record["model"],
                str(record["requests"]),
                f"{record['input_tokens']}, {record['output_tokens']}",
                f"{record['output_tokens_per_second']:.1f}",
                f"{record['total_tokens_per_second']:.1f}",
            )
        ],
    )


def _startup(record: Record) -> list[str]:
    first = record["first"]
    return [
        f"{record['model']} ({record['model_bytes'] / 1e6:.0f} MB, largest tensor "
        f"{record['largest_tensor_bytes'] / 1e6:.0f} MB). First load, empty build cache: {first['seconds']:.2f} s, "
        f"peak {first['peak_bytes'] / 1e6:.0f} MB.",
        "",
        *_table(
            ("engine, later loads", "seconds to the first token", "peak memory MB", "tokenmill / it"),
            (
                (
                    engine["name"],
                    _spread(engine["seconds"], 2) or "failed",
                    "" if engine["peak_bytes"] is None else f"{engine['peak_bytes']['median'] / 1e6:.0f}",
                    _spread(engine["ratio"], 2),
                )
                for engine in record["engines"]
            ),
        ),
    ]


def _profile(record: Record) -> list[str]:
    lines = []
    for step in record["steps"]:
        what = f"prefill of {step['tokens']} tokens"
        if step["phase"] == "decode":
            what = f"decode of {step['sequences']} at depth {step['depth']}"
        share = _percent(step["limit_seconds"] / step["seconds"])
        roles = sorted(step["roles"], key=lambda role: -role["seconds"])
        lines += [
            "",
            f"{record['model']}, {what}: {1e3 * step['seconds']:.2f} ms, {share} of the limit.",
            "",
            *_table(
                ("op", "count", "ms", "of step", "MB", "Gop", "of limit"),
                (
                    (
                        role["role"],
                        str(role["count"]),
                        f"{1e3 * role['seconds']:.3f}",
                        _percent(role["seconds"] / step["seconds"]),
                        f"{role['bytes'] / 1e6:.2f}",
                        f"{role['operations'] / 1e9:.3f}",
                        _percent(role["limit_seconds"] / role["seconds"] if role["seconds"] else None),
                    )
                    for role in roles
                ),
            ),
        ]
    return lines[1:]


def _serve(record: Record) -> list[str]:
    def ms(quantiles: Record | None) -> str:
        return "" if quantiles is None else " / ".join(f"{1e3 * quantiles[q]:.0f}" for q in ("p50", "p90", "p99"))

    return [
        f"{record['model']}.",
        "",
        *_table(
            (
                record["load_unit"],
                "requests",
                "failed",
                "output tokens/s",
                "TTFT ms (50, 90, 99 %)",
                "ms between tokens",
            ),
            (
                (
                    f"{run['load']:g}",
                    str(run["requests"]),
                    str(run["failed"]),
                    f"{run['output_tokens_per_second']:.1f}",
                    ms(run["ttft_seconds"]),
                    ms(run["itl_seconds"]),
                )
                for run in record["runs"]
            ),
        ),
    ]


def _kl(record: Record) -> list[str]:
    def interval(ratio: Record | None) -> str:
        return "" if ratio is None else f"{ratio['value']:.3f} ({ratio['lower']:.3f} to {ratio['upper']:.3f})"

    return [
        f"KL in nats from {record['reference']}, {record['tokens']} tokens in windows of {record['window']}; "
        "the ratio is of the first run's mean to this one's, with its 95 % interval.",
        "",
        *_table(
            ("run", "mean", "median", "99 %", "same top token", "first / it"),
            (
                (
                    run["name"],
                    *(f"{run['summary'][name]:.5f}" for name in ("mean", "median", "quantile_99")),
                    _percent(run["summary"]["same_top_token"]),
                    interval(run["ratio"]),
                )
                if run["summary"]
                else (run["name"], "failed", "", "", "", "")
                for run in record["runs"]
            ),
        ),
    ]


def _perplexity(record: Record) -> list[str]:
    return _table(
        ("run", "windows", "tokens", "perplexity"),
        (
            (
                run["run"],
                f"{record['window']}, stride {record['stride']}",
                str(run["tokens"]),
                f"{run['perplexity']:.4f}",
            )
            for run in record["runs"]
        ),
    )


def _passes(record: Record) -> list[str]:
    return _table(
        ("model", "items", "passed", "share (95 %)"),
        (
            (
                run["model"],
                str(run["items"]),
                str(run["passed"]),
                "{} ({} to {})".format(*(_percent(run["share"][name]) for name in ("value", "lower", "upper"))),
            )
            for run in record["runs"]
        ),
    )


_SECTIONS: dict[str, tuple[str, Callable[[Record], list[str]]]] = {
    "compare": ("Beside other engines", _compare),
    "roofline": ("What the machine can do", _roofline),
    "latency": ("One request", _latency),
    "latency-sweep": ("Depth and batch size", _sweep),
    "throughput": ("Many requests", _throughput),
    "serve": ("Server under load", _serve),
    "startup": ("Start", _startup),
    "profile": ("Where a step's time goes", _profile),
    "kl": ("Divergence from fp32", _kl),
    "perplexity": ("Perplexity", _perplexity),
    "humaneval": ("HumanEval", _passes),
    "needle": ("Needles found", _passes),
    "tasks": ("Tasks", _passes),
    "mcq": ("Multiple choice", _passes),
}


def _headline(records: Iterable[Record]) -> list[str]:
    """One row for each model and engine that was compared with; workloads may come from several files."""
    ratios: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        for comparison in record["comparisons"] if record["kind"] == "compare" else ():
            for engine in comparison["engines"][1:]:
                ratios.setdefault((str(record["model"]), engine["name"]), {}).update(engine["ratios"])
    rows = [
        (
            *place,
            *(
                _spread(own.get(f"{metric}_tokens_per_second"), 2) or "not measured"
                for metric in ("prefill", "decode", "output")
            ),
        )
        for place, own in ratios.items()
    ]
    if not rows:
        return ["No comparison has been recorded yet."]
    head = ("model", "engine", "prefill: tokenmill / it", "decode: tokenmill / it", "many requests: tokenmill / it")
    return _table(head, rows)
