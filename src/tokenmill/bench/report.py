"""docs/benchmarks.md, its pictures and the README's headline table, made from result files and from nothing else.

Every table stands with the command that printed it, the machine and the date. A figure that is in no result file is in
no document.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenmill.bench import plot
from tokenmill.bench.record import ResultFileError, read_record
from tokenmill.bench.report_tables import SECTIONS, Record, model_name, spread_text, table

BEGIN, END = "<!-- headline: written by `tokenmill bench report` -->", "<!-- end of headline -->"
PICTURES = "pictures"
"""Folder beside the page."""

_DRAW: Mapping[str, Callable[[Path, Record], None]] = {
    "compare": plot.draw_comparison,
    "roofline": plot.draw_roofline,
    "latency-sweep": plot.draw_latency,
    "serve": plot.draw_load,
    "profile": plot.draw_profile,
    "needle": plot.draw_needles,
}


@dataclass(frozen=True, slots=True)
class Page:
    """What a set of result files says. ``text`` is the whole page, ``headline`` the README's table."""

    text: str
    headline: str
    pictures: Mapping[str, Record]
    """What to draw, by file name."""

    def draw(self, folder: Path) -> None:
        """Draws the pictures that the page shows. Raises UsageError if matplotlib is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, record in self.pictures.items():
            plot.check_ending(folder / name)
            _DRAW[str(record["kind"])](folder / name, record)


def build_page(files: Iterable[Path]) -> Page:
    """The page of all result files, in the order of kinds and then of file names.

    Raises ResultFileError for a file that is none, of an unknown kind, or without the fields of its kind.
    """
    records = []
    for path in sorted(files):
        record = read_record(path)
        if record["kind"] not in SECTIONS:
            raise ResultFileError(f"{path} holds results of kind {record['kind']!r}, which has no place in the report")
        records.append((path, record))
    order = list(SECTIONS)
    records.sort(key=lambda pair: order.index(str(pair[1]["kind"])))
    lines = [
        "# Benchmarks",
        "",
        "Written by `tokenmill bench report` from the result files in `docs/results`; change those, not this page.",
        "[Measuring](measuring.md) says what each figure means. Rates of a shared machine move within the hour, for",
        "all engines alike: ratios, which are taken within a round of alternating runs, stand for more than rates do.",
        "Values are medians with the lowest and the highest sample.",
    ]
    pictures = {}
    previous = ""
    for path, record in records:
        kind = str(record["kind"])
        section = SECTIONS[kind]
        if section.title != previous:
            lines += ["", f"## {section.title}", *(["", section.about] if section.about else [])]
            previous = section.title
        try:
            lines += ["", *section.tables(record)]
        except (KeyError, TypeError, IndexError) as error:
            raise ResultFileError(f"{path} lacks what a result of {kind} has: {error!r}") from error
        if kind in _DRAW:
            picture = f"{path.stem}.svg"
            pictures[picture] = record
            lines += ["", f"![{section.title}: {path.stem}]({PICTURES}/{picture})"]
        lines += ["", *_source(record)]
    headline = _headline([record for _, record in records])
    return Page("\n".join(lines) + "\n", "\n".join(headline), pictures)


def with_headline(readme: str, headline: str) -> str:
    """``readme`` with the table between its markers replaced. Raises ResultFileError if the markers are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ResultFileError(f"the README has no place for the headline: {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{headline}\n{END}{after}"


def _source(record: Record) -> list[str]:
    """When, where, with what, and the command that does it again."""
    model = f", model SHA-256 `{str(record['model_sha256'])[:12]}`" if "model_sha256" in record else ""
    command = shlex.join(str(part) for part in record["command"])
    return [
        f"{str(record['date'])[:10]}, {len(record['cpus'])} CPUs of {record['machine']}, "
        f"tokenmill {record['tokenmill']}{model}:",
        "",
        "```bash",
        command,
        "```",
    ]


def _headline(records: Sequence[Record]) -> list[str]:
    """One row for each model and engine that was compared with; workloads may come from several files."""
    ratios: dict[tuple[str, str], dict[str, str]] = {}
    heads: dict[str, set[str]] = {"prefill": set(), "decode": set(), "output": set()}
    for record in records:
        for comparison in record["comparisons"] if record["kind"] == "compare" else ():
            work = comparison["workload"]
            tokens = work["input_tokens"]
            if work["requests"] == 1:
                heads["prefill"].add(f"prefill of {tokens} tokens")
                heads["decode"].add(f"decode after {tokens}")
            else:
                heads["output"].add(f"{work['requests']} requests of {tokens} in, {work['output_tokens']} out")
            for engine in comparison["engines"][1:]:
                own = ratios.setdefault((model_name(record["model"]), engine["name"]), {})
                own |= {name: spread_text(each["ratio"], 2) or "failed" for name, each in engine["metrics"].items()}
    if not ratios:
        return ["No comparison has been recorded yet."]
    general = {"prefill": "prefill", "decode": "decode", "output": "many requests"}
    head = [next(iter(heads[name])) if len(heads[name]) == 1 else text for name, text in general.items()]
    rows = [(*place, *(own.get(name, "not measured") for name in general)) for place, own in ratios.items()]
    about = "Tokenmill's tokens per second over the other engine's on the same file: median of rounds in turn (range)."
    return [about, "", *table(("model", "beside", *head), rows)]
