"""``POST /v1/completions``: text or token ids continued, with OpenAI's parameters and vLLM's additional ones."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Request, Response
from pydantic import Field

from tokenmill.engine.messages import TokenLogprobs
from tokenmill.engine.outputs import CompletionOutput, StreamChunk
from tokenmill.program.step import Int32
from tokenmill.server.answers import completion_logprobs, prompt_logprobs, usage
from tokenmill.server.errors import ApiError, unsupported
from tokenmill.server.fill_in_middle import fill_in_middle
from tokenmill.server.generation import Generation
from tokenmill.server.request_log import RequestRecord
from tokenmill.server.requests import MAX_LOGPROBS, AnswerBody, Prompts, name_of
from tokenmill.server.routes.access import Record, Served, new_router
from tokenmill.server.served import ServedModel
from tokenmill.server.streams import DONE, KEEP_ALIVE, event, respond

router = new_router()


class CompletionBody(AnswerBody):
    prompt: Prompts
    suffix: str | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.best_of not in (None, self.n or 1):
            raise unsupported("best_of", "is not supported by this server; use n")
        if self.use_beam_search and self.max_tokens == 0:
            raise ApiError("use_beam_search needs max_tokens above 0", param="max_tokens")
        if self.suffix and self.echo:
            raise ApiError("suffix and echo cannot be combined", param="suffix")
        if self.max_tokens == 0 and not self.echo:
            raise ApiError("max_tokens is 0, which needs echo: nothing would be returned", param="max_tokens")


@router.post("/v1/completions")
async def completions(body: CompletionBody, request: Request, served: Served, record: Record) -> Response:
    """Continues each prompt."""
    name = served.check_name(body.model)
    body.refuse_unsupported()
    record.request_id = body.request_id or record.request_id
    prompts = [await _encoded(served, body, number) for number in range(len(body.prompt))]
    given = body.sampling()
    scores_only = body.max_tokens == 0
    if not scores_only:
        given["max_tokens"] = 16 if body.max_tokens is None else body.max_tokens
    if body.logprobs is not None:
        given["logprobs"] = body.logprobs
        if body.echo:
            given["prompt_logprobs"] = max(body.logprobs, given.get("prompt_logprobs", 0))
    if scores_only:
        given.setdefault("prompt_logprobs", 0)
        given.pop("min_tokens", None)
    generation = body.start(served, given, prompts, record, score_only=scores_only)
    answer = _Answer(served, body, generation, record, name)
    return await respond(request, served, generation, answer, stream=body.stream)


async def _encoded(served: ServedModel, body: CompletionBody, number: int) -> Int32:
    prompt = body.prompt[number]
    param = name_of("prompt", body.prompt, number)
    room = 0 if body.max_tokens == 0 else 1
    if body.suffix:
        if not isinstance(prompt, str):
            raise ApiError("suffix needs prompts that are text", param="suffix")
        if body.truncate_prompt_tokens is not None:
            raise ApiError("truncate_prompt_tokens and suffix cannot be combined", param="truncate_prompt_tokens")
        return served.check_prompt(await fill_in_middle(served, prompt, body.suffix, "suffix"), room=room, param=param)
    ids = await served.prompt_ids(prompt, add_special=body.add_special_tokens is not False)
    return served.check_prompt(ids, room=room, param=param, truncate=body.truncate_prompt_tokens)


@dataclass(slots=True)
class _Answer:
    """Bodies made from a generation."""

    served: ServedModel
    body: CompletionBody
    generation: Generation
    record: RequestRecord
    name: str
    created: int = field(default_factory=lambda: int(time.time()))
    _started: set[int] = field(default_factory=set)
    """Choices of a stream that have been told their prompt."""
    _offsets: dict[int, int] = field(default_factory=dict)
    """Characters of each choice so far."""

    def whole(self) -> dict[str, Any]:
        choices = [
            self._choice(number, output)
            for number in range(len(self.generation.prompts))
            for output in self.generation.outputs(number)
        ]
        return {**self._head(), "choices": choices, "usage": usage(self.generation)}

    async def frames(self, idle: float) -> AsyncIterator[bytes]:
        async for pieces in self.generation.pieces(idle):
            if not pieces:
                yield KEEP_ALIVE
            for piece in pieces:
                choice = self._stream_choice(piece.prompt, piece.chunk)
                data = {**self._head(), "choices": [choice]}
                if self.body.include_usage:
                    data["usage"] = usage(self.generation) if self.body.continuous_usage else None
                yield event(data)
        if self.body.include_usage:
            yield event({**self._head(), "choices": [], "usage": usage(self.generation)})
        yield DONE

    def _head(self) -> dict[str, Any]:
        return {
            "id": f"cmpl-{self.record.request_id}",
            "object": "text_completion",
            "created": self.created,
            "model": self.name,
        }

    def _choice(self, number: int, output: CompletionOutput) -> dict[str, Any]:
        prompt_ids = self.generation.prompts[number].tolist()
        text, ids, logprobs = output.text, output.token_ids, list(output.logprobs or ())
        entries: list[TokenLogprobs | None] = list(logprobs)
        if self.body.echo:
            text = self._prompt_text(number) + text
            ids = prompt_ids + ids
            if self.body.logprobs is not None:
                entries = [None, *self.generation.scores[number], *logprobs]
        choice: dict[str, Any] = {
            "index": self._index(number, output.index),
            "text": text,
            "logprobs": None if self.body.logprobs is None else self._logprobs(ids, entries),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        if self.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(
                self.served.tokenizer, prompt_ids, self.generation.scores[number], self.body.prompt_logprobs
            )
        if self.body.return_token_ids:
            choice |= {"token_ids": output.token_ids, "prompt_token_ids": prompt_ids}
        return choice

    def _stream_choice(self, number: int, chunk: StreamChunk) -> dict[str, Any]:
        index = self._index(number, chunk.index)
        text, ids = chunk.text, chunk.token_ids
        entries: list[TokenLogprobs | None] = list(chunk.logprobs or ())
        first = index not in self._started
        self._started.add(index)
        if self.body.echo and first:
            text = self._prompt_text(number) + text
            ids = self.generation.prompts[number].tolist() + ids
            if self.body.logprobs is not None:
                entries = [None, *self.generation.scores[number], *entries]
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + len(text)
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(ids, entries, offset) if self.body.logprobs is not None and ids else None,
            "finish_reason": chunk.finish_reason,
        }
        if chunk.finish_reason is not None:
            choice["stop_reason"] = self.generation.outputs(number)[chunk.index].stop_reason
        if self.body.return_token_ids:
            choice["token_ids"] = chunk.token_ids
            if first:
                choice["prompt_token_ids"] = self.generation.prompts[number].tolist()
        return choice

    def _logprobs(self, ids: Sequence[int], entries: Sequence[TokenLogprobs | None], offset: int = 0) -> dict[str, Any]:
        as_ids = bool(self.body.return_tokens_as_token_ids)
        best = self.body.logprobs or 0
        return completion_logprobs(self.served.tokenizer, ids, entries, best, first_offset=offset, as_ids=as_ids)

    def _prompt_text(self, number: int) -> str:
        """The prompt as it was given, or the text of its token ids."""
        prompt = self.body.prompt[number]
        return prompt if isinstance(prompt, str) else self.served.tokenizer.decode(prompt, skip_special=False)

    def _index(self, number: int, output: int) -> int:
        return number * self.generation.params.n + output
