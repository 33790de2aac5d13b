"""What the verbs that measure share, ``bench`` and ``eval``: result files, pictures, lists of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the report to this file.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Also draw it: .png, .svg or .html (needs the plot extra).")]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Samples; medians are shown.")]


def numbers(option: str, text: str, least: int) -> list[int]:
    """``128,512`` as numbers. Raises UsageError naming ``option``."""
    from tokenmill.errors import UsageError

    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} is {text!r}; it must be a number, or several with commas between") from None
    if min(values) < least:
        raise UsageError(f"{option} is {text!r}; each must be at least {least}")
    return values


def write(path: Path | None, kind: str, figures: Mapping[str, object], model: Path | None = None) -> None:
    """Writes a result file, if one is asked for."""
    if path is None:
        return
    from tokenmill.bench.record import record, write_record

    write_record(path, record(kind, figures, model))
