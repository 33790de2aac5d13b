"""/v1/messages through the anthropic package."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest
from served_model import RunningServer

ASK: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 12,
    "system": "Be brief.",
    "messages": [{"role": "user", "content": "What is rain?"}],
}
GREEDY: dict[str, Any] = {**ASK, "extra_body": {"temperature": 0}}


@pytest.fixture
def client(server: RunningServer) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_a_message_is_the_answer_of_chat_completions(client: anthropic.Anthropic, server: RunningServer) -> None:
    message = client.messages.create(**GREEDY)
    chat = {"messages": [{"role": "system", "content": "Be brief."}, *ASK["messages"]], "temperature": 0}
    answer = server.post("/v1/chat/completions", {**chat, "max_tokens": 12}).json()
    assert text_of(message) == answer["choices"][0]["message"]["content"]
    assert (message.role, message.stop_reason) == ("assistant", "max_tokens")
    usage = message.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == answer["usage"]["prompt_tokens"]
    assert usage.output_tokens == 12
    counted = client.messages.count_tokens(**{key: ASK[key] for key in ("model", "system", "messages")})
    assert counted.input_tokens == answer["usage"]["prompt_tokens"]


def test_a_stream_adds_up_to_the_whole(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(**GREEDY)
    with client.messages.stream(**GREEDY) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(pieces) == text_of(final) == text_of(whole)
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 12)


def test_a_last_message_of_the_assistant_is_continued(client: anthropic.Anthropic, server: RunningServer) -> None:
    messages = [*ASK["messages"], {"role": "assistant", "content": "Rain is"}]
    message = client.messages.create(**{**GREEDY, "messages": messages})
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is rain?<|im_end|>\n"
    prompt += "<|im_start|>assistant\nRain is"
    answer = server.post("/v1/completions", {"prompt": prompt, "temperature": 0, "max_tokens": 12}).json()
    assert text_of(message) == answer["choices"][0]["text"]


def test_stop_sequences_and_tool_conversations(client: anthropic.Anthropic, server: RunningServer) -> None:
    text = text_of(client.messages.create(**GREEDY))
    stopped = client.messages.create(**GREEDY, stop_sequences=[text[3:5]])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", text[3:5])
    assert text_of(stopped) == text[: text.index(text[3:5])]
    messages: list[Any] = [
        *ASK["messages"],
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "sky", "input": {"city": "Oslo"}}]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "wet"}]},
                {"type": "text", "text": "So?"},
            ],
        },
    ]
    tools: list[Any] = [{"name": "sky", "description": "d", "input_schema": {"type": "object"}}]
    with_tools = client.messages.count_tokens(model="tiny", messages=messages, tools=tools).input_tokens
    assert with_tools > client.messages.count_tokens(model="tiny", messages=messages).input_tokens + 20


@pytest.mark.parametrize(
    "given",
    [
        {"messages": []},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"tool_choice": {"type": "any"}},
        {"temperature": 3},
        {"nonsense": 1},
    ],
    ids=str,
)
def test_refusals_have_anthropics_form(server: RunningServer, given: dict[str, Any]) -> None:
    answer = server.post("/v1/messages", {**ASK, **given})
    assert answer.status_code == 400
    body = answer.json()
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert next(iter(given)) in body["error"]["message"]


def test_an_unknown_model_is_not_found(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**{**ASK, "model": "claude"})
