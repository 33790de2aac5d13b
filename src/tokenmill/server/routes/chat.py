"""``POST /v1/chat/completions``: an answer to a conversation."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from fastapi import Request, Response
from pydantic import BeforeValidator, Field

from tokenmill.engine.outputs import CompletionOutput, StreamChunk
from tokenmill.server.answer_reader import AnswerReader
from tokenmill.server.answers import chat_logprobs, prompt_logprobs, usage
from tokenmill.server.conversation import check_messages, encode_rendered, render
from tokenmill.server.errors import ApiError, unsupported
from tokenmill.server.generation import Generation
from tokenmill.server.request_log import RequestRecord
from tokenmill.server.requests import MAX_LOGPROBS, AnswerBody, Name
from tokenmill.server.routes.access import Record, Served, new_router
from tokenmill.server.served import ServedModel
from tokenmill.server.streams import DONE, KEEP_ALIVE, event, respond
from tokenmill.server.structure import ForcedCalls
from tokenmill.server.tool_calls import ToolCallReader
from tokenmill.structured import StructuredOutputs

router = new_router()

MAX_TOOLS = 128


def _tools(value: object) -> object:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise ValueError(f"must be a list of at most {MAX_TOOLS} tools")
    for number, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(function, dict):
            raise ValueError(f'[{number}] must be {{"type": "function", "function": {{...}}}}')
        if not isinstance(function.get("name"), str):
            raise ValueError(f"[{number}].function.name is missing")
    return value


Messages = Annotated[list[dict[str, Any]], BeforeValidator(check_messages)]
Tools = Annotated[list[dict[str, Any]], BeforeValidator(_tools)]


class ConversationBody(AnswerBody):
    """What makes a prompt of a conversation."""

    messages: Messages
    tools: Tools | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Name | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    async def rendered(self, served: ServedModel, tools: list[dict[str, Any]] | None) -> str:
        """The prompt's text. Raises ChatTemplateError and ApiError."""
        if self.chat_template is not None:
            raise unsupported("chat_template", "comes from the server (--chat-template), not from requests")
        continues = bool(self.continue_final_message)
        return await render(
            served,
            self.messages,
            tools=tools,
            documents=self.documents,
            add_generation_prompt=not continues if self.add_generation_prompt is None else self.add_generation_prompt,
            continue_final_message=continues,
            template_arguments=self.chat_template_kwargs,
        )


class ChatBody(ConversationBody):
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None
    service_tier: Name | None = None
    store: bool | None = None
    modalities: list[Name] | None = None
    reasoning_effort: Name | None = None
    include_reasoning: bool | None = None
    verbosity: Name | None = None
    audio: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None

    _neutral_chat: ClassVar[dict[str, tuple[Any, ...]]] = {
        "parallel_tool_calls": (True,),
        "echo": (False,),
        "add_special_tokens": (False,),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "modalities": (["text"],),
        "reasoning_effort": (),
        "verbosity": ("medium",),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
        "functions": ([],),
        "function_call": ("none",),
    }

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        for name, neutral in self._neutral_chat.items():
            value = getattr(self, name)
            if value is not None and value not in neutral:
                hint = "; use tools" if name.startswith("function") else "; leave it out"
                raise unsupported(name, f"is not supported by this server{hint}")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ApiError("tool_choice needs tools", param="tool_choice")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError("top_logprobs needs logprobs to be true", param="top_logprobs")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ApiError("max_tokens and max_completion_tokens differ; give one", param="max_tokens")

    def structure(self) -> StructuredOutputs | None:
        own, forced = super().structure(), self.calls_reader()
        if not isinstance(forced, ForcedCalls):
            return own
        if own is not None:
            raise ApiError("tool_choice forces a call, so the answer cannot have a format too", param="tool_choice")
        return forced.structure

    def calls_reader(self) -> ToolCallReader | ForcedCalls | None:
        """Reads the calls of one output; None if there can be none. Raises ApiError for an unknown choice."""
        match self.tool_choice:
            case _ if not self.offered_tools:
                return None
            case None | "auto":
                return ToolCallReader()
            case "required":
                return ForcedCalls(self.offered_tools, None)
            case {"type": "function", "function": {"name": str(name)}}:
                return ForcedCalls(self.offered_tools, name)
        raise unsupported("tool_choice", 'must be "none", "auto", "required" or name a function')

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the model may call."""
        return None if self.tool_choice == "none" else self.tools or None


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatBody, request: Request, served: Served, record: Record) -> Response:
    """Answers a conversation."""
    name = served.check_name(body.model)
    body.refuse_unsupported()
    record.request_id = body.request_id or record.request_id
    text = await body.rendered(served, body.offered_tools)
    ids = await encode_rendered(served, text)
    prompt = served.check_prompt(ids, param="messages", truncate=body.truncate_prompt_tokens)
    given = {**body.sampling(), "max_tokens": body.max_completion_tokens or body.max_tokens}
    if body.logprobs:
        given["logprobs"] = body.top_logprobs or 0
    generation = body.start(served, given, [prompt], record)
    answer = _Answer(served, body, generation, record, name, text)
    return await respond(request, served, generation, answer, stream=body.stream)


@dataclass(slots=True)
class _Answer:
    """Bodies made from a generation."""

    served: ServedModel
    body: ChatBody
    generation: Generation
    record: RequestRecord
    name: str
    prompt: str
    """As rendered."""
    created: int = field(default_factory=lambda: int(time.time()))
    readers: list[AnswerReader] = field(init=False)
    """Of each choice."""
    _called: dict[int, int] = field(default_factory=dict)
    """Calls of each choice of a stream so far."""

    def __post_init__(self) -> None:
        params = self.generation.params
        self.readers = [
            AnswerReader(self.served.reasoning_reader(self.prompt, params), self.body.calls_reader())
            for _ in range(params.n)
        ]

    def whole(self) -> dict[str, Any]:
        choices = [self._choice(output) for output in self.generation.outputs(0)]
        data = {**self._head("chat.completion"), "choices": choices, "usage": self._usage()}
        prompt_ids = self.generation.prompts[0].tolist()
        if self.body.prompt_logprobs is not None:
            data["prompt_logprobs"] = prompt_logprobs(
                self.served.tokenizer, prompt_ids, self.generation.scores[0], self.body.prompt_logprobs
            )
        if self.body.return_token_ids:
            data["prompt_token_ids"] = prompt_ids
        return data

    async def frames(self, idle: float) -> AsyncIterator[bytes]:
        begun = False
        async for pieces in self.generation.pieces(idle):
            if not pieces:
                yield KEEP_ALIVE
                continue
            if not begun:
                begun = True
                for index in range(self.generation.params.n):
                    yield self._event(index, {"role": "assistant", "content": ""}, None, None)
            for piece in pieces:
                yield self._piece(piece.chunk)
        if self.body.include_usage:
            yield event({**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage()})
        yield DONE

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.record.request_id}",
            "object": kind,
            "created": self.created,
            "model": self.name,
        }

    def _choice(self, output: CompletionOutput) -> dict[str, Any]:
        parts = self.readers[output.index].push(output.text, last=True)
        message: dict[str, Any] = {"role": "assistant", "content": parts.text, "refusal": None}
        finish_reason = output.finish_reason
        if parts.reasoning:
            message |= {"content": parts.text or None, **self._reasoning(parts.reasoning)}
        if parts.calls:
            message |= {"content": parts.text.strip() or None, "tool_calls": [call.body() for call in parts.calls]}
            finish_reason = "tool_calls" if finish_reason == "stop" else finish_reason
        choice: dict[str, Any] = {
            "index": output.index,
            "message": message,
            "logprobs": self._logprobs(output.token_ids, output) if self.body.logprobs else None,
            "finish_reason": finish_reason,
            "stop_reason": output.stop_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = output.token_ids
        return choice

    def _piece(self, chunk: StreamChunk) -> bytes:
        reader, finish_reason = self.readers[chunk.index], chunk.finish_reason
        parts = reader.push(chunk.text, last=finish_reason is not None)
        delta = self._reasoning(parts.reasoning)
        if parts.calls:
            known = self._called.get(chunk.index, 0)
            self._called[chunk.index] = known + len(parts.calls)
            delta["tool_calls"] = [{"index": known + n, **call.body()} for n, call in enumerate(parts.calls)]
        if parts.text:
            delta["content"] = parts.text
        if reader.called and finish_reason == "stop":
            finish_reason = "tool_calls"
        logprobs = self._logprobs(chunk.token_ids, chunk) if self.body.logprobs and chunk.token_ids else None
        extra: dict[str, Any] = {}
        if self.body.return_token_ids:
            extra["token_ids"] = chunk.token_ids
        if finish_reason is not None:
            extra["stop_reason"] = self.generation.outputs(0)[chunk.index].stop_reason
        return self._event(chunk.index, delta, logprobs, finish_reason, extra)

    def _reasoning(self, text: str) -> dict[str, Any]:
        """The fields for it: vLLM's name and DeepSeek's, because clients know one or the other."""
        if not text or self.body.include_reasoning is False:
            return {}
        return {"reasoning": text, "reasoning_content": text}

    def _usage(self) -> dict[str, Any]:
        """Of the whole request, at its end."""
        tokenizer, outputs = self.served.tokenizer, self.generation.outputs(0)
        thought = sum(
            reader.reasoning_tokens(tokenizer, output.token_ids)
            for reader, output in zip(self.readers, outputs, strict=True)
        )
        return {**usage(self.generation), "completion_tokens_details": {"reasoning_tokens": thought}}

    def _event(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None,
        finish_reason: str | None,
        extra: dict[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason, **(extra or {})}
        data = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if self.body.include_usage:
            data["usage"] = usage(self.generation) if self.body.continuous_usage else None
        return event(data)

    def _logprobs(self, ids: list[int], source: CompletionOutput | StreamChunk) -> dict[str, Any]:
        as_ids = bool(self.body.return_tokens_as_token_ids)
        best = self.body.top_logprobs or 0
        return chat_logprobs(self.served.tokenizer, ids, source.logprobs or [], best, as_ids)
