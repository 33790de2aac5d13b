"""``POST /v1/embeddings``: pooled hidden states of the model; and routes that a model needs training for."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

from fastapi import Request, Response
from pydantic import Field

from tokenmill.backends.backend import Float32
from tokenmill.sampling import SamplingParams
from tokenmill.server.errors import ApiError, unsupported
from tokenmill.server.requests import Name, Prompts, RequestId, StrictBody, Truncation, name_of
from tokenmill.server.routes.access import Record, Served, new_router
from tokenmill.server.streams import finish_or_leave, json_response

router = new_router()


class EmbeddingsBody(StrictBody):
    """OpenAI's parameters and vLLM's additional ones."""

    input: Prompts
    model: Name | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: Name | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Truncation | None = None
    priority: int | None = None
    request_id: RequestId | None = None


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingsBody, request: Request, served: Served, record: Record) -> Response:
    """One vector of length 1 for each input."""
    name = served.check_name(body.model)
    width = served.ready.hidden_size
    if body.dimensions not in (None, width):
        raise unsupported("dimensions", f"must be {width}: the model was not trained for shorter vectors")
    record.request_id = body.request_id or record.request_id
    prompts = []
    for number, given in enumerate(body.input):
        ids = await served.prompt_ids(given, add_special=body.add_special_tokens is not False)
        param = name_of("input", body.input, number)
        prompts.append(served.check_prompt(ids, room=0, param=param, truncate=body.truncate_prompt_tokens))
    params = SamplingParams(max_tokens=None, priority=body.priority or 0)
    served.check_params(params)
    generation = served.generate(prompts, params, record, pooling=served.config.pooling)
    await finish_or_leave(request, generation, served.metrics)
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(generation.embeddings[index], body)}
        for index in range(len(prompts))
    ]
    usage = {"prompt_tokens": generation.prompt_tokens, "total_tokens": generation.prompt_tokens}
    return json_response({"object": "list", "data": data, "model": name, "usage": usage})


def _encoded(vector: Float32, body: EmbeddingsBody) -> list[float] | str:
    """``vector`` as numbers, or as its fp32 bytes, little-endian, in base64."""
    if body.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(element) for element in vector]


@router.post("/v1/score")
@router.post("/score")
@router.post("/v1/rerank")
@router.post("/rerank")
async def not_an_embedder(body: dict[str, Any], served: Served) -> Response:
    """400: the model is not an embedding model."""
    raise ApiError(
        f"{served.name} is not an embedding model; it generates text, and was not trained to score pairs",
        param="model",
        code="unsupported_model",
    )
