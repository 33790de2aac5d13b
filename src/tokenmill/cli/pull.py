"""``tokenmill pull NAME...``: fetch models ahead of their first use."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def pull_models(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Names from `tokenmill list`, or org/name on the hub.")
    ],
    verify: Annotated[bool, typer.Option("--verify", help="Hash files that are already here again.")] = False,
) -> None:
    """Fetch models, check them and print where they are."""
    from tokenmill.sources import CATALOGUE, is_pulled, resolve
    from tokenmill.sources import verify as verify_pulled

    for name in names:
        entry = CATALOGUE.get(name)
        already_here = entry is not None and is_pulled(entry)
        path = resolve(name)
        if entry is not None and already_here:
            if verify:
                verify_pulled(entry)
            print(f"{name} is already here" + (", and its checksum is right" if verify else ""), file=sys.stderr)
        print(path)
