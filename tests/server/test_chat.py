"""/v1/chat/completions through the openai package: sync, async, streams, tools, log-probabilities."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from served_model import RunningServer

MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is rain?"}]
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 12}


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def test_the_prompt_is_the_rendered_template(client: openai.OpenAI, server: RunningServer) -> None:
    rendered = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is rain?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert server.post("/apply-template", {"messages": MESSAGES}).json()["prompt"] == rendered
    answer = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    completion = client.completions.create(prompt=rendered, **GREEDY)
    assert answer.choices[0].message.content == completion.choices[0].text
    assert answer.usage is not None
    assert completion.usage is not None
    assert answer.usage.prompt_tokens == completion.usage.prompt_tokens
    tokens = server.post("/tokenize", {"messages": MESSAGES}).json()
    assert tokens["count"] == answer.usage.prompt_tokens


def test_a_stream_adds_up_to_the_whole(client: openai.OpenAI) -> None:
    body = {**GREEDY, "messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**body)
    chunks = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert deltas[0].delta.role == "assistant"
    assert "".join(each.delta.content or "" for each in deltas) == whole.choices[0].message.content
    assert deltas[-1].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    streamed = [entry for each in deltas if each.logprobs for entry in each.logprobs.content or []]
    assert whole.choices[0].logprobs is not None
    assert streamed == whole.choices[0].logprobs.content
    assert len(streamed) == whole.usage.completion_tokens
    for entry in streamed:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)  # greedy took the best


def test_many_at_once_give_what_each_gives_alone(server: RunningServer, client: openai.OpenAI) -> None:
    questions = [f"Question {number}: {'why ' * number}" for number in range(12)]

    def body(question: str) -> dict[str, Any]:
        return {**GREEDY, "messages": [{"role": "user", "content": question}], "temperature": 1, "seed": 7}

    alone = [client.chat.completions.create(**body(question)).choices[0].message.content for question in questions]

    async def together() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as many:
            answers = await asyncio.gather(*(many.chat.completions.create(**body(q)) for q in questions))
            return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(together()) == alone


def test_n_answers_stream_side_by_side(client: openai.OpenAI) -> None:
    body = {**GREEDY, "messages": MESSAGES, "n": 3, "temperature": 1, "seed": 3}
    whole = [choice.message.content for choice in client.chat.completions.create(**body).choices]
    streamed = [""] * 3
    for chunk in client.chat.completions.create(**body, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == whole


def test_content_parts_are_joined_and_images_refused(client: openai.OpenAI) -> None:
    parts: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "rain?"}]}
    ]
    plain: list[Any] = [{"role": "user", "content": "What is\nrain?"}]
    both = [client.chat.completions.create(messages=each, **GREEDY) for each in (parts, plain)]
    assert both[0].choices[0].message.content == both[1].choices[0].message.content
    image: list[Any] = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
    with pytest.raises(openai.BadRequestError, match=r"messages.*image_url.*text only"):
        client.chat.completions.create(messages=image, **GREEDY)


def test_an_answer_can_be_continued(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=MESSAGES, **GREEDY).choices[0].message.content or ""
    begun = whole[:5].strip()
    assert begun
    rest = client.chat.completions.create(
        messages=[*MESSAGES, {"role": "assistant", "content": begun}],
        **GREEDY,
        extra_body={"continue_final_message": True, "add_generation_prompt": False, "return_token_ids": True},
    )
    prompt = client.completions.create(
        prompt="<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is rain?<|im_end|>\n"
        "<|im_start|>assistant\n" + begun,
        **GREEDY,
    )
    assert rest.choices[0].message.content == prompt.choices[0].text


TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
]


def test_tools_reach_the_template_and_none_keeps_them_away(client: openai.OpenAI) -> None:
    def prompt_tokens(**tools: Any) -> int:
        usage = client.chat.completions.create(messages=MESSAGES, **GREEDY, **tools).usage
        assert usage is not None
        return usage.prompt_tokens

    bare = prompt_tokens()
    assert prompt_tokens(tools=TOOLS) > bare + 20
    assert prompt_tokens(tools=TOOLS, tool_choice="none") == bare


def test_tool_messages_keep_their_place_in_the_conversation(client: openai.OpenAI, server: RunningServer) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages: list[Any] = [
        *MESSAGES,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "wet"},
    ]
    assert "<|im_start|>tool\nwet<|im_end|>" in server.post("/apply-template", {"messages": messages}).json()["prompt"]
    assert client.chat.completions.create(messages=messages, tools=TOOLS, **GREEDY).choices
    call["function"] = {"name": "weather", "arguments": "{oslo"}
    with pytest.raises(openai.BadRequestError, match="arguments is no JSON"):
        client.chat.completions.create(messages=messages, tools=TOOLS, **GREEDY)


def test_the_real_model_answers(real_server: RunningServer) -> None:
    client = openai.OpenAI(base_url=real_server.url + "/v1", api_key="none")
    completion = client.completions.create(
        model="smollm2-135m", prompt="The capital of France is", temperature=0, max_tokens=4
    )
    assert completion.choices[0].text.startswith(" Paris")
    stream = client.chat.completions.create(
        model="smollm2-135m",
        messages=[{"role": "user", "content": "Write about the sea."}],
        max_tokens=24,
        stream=True,
    )
    pieces = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
    assert len("".join(piece or "" for piece in pieces).split()) > 5
