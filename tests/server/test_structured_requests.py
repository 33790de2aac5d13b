"""Answers of a given form: schemas, expressions, choices, and tool calls that must be made."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import openai
import pytest
from served_model import RunningServer

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "wet": {"type": "boolean"}},
    "required": ["city", "wet"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {
        "type": "function",
        "function": {"name": "clock", "parameters": {"type": "object", "additionalProperties": False}},
    },
]
ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Rain?"}], "max_tokens": 200}


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def check(value: Any) -> None:
    assert value["city"] in ("Oslo", "Rome")
    assert isinstance(value["wet"], bool)


def test_a_json_schema_holds_whatever_the_model_would_say(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(**ASK, response_format=form, seed=1)
    check(json.loads(answer.choices[0].message.content or ""))
    assert answer.choices[0].finish_reason == "stop"
    response = client.responses.create(
        model="tiny",
        input="Rain?",
        max_output_tokens=200,
        text={"format": {"type": "json_schema", "name": "weather", "schema": SCHEMA}},
    )
    check(json.loads(response.output_text))


def test_expressions_and_choices(server: RunningServer) -> None:
    def text(**wanted: Any) -> str:
        body = {"prompt": "When?", "max_tokens": 50, "structured_outputs": wanted}
        found: str = server.post("/v1/completions", body).json()["choices"][0]["text"]
        return found

    dated = r"[0-9]{4}-[0-9]{2}"  # not \d: that is every digit of Unicode, and not of the same Unicode everywhere
    assert re.fullmatch(dated, text(regex=dated))
    assert text(choice=["yes", "no"]) in ("yes", "no")


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_a_call_that_must_be_made_is_made(client: openai.OpenAI, choice: Any, streamed: bool) -> None:
    body = {**ASK, "tools": TOOLS, "tool_choice": choice, "seed": 2}
    if streamed:
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**body, stream=True)]
        functions = [call.function for each in chunks for call in each.delta.tool_calls or []]
        reason, text = chunks[-1].finish_reason, "".join(each.delta.content or "" for each in chunks)
    else:
        (answer,) = client.chat.completions.create(**body).choices
        functions = [call.function for call in answer.message.tool_calls or []]
        reason, text = answer.finish_reason, answer.message.content or ""
    if reason == "length":  # a list of calls need not end within the bound; its text is then not lost
        assert choice == "required"
        assert text.lstrip().startswith("[")
        return
    assert (reason, text) == ("tool_calls", "")
    assert functions
    for function in functions:
        assert function is not None
        assert function.name in ("weather", "clock")
        if function.name == "weather":
            check(json.loads(function.arguments or ""))


def test_anthropics_tool_choice(server: RunningServer) -> None:
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    tools: list[Any] = [{"name": "weather", "input_schema": SCHEMA}]
    message = client.messages.create(**ASK, tools=tools, tool_choice={"type": "tool", "name": "weather"})
    (block,) = message.content
    assert block.type == "tool_use"
    check(block.input)
    assert message.stop_reason == "tool_use"


@pytest.mark.parametrize(
    ("param", "given"),
    [
        ("response_format", {"response_format": {"type": "xml"}}),
        ("response_format", {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}),
        ("response_format", {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}),
        ("structured_outputs", {"structured_outputs": {}}),
        ("structured_outputs", {"structured_outputs": {"regex": "a", "choice": ["b"]}}),
        ("structured_outputs", {"structured_outputs": {"nonsense": 1}}),
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice", {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}),
        ("tool_choice", {"tools": TOOLS, "tool_choice": "perhaps"}),
        ("priority", {"priority": 3}),
    ],
    ids=lambda value: json.dumps(value)[:50],
)
def test_what_makes_no_sense_is_named(server: RunningServer, param: str, given: dict[str, Any]) -> None:
    answer = server.post("/v1/chat/completions", {**ASK, **given})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


HOSTILE: dict[str, dict[str, Any]] = {
    "nested counts": {"regex": "(a{1,1000}){1,1000}(b{1,1000}){1,1000}"},
    "backtracking": {"regex": "(((a+)+)+)+b" * 20},
    "deep schema": {"json": nested(150)},
    "wide schema": {"json": {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(3000)}}},
    "many choices": {"choice": [f"choice {n} " * 3 for n in range(1000)]},
    "schema in a circle": {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
    "ambiguous grammar": {"grammar": 'start: start start | start start start | "a" | ""'},
}


def test_hostile_forms_end_their_own_requests_only(server: RunningServer) -> None:
    body = {"prompt": "neighbour", "max_tokens": 400, "temperature": 1, "seed": 5}
    expected = server.complete(**body).json()["choices"][0]["text"]
    with ThreadPoolExecutor(len(HOSTILE) + 1) as pool:
        neighbour = pool.submit(server.complete, **body)
        forms = [{"prompt": "x", "max_tokens": 5, "structured_outputs": hostile} for hostile in HOSTILE.values()]
        answers = list(pool.map(lambda form: server.post("/v1/completions", form).status_code, forms))
        assert neighbour.result().json()["choices"][0]["text"] == expected
    assert set(answers) <= {200, 400}
    assert server.metric("tokenmill:engine_deaths_total") == 0


@pytest.mark.parametrize("streamed", [True, False])
def test_a_form_that_is_refused_is_not_quoted_in_the_log(server: RunningServer, streamed: bool) -> None:
    body = {"prompt": "x", "stream": streamed, "structured_outputs": {"regex": "private("}}
    headers = {"x-request-id": f"refused-{streamed}"}
    assert server.post("/v1/completions", body, headers=headers).status_code == 400
    server.until(lambda: any(f"refused-{streamed}" in line for line in server.log), "the request is logged")
    assert any("invalid request" in line for line in server.log if f"refused-{streamed}" in line)
    assert not any("private" in line for line in server.log)


def test_bad_words_and_allowed_tokens(server: RunningServer) -> None:
    plain = server.complete("the rain", max_tokens=8).json()["choices"][0]["text"]
    banned = next(character for character in plain if character.isascii() and character.isalnum())
    text = server.complete("the rain", max_tokens=8, bad_words=[banned]).json()["choices"][0]["text"]
    assert banned not in text
    ids = server.post("/tokenize", {"prompt": "x"}).json()["tokens"]
    assert server.complete(max_tokens=3, allowed_token_ids=ids).json()["choices"][0]["text"] == "xxx"


def test_a_salt_keeps_tenants_apart(server: RunningServer) -> None:
    def cached(**salt: str) -> int:
        usage = server.complete(list(range(60, 160)), max_tokens=1, **salt).json()["usage"]
        found: int = usage["prompt_tokens_details"]["cached_tokens"]
        return found

    assert cached(cache_salt="one") == 0
    assert cached(cache_salt="one") == 96
    assert cached(cache_salt="two") == 0
