"""``tokenmill show MODEL``: what is in a model file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenmill.cli.terminal import megabytes, print_table
from tokenmill.errors import TokenmillError

if TYPE_CHECKING:
    from tokenmill.weights.checkpoint import Checkpoint
    from tokenmill.weights.inspect import CheckpointSummary

_GGUF_ABOUT = ("general.name", "general.organization", "general.license", "general.size_label")


def show(
    model: Annotated[str, typer.Argument(help="Name, .gguf file, folder, or org/name on the hub.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    template: Annotated[bool, typer.Option("--template", help="Print the chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, tensors and template included.")] = False,
) -> None:
    """Show a model's hyper-parameters, tokenizer, licence and tensors."""
    from tokenmill.sources import resolve
    from tokenmill.weights.checkpoint import open_checkpoint
    from tokenmill.weights.inspect import summarize

    path = resolve(model)
    with open_checkpoint(path) as checkpoint:
        summary = summarize(checkpoint)
        sections: dict[str, Mapping[str, object]] = {
            "file": {
                "path": str(checkpoint.path),
                "format": "GGUF" if checkpoint.kind == "gguf" else "safetensors",
                **_about(model, checkpoint),
                "tensors": len(summary.tensors),
                "parameters": summary.parameters,
                "bytes": summary.nbytes,
            },
            "hyper-parameters": _hyperparameters(checkpoint),
            "tokenizer": _tokenizer(checkpoint),
            "generation defaults": dict(checkpoint.generation_defaults),
        }
        chat_template = sections["tokenizer"].get("chat template")
        if as_json:
            print(json.dumps({**sections, **_json_tensors(summary)}, indent=2, default=str))
            return
        if template:
            print(chat_template or "this model has no chat template")
            return
        for title, entries in sections.items():
            _print_section(title, entries)
        _print_types(summary)
        if tensors:
            _print_tensors(summary)


def _about(model: str, checkpoint: Checkpoint) -> dict[str, object]:
    from tokenmill.sources import CATALOGUE

    about = {
        key.removeprefix("general."): checkpoint.metadata[key] for key in _GGUF_ABOUT if key in checkpoint.metadata
    }
    if entry := CATALOGUE.get(model):
        about |= {"license": f"{entry.licence} ({entry.licence_url})", "sources": "; ".join(map(str, entry.sources))}
    return about


def _hyperparameters(checkpoint: Checkpoint) -> dict[str, object]:
    """As the architecture resolves them; the reason where it refuses the model."""
    from tokenmill import models

    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    try:
        bound = models.bind(checkpoint.metadata, checkpoint.kind, shapes)
    except TokenmillError as error:
        return {"not runnable": str(error)}
    return {"architecture": bound.architecture, **_plain(bound.config)}


def _plain(config: object) -> dict[str, object]:
    """A dataclass as readable values; runs of equal layers are counted."""
    result: dict[str, object] = {}
    if not is_dataclass(config):
        return result
    for field in fields(config):
        value: Any = getattr(config, field.name)
        if isinstance(value, Enum):
            value = value.value
        elif is_dataclass(value):
            value = _plain(value)
        elif isinstance(value, frozenset):
            value = sorted(value)
        if value not in (None, [], ()):
            result[field.name] = value
    return result


def _tokenizer(checkpoint: Checkpoint) -> dict[str, object]:
    from tokenmill.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(checkpoint)
    except TokenmillError as error:
        return {"not usable": str(error)}
    return {
        "vocabulary": tokenizer.vocab_size,
        "begin": tokenizer.bos_id,
        "end": sorted(tokenizer.eos_ids),
        "chat template": tokenizer.chat_template,
    }


def _json_tensors(summary: CheckpointSummary) -> dict[str, object]:
    return {
        "types": {
            share.tensor_type.name: {"tensors": share.tensors, "values": share.values, "bytes": share.nbytes}
            for share in summary.types
        },
        "tensors": {
            info.name: {"type": info.tensor_type.name, "shape": info.shape, "bytes": info.nbytes}
            for info in summary.tensors
        },
    }


def _print_section(title: str, entries: Mapping[str, object]) -> None:
    if not entries:
        return
    print(title)
    for key, value in entries.items():
        print(f"  {key.replace('_', ' ')}: {_short(key, value)}")
    print()


def _short(key: str, value: object) -> str:
    if key == "bytes" and isinstance(value, int):
        return f"{value:,} ({megabytes(value)})"
    if key == "chat template":
        return "none" if not value else f"yes, {len(str(value))} characters (--template prints it)"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {_short(name, entry)}" for name, entry in value.items())
    if isinstance(value, tuple) and len(value) > 8:
        return _counted(value)
    return str(value)


def _counted(values: tuple[object, ...]) -> str:
    """A long tuple as its distinct values with their counts, e.g. the sliding windows of all layers."""
    try:
        counts = {value: values.count(value) for value in dict.fromkeys(values)}
    except TypeError:
        return str(values)
    if len(counts) > 8:
        return f"{len(values)} values"
    return ", ".join(f"{count} x {'none' if value is None else value}" for value, count in counts.items())


def _print_types(summary: CheckpointSummary) -> None:
    print_table(
        ("type", "tensors", "values", "bytes", "share", "bits a value"),
        [
            (
                share.tensor_type.name,
                f"{share.tensors:,}",
                f"{share.values:,}",
                f"{share.nbytes:,}",
                f"{100 * share.nbytes / max(summary.nbytes, 1):.1f} %",
                f"{share.bits_per_value:.2f}",
            )
            for share in summary.types
        ],
        right={1, 2, 3, 4, 5},
    )


def _print_tensors(summary: CheckpointSummary) -> None:
    print()
    print_table(
        ("tensor", "type", "shape", "bytes"),
        [
            (info.name, info.tensor_type.name, "x".join(map(str, info.shape)), f"{info.nbytes:,}")
            for info in summary.tensors
        ],
        right={3},
    )
