"""/v1/responses through the openai package, and /infill."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from served_model import RunningServer
from tiny_gguf import CONTROL

ASK: dict[str, Any] = {"model": "tiny", "input": "What is rain?", "temperature": 0, "max_output_tokens": 12}


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def test_a_response_is_the_answer_of_chat_completions(client: openai.OpenAI) -> None:
    response = client.responses.create(**ASK, instructions="Be brief.")
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is rain?"}],
        temperature=0,
        max_tokens=12,
    )
    assert response.output_text == chat.choices[0].message.content
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None
    assert response.usage.output_tokens == 12


def test_a_stream_builds_the_same_object(client: openai.OpenAI) -> None:
    whole = client.responses.create(**ASK)
    events = list(client.responses.create(**ASK, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == whole.output_text


def test_a_conversation_of_items(client: openai.OpenAI, server: RunningServer) -> None:
    items: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "function_call", "call_id": "c1", "name": "sky", "arguments": '{"city": "Oslo"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "wet"},
    ]
    tools: list[Any] = [{"type": "function", "name": "sky", "parameters": {"type": "object"}, "strict": False}]
    assert client.responses.create(**{**ASK, "input": items}, tools=tools).output


@pytest.mark.parametrize(
    "given",
    [
        {"store": True},
        {"previous_response_id": "resp_1"},
        {"text": {"verbosity": "high"}},
        {"tools": [{"type": "web_search"}]},
        {"input": []},
        {"input": [{"type": "image"}]},
        {"truncation": "auto"},
        {"nonsense": 1},
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_named(server: RunningServer, given: dict[str, Any]) -> None:
    answer = server.post("/v1/responses", {**ASK, **given})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == next(iter(given))


def test_infill_puts_the_models_marks_around_the_pieces(server: RunningServer) -> None:
    def ids(text: str) -> list[int]:
        found: list[int] = server.post("/tokenize", {"content": text}).json()["tokens"]
        return found

    before, after, middle = (ids(name) for name in CONTROL[3:])
    prompt = [*before, *ids("def f("), *after, *ids("return x"), *middle, *ids("x")]
    expected = server.complete(prompt, max_tokens=8).json()["choices"][0]["text"]
    body = {"input_prefix": "def f(", "input_suffix": "return x", "prompt": "x", "n_predict": 8, "temperature": 0}
    answer = server.post("/infill", {**body, "ignore_eos": True}).json()
    assert answer["content"] == expected
    assert (answer["stop"], answer["stop_type"], answer["tokens_predicted"]) == (True, "limit", 8)
    assert answer["tokens_evaluated"] == len(prompt)
    lines = server.post("/infill", {**body, "ignore_eos": True, "stream": True}).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert "".join(event["content"] for event in events) == expected
    assert [event["stop"] for event in events] == [False] * (len(events) - 1) + [True]


def test_a_model_without_marks_says_so(real_server: RunningServer) -> None:
    for path, body in (
        ("/infill", {"input_prefix": "a", "input_suffix": "b"}),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}),
    ):
        answer = real_server.post(path, body)
        assert answer.status_code == 400
        assert "fill-in-the-middle" in answer.json()["error"]["message"]
