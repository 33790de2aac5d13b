"""Tool calls found in text that comes in pieces of any size."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.server.tool_calls import ToolCallReader

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": [1, 2]}}\n</tool_call>'


def read(pieces: list[str]) -> tuple[str, list[tuple[str, object]]]:
    reader = ToolCallReader()
    prose = "".join(reader.push(piece)[0] for piece in pieces)
    prose += reader.flush()[0]
    return prose, [(call.name, json.loads(call.arguments)) for call in reader.calls]


@given(st.lists(st.integers(1, 12), min_size=1))
def test_pieces_do_not_matter(sizes: list[int]) -> None:
    text = f"Let me <look>.\n{CALL}\nand{CALL} <tool_cal"
    pieces, at, turn = [], 0, 0
    while at < len(text):
        pieces.append(text[at : at + sizes[turn % len(sizes)]])
        at, turn = at + sizes[turn % len(sizes)], turn + 1
    prose, calls = read(pieces)
    assert calls == [("weather", {"city": "Oslo", "days": [1, 2]})] * 2
    assert prose == "Let me <look>.\n\nand <tool_cal"


def test_a_list_is_several_calls() -> None:
    _, calls = read(['<tool_call>[{"name": "a", "arguments": {}}, {"name": "b", "parameters": {"x": 1}}]</tool_call>'])
    assert calls == [("a", {}), ("b", {"x": 1})]


def test_a_call_without_its_end_counts_if_it_is_whole() -> None:
    assert read(['<tool_call>{"name": "a", "arguments": {}}'])[1] == [("a", {})]


@pytest.mark.parametrize("broken", ['{"name": 3}', '{"name": "a", ', "no JSON", "[]", "[1]", "[" * 100_000])
def test_what_does_not_parse_stays_text(broken: str) -> None:
    text = f"x <tool_call>{broken}</tool_call> y"
    assert read([text]) == (text, [])
    assert read([text.removesuffix("</tool_call> y")]) == (text.removesuffix("</tool_call> y"), [])
