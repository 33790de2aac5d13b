"""Groups of verbs, and options that several verbs take together.

A verb may have a parameter whose type is a dataclass of options: on the command line each field is an option of its
own, and the verb gets the dataclass.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from inspect import Parameter, Signature
from typing import Any, get_type_hints

import typer

Verb = Callable[..., None]


def group(help_text: str, verbs: Mapping[str, Verb], name: str | None = None) -> typer.Typer:
    """A command whose verbs are ``verbs``, by name."""
    made = typer.Typer(
        name=name,
        help=help_text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    for verb_name, verb in verbs.items():
        made.command(verb_name)(unfolded(verb))
    return made


def unfolded(verb: Verb) -> Verb:
    """``verb`` with the fields of its dataclass parameters as parameters of their own."""
    hints = get_type_hints(verb, include_extras=True)
    parameters: list[Parameter] = []
    groups: dict[str, type[Any]] = {}
    for parameter in inspect.signature(verb).parameters.values():
        kind = hints[parameter.name]
        if is_dataclass(kind):
            assert isinstance(kind, type)
            groups[parameter.name] = kind
            own = get_type_hints(kind, include_extras=True)
            parameters += [
                Parameter(f.name, Parameter.KEYWORD_ONLY, default=f.default, annotation=own[f.name])
                for f in fields(kind)
            ]
        else:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=kind))

    @functools.wraps(verb)
    def call(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{f.name: given.pop(f.name) for f in fields(kind)})
        verb(**given)

    call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]  # what typer looks at
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call
