"""``POST /v1/responses``: OpenAI's Responses API, without storage: every request carries its whole conversation."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from fastapi import Request, Response
from pydantic import BeforeValidator, Field

from tokenmill.server.answer_reader import AnswerBlocks, AnswerReader, Block, BlockChange, BlockKind, Change
from tokenmill.server.conversation import check_messages, encode_rendered, render
from tokenmill.server.errors import ApiError, unsupported
from tokenmill.server.generation import Generation
from tokenmill.server.request_log import RequestRecord
from tokenmill.server.requests import Name, StrictBody
from tokenmill.server.routes.access import Record, Served, new_router
from tokenmill.server.streams import KEEP_ALIVE, event, respond
from tokenmill.server.structure import ForcedCalls, from_format
from tokenmill.server.tool_calls import ToolCall, ToolCallReader
from tokenmill.structured import StructuredOutputs
from tokenmill.tokenizer import Tokenizer

router = new_router()


def _input(value: object) -> object:
    """Items as messages in the form of chat completions."""
    if isinstance(value, str):
        if not value:
            raise ValueError("is empty")
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string or a list of at least one item")
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(value):
        match item:
            case {"type": "function_call", "call_id": str(call_id), "name": str(name), "arguments": str(arguments)}:
                call = ToolCall(name, arguments, call_id).body()
                if messages and messages[-1]["role"] == "assistant":
                    messages[-1].setdefault("tool_calls", []).append(call)
                else:
                    messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            case {"type": "reasoning"}:
                messages.append({"role": "assistant", "content": "", "reasoning_content": _thoughts(item, number)})
            case {"type": "function_call_output", "call_id": str(call_id), "output": output}:
                messages.append({"role": "tool", "tool_call_id": call_id, "content": output})
            case {"role": str(role), "content": content} if item.get("type", "message") == "message":
                if role == "assistant" and messages and messages[-1].keys() == {"role", "content", "reasoning_content"}:
                    messages[-1]["content"] = content  # the message that the reasoning before it led to
                else:
                    messages.append({"role": role, "content": content})
            case _:
                kind = item.get("type") if isinstance(item, dict) else type(item).__name__
                raise ValueError(f"[{number}] is of type {kind!r:.40}, which cannot be read here")
    return check_messages(messages)


def _thoughts(item: dict[str, Any], number: int) -> str:
    match item.get("content") or []:
        case [*parts] if all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
            return "\n".join(part["text"] for part in parts)
    raise ValueError(f"[{number}].content must be a list of parts with text")


def _tools(value: object) -> object:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) > 128:
        raise ValueError("must be a list of at most 128 tools")
    for number, tool in enumerate(value):
        if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("name"), str):
            raise ValueError(f'[{number}] must be of type "function" and have a name')
    return value


class ResponsesBody(StrictBody):
    model: Name | None = None
    input: Annotated[list[dict[str, Any]], BeforeValidator(_input)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    tools: Annotated[list[dict[str, Any]], BeforeValidator(_tools)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    user: Name | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None
    store: bool | None = None
    background: bool | None = None
    previous_response_id: Name | None = None
    conversation: str | dict[str, Any] | None = None
    truncation: Name | None = None
    service_tier: Name | None = None
    include: list[Name] | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    top_logprobs: int | None = None
    max_tool_calls: int | None = None
    prompt: dict[str, Any] | None = None
    stream_options: dict[str, Any] | None = None

    _neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "parallel_tool_calls": (True,),
        "store": (False,),
        "background": (False,),
        "previous_response_id": (),
        "conversation": (),
        "truncation": ("disabled",),
        "service_tier": ("auto", "default"),
        "include": ([],),
        "reasoning": ({},),
        "top_logprobs": (0,),
        "max_tool_calls": (),
        "prompt": (),
        "stream_options": ({}, {"include_obfuscation": False}),
    }

    def refuse_unsupported(self) -> None:
        """Raises ApiError for a parameter that is given and cannot be honoured."""
        for name, neutral in self._neutral.items():
            value = getattr(self, name)
            if value is not None and value not in neutral:
                hint = "; responses are not stored here" if name in ("store", "previous_response_id") else ""
                raise unsupported(name, f"is not supported by this server with this value{hint}")

    def structure(self) -> StructuredOutputs | None:
        """What the answer must look like. Raises ApiError."""
        if self.text is not None and set(self.text) - {"format", "verbosity"}:
            raise unsupported("text", "takes format only")
        if self.text is not None and self.text.get("verbosity") not in (None, "medium"):
            raise unsupported("text", "cannot set verbosity on this server")
        wanted = from_format((self.text or {}).get("format"), "text.format")
        reader = self.calls_reader()
        if not isinstance(reader, ForcedCalls):
            return wanted
        if wanted is not None:
            raise ApiError("tool_choice forces a call, so the answer cannot have a format too", param="tool_choice")
        return reader.structure

    def calls_reader(self) -> ToolCallReader | ForcedCalls | None:
        """Reads the calls of the output; None if there can be none. Raises ApiError for an unknown choice."""
        tools = self.offered_tools
        match self.tool_choice:
            case None | "none" | "auto":
                return ToolCallReader() if tools else None
            case "required" if tools:
                return ForcedCalls(tools, None)
            case {"type": "function", "name": str(name)} if tools:
                return ForcedCalls(tools, name)
        raise unsupported("tool_choice", 'must be "none" or "auto", or with tools "required" or the name of one')

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the model may call, as chat templates know them."""
        if self.tool_choice == "none" or not self.tools:
            return None
        kept = ("name", "description", "parameters", "strict")
        return [
            {"type": "function", "function": {name: tool[name] for name in kept if tool.get(name) is not None}}
            for tool in self.tools
        ]


@router.post("/v1/responses")
async def responses(body: ResponsesBody, request: Request, served: Served, record: Record) -> Response:
    """Answers a conversation."""
    name = served.check_name(body.model)
    body.refuse_unsupported()
    system = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    text = await render(served, [*system, *body.input], tools=body.offered_tools)
    prompt = served.check_prompt(await encode_rendered(served, text), param="input")
    given: dict[str, Any] = {"max_tokens": body.max_output_tokens}
    structure = body.structure()
    if structure is not None:
        given["structured_outputs"] = structure
    given |= {key: value for key in ("temperature", "top_p") if (value := getattr(body, key)) is not None}
    params = served.sampling_params(given)
    reader = AnswerReader(served.reasoning_reader(text, params), body.calls_reader())
    generation = served.generate([prompt], params, record)
    answer = _Answer(body, generation, record, name, served.tokenizer, reader)
    return await respond(request, served, generation, answer, stream=body.stream)


@dataclass(slots=True)
class _Answer:
    """The response object and the events that build it."""

    body: ResponsesBody
    generation: Generation
    record: RequestRecord
    name: str
    tokenizer: Tokenizer
    reader: AnswerReader
    created: int = field(default_factory=lambda: int(time.time()))
    _blocks: AnswerBlocks = field(init=False)
    _sequence: int = 0

    def __post_init__(self) -> None:
        self._blocks = AnswerBlocks(self.reader)

    def whole(self) -> dict[str, Any]:
        self._blocks.read(self.generation.outputs(0)[0].text)
        return self.response(self.status)

    @property
    def status(self) -> str:
        return "incomplete" if self.generation.outputs(0)[0].finish_reason == "length" else "completed"

    def response(self, status: str) -> dict[str, Any]:
        """The whole object, as far as it has come."""
        done = status != "in_progress"
        params = self.generation.params
        return {
            "id": f"resp_{self.record.request_id}",
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": self.body.instructions,
            "max_output_tokens": self.body.max_output_tokens,
            "model": self.name,
            "output": [self._item(block, self._status_of(block)) for block in self._blocks.blocks] if done else [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": params.temperature,
            "text": {"format": (self.body.text or {}).get("format") or {"type": "text"}},
            "tool_choice": self.body.tool_choice or "auto",
            "tools": self.body.tools or [],
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": self._usage() if done else None,
            "user": self.body.user,
            "metadata": self.body.metadata or {},
        }

    async def frames(self, idle: float) -> AsyncIterator[bytes]:
        begun = False
        async for pieces in self.generation.pieces(idle):
            if not begun:
                begun = True
                yield self._event("response.created", response=self.response("in_progress"))
                yield self._event("response.in_progress", response=self.response("in_progress"))
            if not pieces:
                yield KEEP_ALIVE
            for piece in pieces:
                for change in self._blocks.push(piece.chunk.text, last=piece.chunk.finish_reason is not None):
                    for frame in self._frames(change):
                        yield frame
        yield self._event(f"response.{self.status}", response=self.response(self.status))

    def _frames(self, change: BlockChange) -> list[bytes]:
        """Events that tell a change."""
        block, channel = change.block, _CHANNELS[change.block.kind]
        at: dict[str, Any] = {"output_index": block.index}
        place = {"item_id": self._item_id(block), **at} | ({} if block.call is not None else {"content_index": 0})
        more: dict[str, Any] = {"logprobs": []} if block.kind is BlockKind.TEXT else {}
        match change.change:
            case Change.OPENED:
                empty: dict[str, Any] = {"content": []} if block.call is None else {}
                frames = [
                    self._event("response.output_item.added", **at, item=self._item(block, "in_progress") | empty)
                ]
                if block.call is None:
                    frames.append(self._event("response.content_part.added", **place, part=_part(block)))
            case Change.GREW:
                frames = [self._event(f"{channel}.delta", **place, delta=change.delta, **more)]
            case Change.CLOSED:
                if block.call is None:
                    frames = [
                        self._event(f"{channel}.done", **place, text=block.text, **more),
                        self._event("response.content_part.done", **place, part=_part(block)),
                    ]
                else:
                    frames = [self._event(f"{channel}.done", **place, name=block.call.name, arguments=block.text)]
                item = self._item(block, self._status_of(block))
                frames.append(self._event("response.output_item.done", **at, item=item))
        return frames

    def _status_of(self, block: Block) -> str:
        """Of a block that is complete: only the one that the answer ended in can be cut off."""
        return self.status if block is self._blocks.blocks[-1] else "completed"

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        if block.call is not None:
            return {
                "type": "function_call",
                "id": self._item_id(block),
                "call_id": block.call.call_id,
                "name": block.call.name,
                "arguments": block.text,
                "status": "completed" if status == "incomplete" else status,
            }
        item = {"id": self._item_id(block), "status": status, "content": [_part(block)]}
        if block.kind is BlockKind.REASONING:
            return {"type": "reasoning", "summary": [], **item}
        return {"type": "message", "role": "assistant", **item}

    def _item_id(self, block: Block) -> str:
        if block.call is not None:
            return f"fc_{block.call.call_id}"
        prefix = "rs" if block.kind is BlockKind.REASONING else "msg"
        return f"{prefix}_{self.record.request_id}_{block.index}"

    def _usage(self) -> dict[str, Any]:
        prompt, output = self.generation.prompt_tokens, self.generation.output_tokens
        thought = self.reader.reasoning_tokens(self.tokenizer, self.generation.outputs(0)[0].token_ids)
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": self.record.cached_tokens},
            "output_tokens": output,
            "output_tokens_details": {"reasoning_tokens": thought},
            "total_tokens": prompt + output,
        }

    def _event(self, kind: str, **data: Any) -> bytes:
        frame = event({"type": kind, "sequence_number": self._sequence, **data}, kind)
        self._sequence += 1
        return frame


_CHANNELS = {
    BlockKind.REASONING: "response.reasoning_text",
    BlockKind.TEXT: "response.output_text",
    BlockKind.CALL: "response.function_call_arguments",
}
"""What the events of a block's text are called."""


def _part(block: Block) -> dict[str, Any]:
    if block.kind is BlockKind.REASONING:
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}
