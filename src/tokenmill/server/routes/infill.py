"""``POST /infill``: what belongs between two pieces of code, in llama.cpp's names (its editor plugins speak them)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Request, Response
from pydantic import Field

from tokenmill.server.errors import ApiError, unsupported
from tokenmill.server.fill_in_middle import fill_in_middle
from tokenmill.server.generation import Generation
from tokenmill.server.requests import SamplingBody, StrictBody
from tokenmill.server.routes.access import Record, Served, new_router
from tokenmill.server.served import ServedModel
from tokenmill.server.streams import KEEP_ALIVE, event, respond

router = new_router()

_FILE_MARKS = ("<|file_sep|>", "<file_sep>")


class ExtraFile(StrictBody):
    """Another file of the project, as context."""

    text: str
    filename: str = "tmp"


class InfillBody(SamplingBody):
    input_prefix: str
    input_suffix: str
    input_extra: Annotated[list[ExtraFile], Field(max_length=256)] | None = None
    prompt: str | None = None
    """Beginning of the middle, which the answer continues."""
    n_predict: Annotated[int, Field(ge=-1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    repeat_penalty: float | None = None
    cache_prompt: bool | None = None

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.n not in (None, 1):
            raise unsupported("n", "must be 1 here")
        for name in (
            "truncate_prompt_tokens",
            "prompt_logprobs",
            "return_token_ids",
            "return_tokens_as_token_ids",
            "stream_options",
        ):
            if getattr(self, name):
                raise unsupported(name, "is not for this route; leave it out")
        if self.cache_prompt is False:
            raise unsupported("cache_prompt", "cannot be switched off for one request (--no-prefix-caching)")
        if self.n_predict == 0:
            raise ApiError("n_predict is 0: nothing would be returned", param="n_predict")


@router.post("/infill")
async def infill(body: InfillBody, request: Request, served: Served, record: Record) -> Response:
    """The text between ``input_prefix`` and ``input_suffix``."""
    name = served.check_name(body.model)
    body.refuse_unsupported()
    extra = await _extra_files(served, body.input_extra or ())
    ids = await fill_in_middle(served, body.input_prefix, body.input_suffix, "input_suffix", extra)
    if body.prompt:
        ids += await served.encode(body.prompt, add_special=False, parse_special=False)
    prompt = served.check_prompt(ids, param="input_prefix")
    most = body.max_tokens if body.n_predict in (None, -1) else body.n_predict
    given = {**body.sampling(), "max_tokens": most}
    if body.repeat_penalty is not None:
        given["repetition_penalty"] = body.repeat_penalty
    generation = served.generate([prompt], served.sampling_params(given), record)
    return await respond(request, served, generation, _Answer(generation, name), stream=body.stream)


@dataclass(frozen=True, slots=True)
class _Answer:
    """Bodies made from a generation."""

    generation: Generation
    name: str

    def whole(self) -> dict[str, Any]:
        return {"content": self.generation.outputs(0)[0].text, **self._end()}

    async def frames(self, idle: float) -> AsyncIterator[bytes]:
        async for pieces in self.generation.pieces(idle):
            if not pieces:
                yield KEEP_ALIVE
            for piece in pieces:
                data: dict[str, Any] = {"content": piece.chunk.text, "tokens": piece.chunk.token_ids, "stop": False}
                if piece.chunk.finish_reason is not None:
                    data |= self._end()
                yield event(data)

    def _end(self) -> dict[str, Any]:
        (output,) = self.generation.outputs(0)
        if isinstance(output.stop_reason, str):
            stop_type = "word"
        else:
            stop_type = "limit" if output.finish_reason == "length" else "eos"
        return {
            "stop": True,
            "stop_type": stop_type,
            "stopping_word": output.stop_reason if isinstance(output.stop_reason, str) else "",
            "model": self.name,
            "tokens_predicted": self.generation.output_tokens,
            "tokens_evaluated": self.generation.prompt_tokens,
            "tokens_cached": self.generation.record.cached_tokens,
            "truncated": False,
        }


async def _extra_files(served: ServedModel, files: Sequence[ExtraFile]) -> list[int]:
    """Other files before the one at hand, each after the model's mark for a file's beginning."""
    if not files:
        return []
    marks = (served.tokenizer.encode(text, add_special=False) for text in _FILE_MARKS)
    mark = next((ids for ids in marks if len(ids) == 1), None)
    if mark is None:
        raise unsupported("input_extra", f"needs a token that separates files, and {served.name} has none")
    found: list[int] = []
    for file in files:
        text = f"{file.filename}\n{file.text}\n"
        found += [*mark, *await served.encode(text, add_special=False, parse_special=False)]
    return found
