"""What an output must look like: a JSON schema, a regular expression, one of several texts, or a grammar."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tokenmill.errors import UsageError

MAX_GRAMMAR_CHARACTERS = 256 * 1024
"""Longest schema, expression, grammar or list of choices, as text."""


class StructuredOutputsError(UsageError):
    """A description of the output that cannot be used. Names the parameter at fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """Exactly one of these is given, in vLLM's names. Raises :class:`StructuredOutputsError` on construction for what
    is wrong at first sight; whether a schema or grammar can be compiled shows when a request starts."""

    json: str | Mapping[str, Any] | bool | None = None
    """A JSON schema, as text or decoded."""
    regex: str | None = None
    """A regular expression in the syntax of Rust's regex crate that the whole output matches."""
    choice: Sequence[str] | None = None
    """The output is one of these texts."""
    grammar: str | None = None
    """A context-free grammar in llguidance's dialect of Lark."""
    json_object: bool | None = None
    """True: any JSON object."""
    disable_any_whitespace: bool = False
    """JSON without spaces and line breaks between its tokens."""

    def __post_init__(self) -> None:
        given = [
            field.name
            for field in fields(self)
            if field.name != "disable_any_whitespace" and getattr(self, field.name) not in (None, False)
        ]
        if len(given) != 1:
            listed = " and ".join(given) or "nothing"
            raise StructuredOutputsError(
                f"structured_outputs has {listed}; give exactly one of json, regex, choice, grammar, json_object"
            )
        for name in ("regex", "grammar"):
            text = getattr(self, name)
            if text is not None and (not isinstance(text, str) or not text):
                raise StructuredOutputsError(f"structured_outputs.{name} is {text!r}; it must be a text")
        if self.choice is not None:
            choice = self.choice
            if isinstance(choice, str) or not isinstance(choice, Iterable):
                raise StructuredOutputsError(f"structured_outputs.choice is {choice!r}; it must be a list of texts")
            object.__setattr__(self, "choice", tuple(choice))
            if not self.choice or not all(isinstance(text, str) and text for text in self.choice):
                raise StructuredOutputsError("structured_outputs.choice must hold texts of at least one character")
        if self.json is not None:
            object.__setattr__(self, "json", self._schema_text())
        for name in ("json_object", "disable_any_whitespace"):
            if getattr(self, name) not in (None, True, False):
                raise StructuredOutputsError(f"structured_outputs.{name} is {getattr(self, name)!r}; it must be a bool")
        if len(self.source) > MAX_GRAMMAR_CHARACTERS:
            raise StructuredOutputsError(
                f"structured_outputs.{given[0]} takes {len(self.source)} characters; at most {MAX_GRAMMAR_CHARACTERS} "
                f"are accepted"
            )

    @property
    def source(self) -> str:
        """The one that is given, as text."""
        if self.json_object:
            return '{"type":"object"}'
        if self.choice is not None:
            return json.dumps(list(self.choice))
        return str(self.json or self.regex or self.grammar)

    def _schema_text(self) -> str:
        schema = self.json
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise StructuredOutputsError(f"structured_outputs.json is no JSON: {error}") from error
        if not isinstance(schema, Mapping | bool):
            raise StructuredOutputsError(
                f"structured_outputs.json is a JSON {type(schema).__name__}; a JSON schema is an object or a bool"
            )
        try:
            return json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise StructuredOutputsError(f"structured_outputs.json cannot be written as JSON: {error}") from error
