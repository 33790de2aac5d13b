"""Conversations on their way to the chat template: roles, content parts, tool calls, and the prompt's tokens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenmill.server.errors import ApiError
from tokenmill.server.served import LONG_TEXT, ServedModel

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MAX_MESSAGES = 10_000
_RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "chat_template", "self"}

Message = dict[str, Any]


def check_messages(value: object) -> object:
    """For a body's ``messages``. Raises ValueError that says which message is wrong and how."""
    if not isinstance(value, list) or not value:
        raise ValueError("must be a list of at least one message")
    if len(value) > MAX_MESSAGES:
        raise ValueError(f"has {len(value)} messages; at most {MAX_MESSAGES} are taken")
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(f"[{number}] is no object")
        if message.get("role") not in ROLES:
            raise ValueError(f"[{number}].role is {message.get('role')!r:.40}; it must be one of {', '.join(ROLES)}")
        content = message.get("content")
        if isinstance(content, list):
            _check_parts(content, number)
        elif content is not None and not isinstance(content, str):
            raise ValueError(f"[{number}].content must be a string or a list of parts")
        if content is None and message["role"] in ("system", "developer", "user", "tool"):
            raise ValueError(f"[{number}].content is missing")
    return value


def _check_parts(parts: list[object], number: int) -> None:
    for place, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") not in ("text", "input_text", "output_text", "refusal"):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"[{number}].content[{place}] is of type {kind!r:.40}; this model reads text only")
        if not isinstance(part.get("text", part.get("refusal")), str):
            raise ValueError(f"[{number}].content[{place}].text must be a string")


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages as chat templates expect them: "developer" is "system", arguments of tool calls are objects."""
    found = []
    for number, message in enumerate(messages):
        plain = dict(message)
        if plain["role"] == "developer":
            plain["role"] = "system"
        if isinstance(plain.get("content"), list):
            plain["content"] = [
                {"type": "text", "text": part.get("text", part.get("refusal"))} for part in plain["content"]
            ]
        if plain.get("reasoning") is not None:  # vLLM's name for it; templates know DeepSeek's
            plain.setdefault("reasoning_content", plain.pop("reasoning"))
        if plain.get("tool_calls"):
            plain["tool_calls"] = [_with_arguments(call, number) for call in plain["tool_calls"]]
        found.append(plain)
    return found


def _with_arguments(call: object, number: int) -> object:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise ApiError(f"messages[{number}].tool_calls holds something that is no function call", param="messages")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments else {}
        except (ValueError, RecursionError):
            raise ApiError(
                f"messages[{number}].tool_calls: arguments is no JSON: {arguments!r:.60}", param="messages"
            ) from None
    return {**call, "function": {**function, "arguments": arguments}}


async def render(
    served: ServedModel,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    template_arguments: Mapping[str, Any] | None = None,
) -> str:
    """The prompt text of a conversation. Raises ChatTemplateError and ApiError."""
    arguments = dict(template_arguments or {})
    for name in arguments:
        if name in _RESERVED or not name.isidentifier():
            raise ApiError(f"chat_template_kwargs cannot set {name!r:.40}", param="chat_template_kwargs")
    if continue_final_message and add_generation_prompt:
        raise ApiError("continue_final_message needs add_generation_prompt to be false", param="continue_final_message")
    plain = template_messages(messages)

    def work() -> str:
        return served.tokenizer.apply_chat_template(plain, tools, documents, add_generation_prompt, **arguments)

    size = sum(len(str(message.get("content", ""))) for message in plain)
    text = work() if size < LONG_TEXT else await asyncio.to_thread(work)
    return _without_end(text, plain[-1]) if continue_final_message else text


async def encode_rendered(served: ServedModel, text: str) -> list[int]:
    """Token ids of a rendered conversation, with the model's BOS exactly once."""
    ids = await served.encode(text, add_special=False)
    return served.tokenizer.with_prefix(ids)


def _without_end(text: str, last: Message) -> str:
    """The rendered conversation up to the end of its last message's content."""
    content = last.get("content")
    if last["role"] != "assistant" or not isinstance(content, str) or not content.strip():
        raise ApiError(
            "continue_final_message needs a last message of the assistant with text", param="continue_final_message"
        )
    place = text.rfind(content.strip())
    if place < 0:
        raise ApiError("the chat template rewrites the last message, so it cannot be continued", param="messages")
    return text[: place + len(content.strip())]
