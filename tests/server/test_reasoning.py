"""Reasoning told apart from the answer: in text of any pieces, and by every API that knows of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from served_model import SMALL, RunningServer, serving
from tiny_gguf import CHAT_TEMPLATE, write_scripted_model

from tokenmill.server.reasoning import ReasoningParser, ReasoningReader

SCRIPT = ["<think>", "Clouds", " are", " wet", "</think>", "\n\n", "It", " rains"]
TEMPLATE = CHAT_TEMPLATE + "{# reasoning stands in <think> and </think> #}"
OPENED = CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>\n")
ASK: list[Any] = [{"role": "user", "content": "Rain?"}]


def read(text: str, size: int, *, begun: bool) -> tuple[str, str]:
    reader = ReasoningReader(begun=begun)
    found = [reader.push(text[at : at + size]) for at in range(0, len(text), size)]
    found.append(reader.flush())
    return "".join(thought for thought, _ in found), "".join(rest for _, rest in found)


@pytest.mark.parametrize(
    ("text", "begun", "expected"),
    [
        ("<think>\nwhy < not\n\n</think>\n\nyes\n", False, ("why < not", "yes\n")),
        ("\n <think>why</think>yes", False, ("why", "yes")),
        ("why</think>\nyes </think> <think>", True, ("why", "yes </think> <think>")),
        ("\n<think>\nwhy</think>yes", True, ("why", "yes")),
        ("<think></think>yes", False, ("", "yes")),
        ("why </thi", True, ("why </thi", "")),
        ("<think>why", False, ("why", "")),
        (" yes <think>no</think>", False, ("", " yes <think>no</think>")),
        ("<thin", False, ("", "<thin")),
        ("", False, ("", "")),
        (" \n", True, ("", "")),
    ],
)
def test_pieces_do_not_matter(text: str, begun: bool, expected: tuple[str, str]) -> None:
    for size in range(1, 20):
        assert read(text, size, begun=begun) == expected


def test_the_template_says_whether_there_is_reasoning() -> None:
    assert ReasoningParser.AUTO.reader(CHAT_TEMPLATE, "") is None
    assert ReasoningParser.AUTO.reader(None, "") is None
    assert ReasoningParser.NONE.reader(TEMPLATE, "") is None
    for parser, prompt, begun in (
        (ReasoningParser.AUTO, "assistant\n", False),
        (ReasoningParser.AUTO, "assistant\n<think>\n", True),
        (ReasoningParser.QWEN3, "", False),
        (ReasoningParser.DEEPSEEK_R1, "", True),
    ):
        reader = parser.reader(TEMPLATE, prompt)
        assert reader is not None
        assert reader.push("a</think>b") == (("a", "b") if begun else ("", "a</think>b"))


@pytest.fixture(scope="module", params=[(SCRIPT, TEMPLATE), (SCRIPT[1:], OPENED)], ids=["both marks", "one mark"])
def thinker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A model that thinks before it says that it rains, with its own mark or that of the template."""
    path = write_scripted_model(tmp_path_factory.mktemp("thinker") / "thinker.gguf", *request.param)
    with serving(path, *SMALL) as running:
        yield running


def test_chat_completions(thinker: RunningServer) -> None:
    client = openai.OpenAI(base_url=thinker.url + "/v1", api_key="none")
    ask: dict[str, Any] = {"model": "tiny", "messages": ASK, "temperature": 0}
    whole = client.chat.completions.create(**ask)
    message: Any = whole.choices[0].message
    assert (message.content, message.reasoning, message.reasoning_content) == ("It rains", *["Clouds are wet"] * 2)
    assert whole.usage is not None
    assert whole.usage.completion_tokens_details is not None
    thought = whole.usage.completion_tokens_details.reasoning_tokens
    assert thought == whole.usage.completion_tokens - 4  # the line breaks, two words, the end
    chunks: list[Any] = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(getattr(delta, "reasoning", "") for delta in deltas) == "Clouds are wet"
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "Clouds are wet"
    assert "".join(delta.content or "" for delta in deltas) == "It rains"
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == thought
    silent: Any = client.chat.completions.create(**ask, extra_body={"include_reasoning": False}).choices[0].message
    assert silent.content == "It rains"
    assert not hasattr(silent, "reasoning")
    cut: Any = client.chat.completions.create(**ask, max_tokens=3).choices[0].message
    assert cut.content is None
    assert cut.reasoning.startswith("Clouds are")


def test_an_answer_of_a_given_form_has_no_reasoning(thinker: RunningServer) -> None:
    body = {"messages": ASK, "structured_outputs": {"choice": ["yes", "no"]}}
    message = thinker.post("/v1/chat/completions", body).json()["choices"][0]["message"]
    assert message["content"] in ("yes", "no")


def test_responses(thinker: RunningServer) -> None:
    client = openai.OpenAI(base_url=thinker.url + "/v1", api_key="none")
    whole = client.responses.create(model="tiny", input="Rain?", temperature=0)
    reasoning, message = whole.output
    assert reasoning.type == "reasoning"
    assert reasoning.content is not None
    assert [part.text for part in reasoning.content] == ["Clouds are wet"]
    assert message.type == "message"
    assert whole.output_text == "It rains"
    assert whole.usage is not None
    assert whole.usage.output_tokens_details.reasoning_tokens == whole.usage.output_tokens - 4
    events = list(client.responses.create(model="tiny", input="Rain?", temperature=0, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    thoughts = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    texts = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert ("".join(thoughts), "".join(texts)) == ("Clouds are wet", "It rains")
    assert events[-1].type == "response.completed"
    assert [item.type for item in events[-1].response.output] == ["reasoning", "message"]
    again: Any = [{"role": "user", "content": "Rain?"}, *(item.model_dump() for item in whole.output), *ASK]
    assert client.responses.create(model="tiny", input=again, temperature=0).output_text == "It rains"


def test_anthropics_messages(thinker: RunningServer) -> None:
    client = anthropic.Anthropic(base_url=thinker.url, api_key="none", max_retries=0)
    ask: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_tokens": 50}
    whole = client.messages.create(**ask, thinking={"type": "adaptive"})
    thinking, text = whole.content
    assert thinking.type == "thinking"
    assert text.type == "text"
    assert (thinking.thinking, text.text) == ("Clouds are wet", "It rains")
    with client.messages.stream(**ask) as stream:
        assert [block.to_dict() for block in stream.get_final_message().content] == [
            block.to_dict() for block in whole.content
        ]
    history: list[Any] = [*ASK, {"role": "assistant", "content": whole.content}, *ASK]
    assert client.messages.create(**{**ask, "messages": history}).content
    with pytest.raises(anthropic.BadRequestError, match="budget"):
        client.messages.create(**ask, thinking={"type": "enabled", "budget_tokens": 1024})
