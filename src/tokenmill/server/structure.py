"""What an answer must look like: response formats, vLLM's structured outputs, and tool calls that must be made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenmill.errors import UsageError
from tokenmill.server.errors import ApiError, unsupported
from tokenmill.server.tool_calls import ToolCall
from tokenmill.structured import StructuredOutputs

Tool = Mapping[str, Any]


def from_fields(value: Mapping[str, Any] | None, param: str = "structured_outputs") -> StructuredOutputs | None:
    """vLLM's ``structured_outputs``: one of json, regex, choice, grammar, json_object. Raises ApiError."""
    if value is None:
        return None
    known = {"json", "regex", "choice", "grammar", "json_object", "disable_any_whitespace"}
    for name in value:
        if name not in known:
            raise unsupported(param, f"has {name!r:.40}; it takes one of {', '.join(sorted(known))}")
    return _structured(param, **value)


def from_format(value: Mapping[str, Any] | None, param: str = "response_format") -> StructuredOutputs | None:
    """OpenAI's response format, as chat completions nest it or as responses do; None for text. Raises ApiError."""
    match value:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return _structured(param, json_object=True)
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return _structured(param, json=schema)
        case {"type": "json_schema", "schema": dict(schema)}:
            return _structured(param, json=schema)
    raise unsupported(param, 'must be of type "text", "json_object", or "json_schema" with a schema')


class ForcedCalls:
    """The tool calls that a request insists on: a grammar for the answer, and the reader of what it spells.

    With one tool the answer is its arguments; with several it is a list of objects with ``name`` and ``parameters``.
    """

    def __init__(self, tools: Sequence[Tool], name: str | None) -> None:
        """``tools`` in chat completions' form; ``name`` is the one to be called, None leaves the choice.

        Raises ApiError for a name that is not among them.
        """
        functions = [tool["function"] for tool in tools]
        if name is not None and all(function["name"] != name for function in functions):
            raise ApiError(f"tool_choice names {name!r:.60}, which is not among tools", param="tool_choice")
        self._name = name
        schemas = {function["name"]: function.get("parameters") or {"type": "object"} for function in functions}
        schema = _list_of(schemas) if name is None else schemas[name]
        self.structure = _structured("tools", json=schema)
        self.calls: list[ToolCall] = []
        self._text = ""

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Nothing is certain before the end."""
        self._text += text
        return "", []

    def flush(self) -> tuple[str, list[ToolCall]]:
        """The calls; text that an early end has left incomplete stays text."""
        try:
            value = json.loads(self._text)
        except ValueError:
            return self._text, []
        if self._name is not None:
            self.calls = [ToolCall(self._name, self._text.strip())]
        else:
            self.calls = [ToolCall(each["name"], json.dumps(each["parameters"], ensure_ascii=False)) for each in value]
        return "", self.calls


def _list_of(schemas: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": {"anyOf": [_call(*each) for each in schemas.items()]}}


def _call(name: str, parameters: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "parameters": parameters},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _structured(param: str, **given: Any) -> StructuredOutputs:
    try:
        return StructuredOutputs(**given)
    except UsageError as error:
        raise ApiError(f"{param}: {error}", param=param) from error
