"""Pictures of result files: what was measured, beside what the machine allows.

Every function takes the figures as a result file holds them, so that a picture can be drawn again from the file.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmill.bench.report_tables import model_name
from tokenmill.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Figures = Mapping[str, Any]

_ENDINGS = (".png", ".svg", ".html")
_OTHER = "0.6"
"""Grey: what is not in the foreground."""


def draw_profile(path: Path, figures: Figures) -> None:
    """The ops of each step as a waterfall over time, and below it each role's time with its limit inside."""
    steps = figures["steps"]
    heights = [height for step in steps for height in (0.8, 0.35 * len(_shown_roles(step)) + 0.5)]
    figure = _figure(11, sum(heights) + 0.9 * len(heights))
    axes = figure.subplots(2 * len(steps), 1, height_ratios=heights, squeeze=False)[:, 0]
    for index, step in enumerate(steps):
        roles = _shown_roles(step)
        colours = {role["role"]: f"C{i}" for i, role in enumerate(roles)}
        waterfall, bars = axes[2 * index], axes[2 * index + 1]
        begin = 1e3 * step["prepare_seconds"]
        for op in step["ops"]:
            width = 1e3 * op["seconds"]
            waterfall.broken_barh([(begin, width)], (0, 1), color=colours.get(op["role"], _OTHER), linewidth=0)
            begin += width
        share = 100 * step["limit_seconds"] / step["seconds"]
        what = f"prefill of {step['tokens']} tokens"
        if step["phase"] == "decode":
            what = f"decode of {step['sequences']} at depth {step['depth']}"
        waterfall.set(
            title=f"{what}: {1e3 * step['seconds']:.2f} ms, {share:.0f} % of the limit",
            xlabel="ms since the step's begin, op by op",
            yticks=[],
            xlim=(0, 1e3 * step["seconds"]),
        )
        names = [f"{role['role']} ({role['count']})" for role in roles]
        places = range(len(roles))
        times = [1e3 * role["seconds"] for role in roles]
        drawn = bars.barh(places, times, height=0.7, color=list(colours.values()))
        bars.bar_label(drawn, [f"{100 * role['seconds'] / step['seconds']:.0f} %" for role in roles], padding=3)
        limits = [1e3 * min(role["limit_seconds"], role["seconds"]) for role in roles]
        bars.barh(places, limits, height=0.25, color="black", alpha=0.55, label="the least that the limits allow")
        bars.set_yticks(places, names)
        bars.invert_yaxis()
        bars.margins(x=0.08)
        bars.legend(loc="lower right")
        bars.set(xlabel="ms of the step, and its share")
    _save(path, figure, f"{_model(figures)}: where a step's time goes")


def _shown_roles(step: Figures) -> list[Figures]:
    """The roles that take time, longest first: as many as there are colours."""
    roles = sorted(step["roles"], key=lambda role: -role["seconds"])
    return [role for role in roles if role["seconds"] > 0.005 * step["seconds"]][:10]


def draw_comparison(path: Path, figures: Figures) -> None:
    """Each engine's rates as bars with their range, one panel a rate."""
    panels = [(work, name) for work in figures["comparisons"] for name in work["engines"][0]["metrics"]]
    figure = _figure(4.2 * max(len(panels), 1), 4.2)
    for axes, (comparison, name) in zip(figure.subplots(1, max(len(panels), 1), squeeze=False)[0], panels, strict=True):
        work = comparison["workload"]
        found = [(engine["name"], engine["metrics"][name]) for engine in comparison["engines"]]
        found = [(engine, metric) for engine, metric in found if metric["rate"] is not None]
        spreads = [metric["rate"] for _, metric in found]
        middle = [spread["median"] for spread in spreads]
        reach = [[s["median"] - s["low"] for s in spreads], [s["high"] - s["median"] for s in spreads]]
        colours = ["C0" if engine == "tokenmill" else _OTHER for engine, _ in found]
        bars = axes.bar([engine for engine, _ in found], middle, yerr=reach, capsize=4, color=colours, ecolor="0.3")
        axes.bar_label(bars, fmt="%.0f", label_type="center", color="white", fontweight="bold")
        what = {"prefill": f"prefill of {work['input_tokens']}", "decode": f"decode after {work['input_tokens']}"}
        axes.set(title=what.get(name, f"{work['requests']} requests together, output"))
        axes.set_ylabel("tokens/s")
        axes.set_ylim(bottom=0)
        axes.tick_params(axis="x", rotation=20)
    _save(path, figure, f"{_model(figures)}: the same work on each engine (median and range)")


def draw_roofline(path: Path, figures: Figures) -> None:
    """Attainable operations per second against operations per byte: one roof a kind of arithmetic, one slope a level
    of memory."""
    figure = _figure(9, 6)
    axes = figure.subplots()
    intensity = [2.0**e for e in range(-4, 12)]
    peaks = {
        kind: figures[f"{kind}_operations_per_second"]
        for kind in ("int8", "bf16", "f32")
        if figures.get(f"{kind}_operations_per_second")
    }
    top = max(peaks.values())
    slopes = {"memory": figures["memory_read_bytes_per_second"]}
    for rate in figures["read_rates"]:
        if rate["threads"] == figures["threads"] and rate["level"] != "memory":
            slopes[rate["level"]] = rate["bytes_per_second"]
    for style, (level, bandwidth) in zip(("-", "--", ":", "-."), slopes.items(), strict=False):
        line = [x for x in intensity if bandwidth * x < top] + [top / bandwidth]
        label = f"{level} {bandwidth / 1e9:.1f} GB/s"
        axes.plot(line, [bandwidth * x for x in line], style, color="0.35", label=label)
    for colour, (kind, peak) in enumerate(peaks.items()):
        begin = peak / max(slopes.values())
        axes.plot([begin, intensity[-1]], [peak, peak], color=f"C{colour}", linewidth=2.5)
        label = f"{kind} {peak / 1e12:.2f} T/s"
        axes.text(intensity[-1] * 0.95, peak * 1.06, label, ha="right", va="bottom", color=f"C{colour}")
        ridge = peak / slopes["memory"]
        axes.plot(ridge, peak, "o", color=f"C{colour}")
        axes.annotate(f"{ridge:.0f}", (ridge, peak), (4, -12), textcoords="offset points", color=f"C{colour}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(
        xlim=(intensity[0], intensity[-1]),
        ylim=(None, 2.5 * top),
        xlabel="operations per byte read (dots: where memory stops being the limit)",
        ylabel="operations per second",
    )
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    _save(path, figure, f"Limits of {figures['machine']}: {figures['threads']} threads, {figures['isa']}")


def draw_load(path: Path, figures: Figures) -> None:
    """Time to the first token and between tokens against load, medians and 99th percentiles, and what comes out."""
    runs = [run for run in figures["runs"] if run["ttft_seconds"] and run["itl_seconds"]]
    figure = _figure(12, 4)
    loads = [run["load"] for run in runs]
    for axes, quantity, title, bound in zip(
        figure.subplots(1, 3),
        ("ttft_seconds", "itl_seconds", "output_tokens_per_second"),
        ("time to first token", "time between tokens", "output tokens/s"),
        (figures.get("ttft_bound_ms"), figures.get("itl_bound_ms"), None),
        strict=True,
    ):
        if quantity == "output_tokens_per_second":
            axes.plot(loads, [run[quantity] for run in runs], "o-")
        else:
            for quantile, style in (("p50", "o-"), ("p99", "s--")):
                axes.plot(loads, [1e3 * run[quantity][quantile] for run in runs], style, label=quantile)
            if bound is not None:
                axes.axhline(bound, color="C3", linewidth=1, label="bound")
            axes.set(ylabel="ms")
            axes.legend()
        axes.set(title=title, xlabel=figures["load_unit"])
        axes.set_xticks(loads)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    _save(path, figure, f"{_model(figures)} under load")


def draw_latency(path: Path, figures: Figures) -> None:
    """Rates against depth, one line a batch size, prefill and decode."""
    figure = _figure(11, 4.5)
    for axes, phase in zip(figure.subplots(1, 2), ("prefill", "decode"), strict=True):
        points = [point for point in figures["points"] if point["phase"] == phase]
        key = "tokens" if phase == "prefill" else "batch"
        for value in sorted({point[key] for point in points}):
            line = sorted((p for p in points if p[key] == value), key=lambda p: p["depth"])
            depths, rates = [p["depth"] for p in line], [p["tokens_per_second"] for p in line]
            middle = [rate["median"] for rate in rates]
            reach = [[r["median"] - r["low"] for r in rates], [r["high"] - r["median"] for r in rates]]
            axes.errorbar(depths, middle, reach, fmt="o-", capsize=3, label=f"{key} {value}")
            axes.set_xticks(depths)
        axes.set(title=phase, xlabel="depth: tokens before", ylabel="tokens/s (median and range)")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    _save(path, figure, f"{_model(figures)}: speed against depth")


def draw_needles(path: Path, figures: Figures) -> None:
    """The share of needles found by depth and length, one map a model."""
    maps = figures["maps"]
    rows, columns = len(maps[0]["depths"]), len(maps[0]["lengths"])
    figure = _figure(len(maps) * (1.8 + 0.8 * columns) + 0.8, 2 + 0.5 * rows)
    panels = figure.subplots(1, len(maps), squeeze=False, sharey=True)[0]
    for axes, found in zip(panels, maps, strict=True):
        image = axes.imshow(found["found"], vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_yticks(range(rows), [f"{100 * depth:g} %" for depth in found["depths"]])
        axes.set_xticks(range(columns), [str(length) for length in found["lengths"]])
        for y, line in enumerate(found["found"]):
            for x, share in enumerate(line):
                colour = "black" if 0.2 < share < 0.8 else "white"
                axes.text(x, y, f"{share:.2g}", ha="center", va="center", color=colour)
        axes.set(title=_model(found), xlabel="tokens")
    panels[0].set_ylabel("depth of the fact")
    figure.colorbar(image, ax=panels, label="share found")
    _save(path, figure, "Needles found")


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


def _model(figures: Figures) -> str:
    return model_name(str(figures["model"]))


def _save(path: Path, figure: Figure, title: str) -> None:
    """Writes the picture; the same figures give the same SVG: a page's pictures change with its results only."""
    import io

    figure.suptitle(title)
    if path.suffix == ".png":
        figure.savefig(path, dpi=120)
        return
    svg = io.StringIO()
    with _matplotlib().rc_context({"svg.hashsalt": "tokenmill"}):
        figure.savefig(svg, format="svg", metadata={"Date": None})
    picture = svg.getvalue()
    if path.suffix == ".html":
        head = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>"
        picture = head + picture[picture.index("<svg") :]
    path.write_text(picture)
