"""Tool calls in a model's answer.

Models tuned on the Hermes form, Qwen2.5 and SmolLM2 among them, write ``<tool_call>`` JSON ``</tool_call>``, the JSON
being an object with ``name`` and ``arguments``, or a list of such objects. What does not parse stays text.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import Any

_BEGIN = "<tool_call>"
_END = "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """``arguments`` is JSON text, as OpenAI has it."""

    name: str
    arguments: str
    call_id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def input(self) -> dict[str, Any]:
        """The arguments as an object, whatever the model wrote."""
        try:
            value = json.loads(self.arguments)
        except (ValueError, RecursionError):
            value = self.arguments
        return value if isinstance(value, dict) else {"arguments": value}

    def body(self) -> dict[str, Any]:
        """As in OpenAI's messages."""
        return {"id": self.call_id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class ToolCallReader:
    """Separates the text of one output, which comes in pieces, into prose and calls."""

    def __init__(self) -> None:
        self.calls: list[ToolCall] = []
        """All so far."""
        self._held = ""
        """What may be the beginning of a marker."""
        self._inside: str | None = None
        """Text since the last begin marker."""

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """The prose that is certain, and the calls that this piece completes."""
        prose = ""
        calls: list[ToolCall] = []
        while text:
            if self._inside is None:
                found, text = self._before_marker(text)
                prose += found
            else:
                self._inside += text
                written, end, text = self._inside.partition(_END)
                if not end:
                    break
                self._inside = None
                parsed = _parse(written)
                if parsed is None:
                    prose += _BEGIN + written + _END
                else:
                    calls += parsed
        self.calls += calls
        return prose, calls

    def flush(self) -> tuple[str, list[ToolCall]]:
        """The rest, when no more text comes. A call whose end marker is missing counts if its JSON is whole."""
        if self._inside is None:
            prose, self._held = self._held, ""
            return prose, []
        written, self._inside = self._inside, None
        calls = _parse(written)
        if calls is None:
            return _BEGIN + written, []
        self.calls += calls
        return "", calls

    def _before_marker(self, text: str) -> tuple[str, str]:
        """Prose up to a begin marker, and what follows the marker; without one nothing follows."""
        self._held += text
        prose, marker, rest = self._held.partition(_BEGIN)
        if marker:
            self._held, self._inside = "", ""
            return prose, rest
        keep = next((n for n in range(len(_BEGIN) - 1, 0, -1) if self._held.endswith(_BEGIN[:n])), 0)
        prose, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return prose, ""


def _parse(text: str) -> list[ToolCall] | None:
    """The calls that ``text`` spells; None if it is something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    calls = []
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            return None
        arguments = item.get("arguments", item.get("parameters", {}))
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append(ToolCall(item["name"], written))
    return calls or None
