"""The tables of a benchmark page: one function for each kind of result, from the record that the verb wrote."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenmill.bench.spread import Spread

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Section:
    """Where results of one kind stand, and how they are shown."""

    title: str
    tables: Callable[[Record], list[str]]
    about: str = ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def model_name(model: str) -> str:
    """A catalogue name or a repository as it is, a file by its own name: where it lay says nothing to a reader."""
    path = Path(model)
    return path.stem if path.suffix == ".gguf" else path.name if path.is_absolute() else model


def spread_text(spread: Record | None, digits: int = 1) -> str:
    """Median and range of a recorded ``Spread``; nothing for none."""
    return "" if spread is None else Spread(**spread).text(digits)


def _run(run: str) -> str:
    """``MODEL@SETTINGS`` with the model's name."""
    model, at, settings = run.rpartition("@")
    return f"{model_name(model)}{at}{settings}" if at else run


def _share(spread: Record | None) -> str:
    return "" if spread is None else _percent(spread["median"])


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _tera(value: float | None) -> str:
    return "" if value is None else f"{value / 1e12:.3f}"


def _roofline(record: Record) -> list[str]:
    paths = table(
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
    rates = table(
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
        many = "one request" if work["requests"] == 1 else f"{work['requests']} requests together"
        rounds = "one round" if comparison["rounds"] == 1 else f"{comparison['rounds']} rounds in turn"
        lines += [
            "",
            f"**{model_name(record['model'])}**, {many}: {work['input_tokens']} tokens in, "
            f"{work['output_tokens']} out; {comparison['threads']} threads, {rounds}.",
            "",
        ]
        head, rows = ["engine"], [[engine["name"]] for engine in engines]
        for name in engines[0]["metrics"]:
            head += [f"{name} tokens/s", "of limit", "tokenmill / it"]
            for row, engine in zip(rows, engines, strict=True):
                metric = engine["metrics"][name]
                row += [spread_text(metric["rate"]) or "failed", _share(metric["share"])]
                row.append(spread_text(metric["ratio"], 2))
        lines += table(head, rows)
        lines += ["", "<details><summary>Builds and settings</summary>", ""]
        for engine in engines:
            settings = ", ".join(f"{name} = {value}" for name, value in engine["settings"].items())
            if engine["build"]:
                lines.append(f"- {engine['name']}: {engine['version']}; {engine['build']}; {settings}")
            if engine["error"]:
                lines.append(f"- {engine['name']} failed: {engine['error'].split(';')[0]}")
        lines += ["", "</details>"]
    return lines[1:]


def _latency(record: Record) -> list[str]:
    return table(
        ("model", "tokens in, out", "prefill tokens/s", "of limit", "decode tokens/s", "of limit"),
        [
            (
                model_name(record["model"]),
                f"{record['prompt_tokens']}, {record['output_tokens']}",
                spread_text(record["prefill_tokens_per_second"]),
                _share(record["prefill_share_of_limit"]),
                spread_text(record["decode_tokens_per_second"]),
                _share(record["decode_share_of_limit"]),
            )
        ],
    )


def _sweep(record: Record) -> list[str]:
    return [
        f"**{model_name(record['model'])}**, {record['threads']} threads.",
        "",
        *table(
            ("phase", "tokens", "depth", "batch", "tokens/s", "of limit"),
            (
                (
                    *(str(point[name]) for name in ("phase", "tokens", "depth", "batch")),
                    spread_text(point["tokens_per_second"]),
                    _share(point["share_of_limit"]),
                )
                for point in record["points"]
            ),
        ),
    ]


def _throughput(record: Record) -> list[str]:
    return table(
        ("model", "requests", "tokens in, out", "output tokens/s", "of limit", "with prompt tokens"),
        [
            (
                model_name(record["model"]),
                str(record["requests"]),
                f"{record['input_tokens']}, {record['output_tokens']}",
                spread_text(record["output_tokens_per_second"]),
                _share(record["share_of_limit"]),
                spread_text(record["total_tokens_per_second"]),
            )
        ],
    )


def _startup(record: Record) -> list[str]:
    first = record["first"]
    return [
        f"{model_name(record['model'])} ({record['model_bytes'] / 1e6:.0f} MB, largest tensor "
        f"{record['largest_tensor_bytes'] / 1e6:.0f} MB). First load, empty build cache: {first['seconds']:.2f} s, "
        f"peak {first['peak_bytes'] / 1e6:.0f} MB.",
        "",
        *table(
            ("engine, later loads", "seconds to the first token", "peak memory MB", "tokenmill / it"),
            (
                (
                    engine["name"],
                    spread_text(engine["seconds"], 2) or "failed",
                    "" if engine["peak_bytes"] is None else f"{engine['peak_bytes']['median'] / 1e6:.0f}",
                    spread_text(engine["ratio"], 2),
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
            f"{model_name(record['model'])}, {what}: {1e3 * step['seconds']:.2f} ms, {share} of the limit.",
            "",
            *table(
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
        f"{model_name(record['model'])}.",
        "",
        *table(
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
        f"KL in nats from {_run(record['reference'])}, {record['tokens']} tokens in windows of {record['window']}; "
        "the ratio is of the first run's mean to this one's, with its 95 % interval.",
        "",
        *table(
            ("run", "mean", "median", "99 %", "same top token", "first / it"),
            (
                (
                    _run(run["name"]),
                    *(f"{run['summary'][name]:.5f}" for name in ("mean", "median", "quantile_99")),
                    _percent(run["summary"]["same_top_token"]),
                    interval(run["ratio"]),
                )
                if run["summary"]
                else (_run(run["name"]), "failed", "", "", "", "")
                for run in record["runs"]
            ),
        ),
    ]


def _perplexity(record: Record) -> list[str]:
    def ratio(difference: Record | None) -> str:
        if difference is None:
            return ""
        return "{:.5f} ({:.5f} to {:.5f})".format(*(math.exp(difference[x]) for x in ("value", "lower", "upper")))

    how = f"stride {record['stride']}" if record["joined"] == "sliding" else "side by side, second halves scored"
    return [
        f"Windows of {record['window']} tokens, {how}; the ratio is paired, token by token, with its 95 % interval.",
        "",
        *table(
            ("run", "tokens", "perplexity", "first / it"),
            (
                (_run(run["run"]), str(run["tokens"]), f"{run['perplexity']:.4f}", ratio(run["difference"]))
                for run in record["runs"]
            ),
        ),
        *(f"\n{name} failed: {reason}" for name, reason in record["errors"].items()),
    ]


def _passes(record: Record) -> list[str]:
    return table(
        ("model", "items", "passed", "share (95 %)"),
        (
            (
                model_name(run["model"]),
                str(run["items"]),
                str(run["passed"]),
                "{} ({} to {})".format(*(_percent(run["share"][name]) for name in ("value", "lower", "upper"))),
            )
            for run in record["runs"]
        ),
    )


SECTIONS: Mapping[str, Section] = {
    "compare": Section(
        "Beside other engines",
        _compare,
        "*Of limit* is the least time that memory and int8 peak, read just before and just after, allow for the work "
        "that Tokenmill has on this file, over the time taken; another engine may move more or fewer bytes.",
    ),
    "roofline": Section("What the machine can do", _roofline),
    "latency": Section("One request", _latency),
    "latency-sweep": Section("Depth and batch size", _sweep),
    "throughput": Section("Many requests", _throughput),
    "serve": Section("Server under load", _serve),
    "startup": Section("Start", _startup),
    "profile": Section("Where a step's time goes", _profile),
    "kl": Section("Divergence from fp32", _kl),
    "perplexity": Section("Perplexity", _perplexity),
    "humaneval": Section("HumanEval", _passes),
    "needle": Section("Needles found", _passes),
    "tasks": Section("Tasks", _passes),
    "mcq": Section("Multiple choice", _passes),
}
