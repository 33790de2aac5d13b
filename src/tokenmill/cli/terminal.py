"""Plain output for people: tables, sizes and the lines on standard error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Sequence


def say(message: str) -> None:
    """A line on standard error. Where it cannot be written (a full disk), what it accompanies goes on."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def megabytes(size: int) -> str:
    """Bytes as MB (10^6), or GB from 10 GB on."""
    return f"{size / 1e9:,.1f} GB" if size >= 10_000_000_000 else f"{size / 1e6:,.1f} MB"


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> None:
    """Columns as wide as their widest cell, on standard output; columns in ``right`` are right-aligned.

    Plain text on purpose: it neither wraps nor cuts when it is piped.
    """
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        cells = [
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
