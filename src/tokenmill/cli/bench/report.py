"""``tokenmill bench report``: result files into a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    results: Annotated[list[Path], typer.Argument(help="Result files (--json of other verbs), or folders of them.")],
    out: Annotated[Path, typer.Option("--out", help="The page to write.")] = Path("docs/benchmarks.md"),
    readme: Annotated[
        Path | None, typer.Option("--readme", help="Also put the headline table between this file's markers.")
    ] = None,
) -> None:
    """Write a page of tables and pictures from result files, each with its command, machine and date."""
    from tokenmill.bench.report import PICTURES, build_page, with_headline
    from tokenmill.errors import UsageError

    files = [file for path in results for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if not files:
        raise UsageError(f"there is no result file in {', '.join(map(str, results))}")
    page = build_page(files)
    page.draw(out.parent / PICTURES)
    out.write_text(page.text)
    print(out)
    if readme is not None:
        readme.write_text(with_headline(readme.read_text(), page.headline))
        print(readme)
