"""Anthropic's Messages API: ``POST /v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Request, Response
from pydantic import BeforeValidator, Field

from tokenmill.engine.outputs import CompletionOutput
from tokenmill.server.answer_reader import AnswerBlocks, AnswerReader, Block, BlockChange, BlockKind, Change
from tokenmill.server.conversation import check_messages, encode_rendered, render
from tokenmill.server.errors import unsupported
from tokenmill.server.generation import Generation
from tokenmill.server.request_log import RequestRecord
from tokenmill.server.requests import MAX_STOP_STRINGS, Name, StopStrings, StrictBody
from tokenmill.server.routes.access import Record, Served, new_router
from tokenmill.server.served import ServedModel
from tokenmill.server.streams import event, json_response, respond
from tokenmill.server.structure import ForcedCalls
from tokenmill.server.tool_calls import ToolCall, ToolCallReader

router = new_router()


def _messages(value: object) -> object:
    """Blocks in OpenAI's form: tool uses become tool calls, tool results messages of their own."""
    if not isinstance(value, list) or not value:
        raise ValueError("must be a list of at least one message")
    found: list[dict[str, Any]] = []
    for number, message in enumerate(value):
        if not isinstance(message, dict) or message.get("role") not in ("user", "assistant", "system"):
            raise ValueError(f"[{number}].role must be user or assistant")
        content = message.get("content")
        if isinstance(content, str):
            found.append({"role": message["role"], "content": content})
        elif isinstance(content, list):
            found += _from_blocks(content, message["role"], number)
        else:
            raise ValueError(f"[{number}].content must be a string or a list of blocks")
    check_messages(found)
    return found


def _from_blocks(blocks: list[object], role: str, number: int) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    texts: list[dict[str, Any]] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for place, block in enumerate(blocks):
        match block:
            case {"type": "text", "text": str(text)}:
                texts.append({"type": "text", "text": text})
            case {"type": "thinking", "thinking": str(thought)} if role == "assistant":
                thoughts.append(thought)
            case {"type": "tool_use", "id": str(call_id), "name": str(name), "input": dict(given)} if role != "user":
                calls.append(ToolCall(name, json.dumps(given, ensure_ascii=False), call_id).body())
            case {"type": "tool_result", "tool_use_id": str(call_id), **rest} if role == "user":
                content = rest.get("content") or ""
                if isinstance(content, list):
                    (inner,) = _from_blocks(content, "assistant", number) or [{"content": ""}]
                    content = inner["content"]
                results.append({"role": "tool", "tool_call_id": call_id, "content": content})
            case {"type": kind}:
                raise ValueError(f"[{number}].content[{place}] is of type {kind!r:.40}, which cannot be read here")
            case _:
                raise ValueError(f"[{number}].content[{place}] is no block")
    if texts or thoughts or calls:
        message: dict[str, Any] = {"role": role, "content": texts or ""}
        if thoughts:
            message["reasoning_content"] = "\n".join(thoughts)
        if calls:
            message["tool_calls"] = calls
        results.append(message)
    return results


def _system(value: object) -> object:
    if isinstance(value, list):
        if not all(isinstance(block, dict) and isinstance(block.get("text"), str) for block in value):
            raise ValueError("must be a string or a list of text blocks")
        return "\n".join(block["text"] for block in value)
    return value


def _tools(value: object) -> object:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) > 128:
        raise ValueError("must be a list of at most 128 tools")
    found = []
    for number, tool in enumerate(value):
        if (
            not isinstance(tool, dict)
            or tool.get("type", "custom") != "custom"
            or not isinstance(tool.get("name"), str)
        ):
            raise ValueError(f"[{number}] must have a name and be of the client's own")
        function = {"name": tool["name"], "parameters": tool.get("input_schema", {"type": "object"})}
        if tool.get("description") is not None:
            function["description"] = tool["description"]
        found.append({"type": "function", "function": function})
    return found


class CountBody(StrictBody):
    """What makes the prompt."""

    model: Name | None = None
    messages: Annotated[list[dict[str, Any]], BeforeValidator(_messages)]
    system: Annotated[str, BeforeValidator(_system)] | None = None
    tools: Annotated[list[dict[str, Any]], BeforeValidator(_tools)] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None

    def refuse_unsupported(self) -> None:
        """Raises ApiError for a parameter that is given and cannot be honoured."""
        self.calls_reader()
        self._thinking()

    def calls_reader(self) -> ToolCallReader | ForcedCalls | None:
        """Reads the calls of the output; None if there can be none. Raises ApiError for an unknown choice."""
        tools = self.offered_tools
        match self.tool_choice:
            case None | {"type": "none"} | {"type": "auto"}:
                return ToolCallReader() if tools else None
            case {"type": "any"} if tools:
                return ForcedCalls(tools, None)
            case {"type": "tool", "name": str(name)} if tools:
                return ForcedCalls(tools, name)
        raise unsupported("tool_choice", 'must be of type "none" or "auto", or with tools "any" or "tool"')

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the model may call."""
        return None if self.tool_choice is not None and self.tool_choice.get("type") == "none" else self.tools or None

    async def rendered(self, served: ServedModel) -> str:
        """The prompt's text. A last message of the assistant is continued, as Anthropic has it."""
        messages = (
            self.messages if self.system is None else [{"role": "system", "content": self.system}, *self.messages]
        )
        last = messages[-1]
        if last["role"] == "assistant" and isinstance(last["content"], list):
            messages = [*messages[:-1], {**last, "content": "".join(part["text"] for part in last["content"])}]
        continues = last["role"] == "assistant" and not last.get("tool_calls")
        return await render(
            served,
            messages,
            tools=self.offered_tools,
            add_generation_prompt=not continues,
            continue_final_message=continues,
            template_arguments=self._thinking(),
        )

    def _thinking(self) -> dict[str, bool]:
        """What templates that know of reasoning are told. Raises ApiError."""
        match self.thinking:
            case None:
                return {}
            case {"type": "disabled"}:
                return {"enable_thinking": False}
            case {"type": "adaptive"}:
                return {"enable_thinking": True}
            case {"type": "enabled"}:
                raise unsupported("thinking", "cannot keep to a budget on this server; use the type adaptive")
        raise unsupported("thinking", 'must be of type "adaptive" or "disabled"')


class MessagesBody(CountBody):
    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Annotated[StopStrings, Field(max_length=MAX_STOP_STRINGS)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Name | None = None

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.service_tier not in (None, "auto", "standard_only"):
            raise unsupported("service_tier", 'can be "auto" or "standard_only"')


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountBody, served: Served) -> Response:
    """Tokens of the prompt that /v1/messages would run."""
    served.check_name(body.model)
    body.refuse_unsupported()
    return json_response({"input_tokens": len(await encode_rendered(served, await body.rendered(served)))})


@router.post("/v1/messages")
async def messages(body: MessagesBody, request: Request, served: Served, record: Record) -> Response:
    """Answers a conversation."""
    name = served.check_name(body.model)
    body.refuse_unsupported()
    text = await body.rendered(served)
    prompt = served.check_prompt(await encode_rendered(served, text), param="messages")
    given: dict[str, Any] = {
        "max_tokens": body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stop": body.stop_sequences,
    }
    calls = body.calls_reader()
    if isinstance(calls, ForcedCalls):
        given["structured_outputs"] = calls.structure
    params = served.sampling_params({key: value for key, value in given.items() if value is not None})
    generation = served.generate([prompt], params, record)
    answer = _Answer(body, generation, record, name, AnswerReader(served.reasoning_reader(text, params), calls))
    return await respond(request, served, generation, answer, stream=body.stream)


@dataclass(slots=True)
class _Answer:
    """Bodies made from a generation."""

    body: MessagesBody
    generation: Generation
    record: RequestRecord
    name: str
    reader: AnswerReader

    def whole(self) -> dict[str, Any]:
        (output,) = self.generation.outputs(0)
        blocks = AnswerBlocks(self.reader)
        blocks.read(output.text)
        content = [_block(block, block.text) for block in blocks.blocks]
        return {**self._message(), "content": content, **self._stop(output, blocks.called), "usage": self._usage()}

    async def frames(self, idle: float) -> AsyncIterator[bytes]:
        blocks = AnswerBlocks(self.reader)
        begun = False
        async for pieces in self.generation.pieces(idle):
            if not begun:
                begun = True
                start = {**self._message(), "content": [], "stop_reason": None, "stop_sequence": None}
                yield _event("message_start", message={**start, "usage": self._usage()})
            if not pieces:
                yield _event("ping")
            for piece in pieces:
                for change in blocks.push(piece.chunk.text, last=piece.chunk.finish_reason is not None):
                    yield _frame(change)
        (output,) = self.generation.outputs(0)
        yield _event("message_delta", delta=self._stop(output, blocks.called), usage=self._usage())
        yield _event("message_stop")

    def _message(self) -> dict[str, Any]:
        return {"id": f"msg_{self.record.request_id}", "type": "message", "role": "assistant", "model": self.name}

    def _usage(self) -> dict[str, int]:
        cached = self.record.cached_tokens
        return {
            "input_tokens": self.generation.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": self.generation.output_tokens,
        }

    def _stop(self, output: CompletionOutput, called: bool) -> dict[str, Any]:
        if isinstance(output.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": output.stop_reason}
        if output.finish_reason == "length":
            full = len(output.token_ids) < self.body.max_tokens
            return {"stop_reason": "model_context_window_exceeded" if full else "max_tokens", "stop_sequence": None}
        return {"stop_reason": "tool_use" if called else "end_turn", "stop_sequence": None}


def _block(block: Block, text: str) -> dict[str, Any]:
    """A content block, with ``text`` of its own."""
    if block.call is not None:
        given = block.call.input() if text else {}
        return {"type": "tool_use", "id": block.call.call_id, "name": block.call.name, "input": given}
    if block.kind is BlockKind.REASONING:
        return {"type": "thinking", "thinking": text, "signature": ""}
    return {"type": "text", "text": text}


def _frame(change: BlockChange) -> bytes:
    block = change.block
    match change.change:
        case Change.OPENED:
            return _event("content_block_start", index=block.index, content_block=_block(block, ""))
        case Change.CLOSED:
            return _event("content_block_stop", index=block.index)
    if block.call is not None:
        delta = {"type": "input_json_delta", "partial_json": json.dumps(block.call.input(), ensure_ascii=False)}
    elif block.kind is BlockKind.REASONING:
        delta = {"type": "thinking_delta", "thinking": change.delta}
    else:
        delta = {"type": "text_delta", "text": change.delta}
    return _event("content_block_delta", index=block.index, delta=delta)


def _event(kind: str, **data: Any) -> bytes:
    return event({"type": kind, **data}, kind)
