"""Pictures of result files: what was measured, beside what the machine allows.

Every function takes the figures as a result file holds them, so that a picture can be drawn again from the file.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmill.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Figures = Mapping[str, Any]

_ENDINGS = (".png", ".svg", ".html")


def draw_profile(path: Path, figures: Figures) -> None:
    """The ops of each step as a waterfall over time, and below it each role's time with its limit inside."""
    steps = figures["steps"]
    figure = _figure(13, 6.5 * len(steps))
    axes = figure.subplots(2 * len(steps), 1, height_ratios=[1, 3] * len(steps), squeeze=False)[:, 0]
    for index, step in enumerate(steps):
        roles = sorted(step["roles"], key=lambda role: -role["seconds"])
        colours = {role["role"]: f"C{i}" if i < 10 else "0.7" for i, role in enumerate(roles)}
        waterfall, bars = axes[2 * index], axes[2 * index + 1]
        begin = 1e3 * step["prepare_seconds"]
        for op in step["ops"]:
            waterfall.broken_barh([(begin, 1e3 * op["seconds"])], (0, 1), color=colours[op["role"]])
            begin += 1e3 * op["seconds"]
        share = 100 * step["limit_seconds"] / step["seconds"]
        what = f"{step['tokens']} tokens" if step["phase"] == "prefill" else f"depth {step['depth']}"
        waterfall.set(
            title=f"{step['phase']}, {what}: {1e3 * step['seconds']:.2f} ms, {share:.0f} % of the limit",
            xlabel="ms since the step's begin",
            yticks=[],
            xlim=(0, 1e3 * step["seconds"]),
        )
        names = [f"{role['role']} ({role['count']})" for role in roles]
        bars.barh(names, [1e3 * role["seconds"] for role in roles], color=[colours[role["role"]] for role in roles])
        limits = [1e3 * min(role["limit_seconds"], role["seconds"]) for role in roles]
        bars.barh(names, limits, height=0.3, color="black", alpha=0.5)
        bars.invert_yaxis()
        bars.set(xlabel="ms a step (dark: the least that the limits allow)")
    _save(path, figure, f"{figures['model']}: where a step's time goes")


def draw_comparison(path: Path, figures: Figures) -> None:
    """Each engine's rates as bars with their range, one picture a rate."""
    panels = [
        (comparison, metric) for comparison in figures["comparisons"] for metric in comparison["engines"][0]["samples"]
    ]
    figure = _figure(5 * max(len(panels), 1), 4.5)
    for axes, (comparison, metric) in zip(
        figure.subplots(1, max(len(panels), 1), squeeze=False)[0], panels, strict=True
    ):
        engines = [engine for engine in comparison["engines"] if metric in engine["spreads"]]
        spreads = [engine["spreads"][metric] for engine in engines]
        middle = [spread["median"] for spread in spreads]
        reach = [
            [m - spread["low"] for m, spread in zip(middle, spreads, strict=True)],
            [spread["high"] - m for m, spread in zip(middle, spreads, strict=True)],
        ]
        bars = axes.bar([engine["name"] for engine in engines], middle, yerr=reach, capsize=4, color="C0")
        axes.bar_label(bars, fmt="%.0f", label_type="center", color="white")
        axes.set(title=metric.removesuffix("_tokens_per_second"), ylabel="tokens/s")
        axes.tick_params(axis="x", rotation=20)
    _save(path, figure, f"{figures['model']}: the same work on each engine")


def draw_roofline(path: Path, figures: Figures, points: Sequence[tuple[str, float, float]] = ()) -> None:
    """Attainable operations per second against operations per byte, one roof a kind of arithmetic.

    ``points`` are (name, operations per byte, operations per second).
    """
    figure = _figure(9, 6)
    axes = figure.subplots()
    intensity = [2.0**e for e in range(-3, 13)]
    bandwidth = figures["memory_read_bytes_per_second"]
    for kind in ("int8", "bf16", "f32"):
        peak = figures.get(f"{kind}_operations_per_second")
        if peak:
            label = f"{kind} {peak / 1e12:.2f} T/s"
            axes.loglog(intensity, [min(peak, bandwidth * x) for x in intensity], label=label, base=2)
    for name, x, y in points:
        axes.plot(x, y, "o")
        axes.annotate(name, (x, y))
    axes.set(
        title=f"{figures['threads']} threads, {figures['isa']}, memory {bandwidth / 1e9:.1f} GB/s",
        xlabel="operations per byte read from memory",
        ylabel="operations per second",
    )
    axes.legend()
    axes.grid(alpha=0.3)
    _save(path, figure, "Roofline")


def draw_load(path: Path, figures: Figures) -> None:
    """Time to the first token and between tokens against load, medians and 99th percentiles."""
    runs = [run for run in figures["runs"] if run["ttft_seconds"] and run["itl_seconds"]]
    figure = _figure(12, 4.5)
    loads = [run["load"] for run in runs]
    for axes, quantity, title in zip(
        figure.subplots(1, 3),
        ("ttft_seconds", "itl_seconds", "output_tokens_per_second"),
        ("time to first token", "time between tokens", "output tokens/s"),
        strict=True,
    ):
        if quantity == "output_tokens_per_second":
            axes.plot(loads, [run[quantity] for run in runs], "o-")
        else:
            for quantile, style in (("p50", "o-"), ("p99", "s--")):
                axes.plot(loads, [1e3 * run[quantity][quantile] for run in runs], style, label=quantile)
            axes.set(ylabel="ms")
            axes.legend()
        axes.set(title=title, xlabel=figures["load_unit"])
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    _save(path, figure, f"{figures['model']} under load")


def draw_latency(path: Path, figures: Figures) -> None:
    """Rates against depth, one line a batch size, prefill and decode."""
    figure = _figure(11, 4.5)
    for axes, phase in zip(figure.subplots(1, 2), ("prefill", "decode"), strict=True):
        points = [point for point in figures["points"] if point["phase"] == phase]
        key = "tokens" if phase == "prefill" else "batch"
        for value in sorted({point[key] for point in points}):
            line = sorted((p["depth"], p["tokens_per_second"]["median"]) for p in points if p[key] == value)
            axes.plot([depth for depth, _ in line], [rate for _, rate in line], "o-", label=f"{key} {value}")
        axes.set(title=phase, xlabel="depth (tokens before)", ylabel="tokens/s")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    _save(path, figure, f"{figures['model']}: speed against depth")


def draw_heat_map(
    path: Path, title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], labels: str
) -> None:
    """Values from 0 to 1 by row and column; ``labels`` is "row label|column label"."""
    figure = _figure(2 + 0.9 * len(columns), 2 + 0.5 * len(rows))
    axes: Axes = figure.subplots()
    image = axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), columns)
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            axes.text(x, y, f"{value:.2g}", ha="center", va="center")
    row_label, _, column_label = labels.partition("|")
    axes.set(xlabel=column_label, ylabel=row_label)
    figure.colorbar(image)
    _save(path, figure, title)


def check_ending(path: Path | None) -> None:
    """Raises UsageError, before anything is measured, for a picture that could not be drawn."""
    if path is None:
        return
    if path.suffix not in _ENDINGS:
        raise UsageError(f"--plot is {path}; a picture ends in {', '.join(_ENDINGS)}")
    _matplotlib()


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("pictures need matplotlib: pip install 'tokenmill[plot]'") from error
    return matplotlib


def _figure(width: float, height: float) -> Figure:
    _matplotlib()
    from matplotlib.figure import Figure as NewFigure  # not pyplot: no window, no global state

    return NewFigure(figsize=(width, height), layout="constrained")


def _save(path: Path, figure: Figure, title: str) -> None:
    figure.suptitle(title)
    if path.suffix != ".html":
        figure.savefig(path, dpi=120)
        return
    import io

    svg = io.StringIO()
    figure.savefig(svg, format="svg")
    picture = svg.getvalue()
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>{picture[picture.index('<svg') :]}"
    path.write_text(page)
