"""``tokenmill list``: the models that have a name, and those that are here."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from tokenmill.cli.terminal import megabytes, print_table


@dataclass(frozen=True, slots=True)
class ListedModel:
    """One row. ``state`` is "here", "partly here", "not here" or "local file"; sizes are in bytes."""

    name: str
    title: str
    size: int
    licence: str
    state: str
    path: str | None


def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the catalogue and the .gguf files in the models folder."""
    from tokenmill.sources import DEFAULT_MODEL, models_folder

    models = listed_models()
    if as_json:
        print(json.dumps([asdict(model) for model in models], indent=2))
        return
    rows = [
        (m.name + (" (default)" if m.name == DEFAULT_MODEL else ""), m.title, megabytes(m.size), m.licence, m.state)
        for m in models
    ]
    print_table(("name", "model", "size", "licence", "state"), rows, right={2})
    print(f"\nmodels folder: {models_folder()}")


def listed_models() -> list[ListedModel]:
    """The catalogue in its order, then other .gguf files of the models folder by name."""
    from tokenmill.sources import CATALOGUE, is_pulled, local_path, models_folder
    from tokenmill.sources.folders import partial_folder

    rows: list[ListedModel] = []
    for model in CATALOGUE.values():
        here = is_pulled(model)
        state = "here" if here else "partly here" if os.path.exists(partial_folder(model)) else "not here"
        path = str(local_path(model)) if here else None
        rows.append(ListedModel(model.name, model.title, model.size, model.licence, state, path))
    known = {model.file_name for model in CATALOGUE.values()}
    rows.extend(
        ListedModel(file.name, "", file.stat().st_size, "", "local file", str(file))
        for file in _gguf_files(models_folder())
        if file.name not in known
    )
    return rows


def _gguf_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.gguf")) if os.path.isdir(folder) else []
