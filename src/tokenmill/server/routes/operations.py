"""Routes for those who run the server: is it well, what does it serve, what is it doing."""

from __future__ import annotations

import itertools
import re
import time
from typing import Annotated, Any

from fastapi import Query, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field

from tokenmill import __version__
from tokenmill.program.kv import PAGE_TOKENS
from tokenmill.server.errors import ApiError
from tokenmill.server.requests import Name, StrictBody
from tokenmill.server.routes.access import Served, new_router
from tokenmill.server.served import ServedModel
from tokenmill.server.streams import json_response

router = new_router()

MAX_LISTED = 64
"""Requests that /statistics tells of one by one."""

_ANSWER_PREFIX = re.compile(r"^(chatcmpl-|cmpl-|msg_|resp_)")


@router.get("/health")
async def health(served: Served) -> Response:
    """200 while the engine lives, 503 from the moment it does not."""
    state = served.engine.state.value
    if served.engine.reason:
        raise ApiError(served.engine.reason, 503, code=f"engine_{state}", retry_after=1)
    return json_response({"status": "ok"})


@router.get("/ready")
async def ready(served: Served) -> Response:
    """200 while requests are taken: not while the server drains or the engine restarts."""
    reason = served.unready()
    if reason is not None:
        raise ApiError(reason, 503, code="unavailable", retry_after=1)
    return json_response({"status": "ready"})


@router.get("/ping")
@router.post("/ping")
async def ping(served: Served) -> Response:
    """The same as /health, under the name that SageMaker asks for."""
    return await health(served)


@router.get("/version")
async def version() -> Response:
    return json_response({"version": __version__})


@router.get("/load")
async def load(served: Served) -> Response:
    """Requests that are being answered, this one not counted."""
    return json_response({"server_load": served.active_requests - 1})


@router.get("/metrics")
async def metrics(served: Served) -> Response:
    """Prometheus' text format."""
    return Response(served.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models")
async def models(served: Served) -> Response:
    return json_response({"object": "list", "data": [_card(served, name) for name in served.config.names]})


@router.get("/v1/models/{name:path}")
async def model(name: str, served: Served) -> Response:
    return json_response(_card(served, served.check_name(name)))


@router.post("/reset_prefix_cache")
async def reset_prefix_cache(served: Served) -> Response:
    """Frees every cached KV page; later prompts are computed from their beginning."""
    served.engine.reset_prefix_cache()
    return Response()


class AbortBody(StrictBody):
    request_ids: Annotated[list[Name], Field(max_length=10_000)]


@router.post("/abort_requests")
async def abort_requests(body: AbortBody, served: Served) -> Response:
    """Stops requests by their ids or those of their answers."""
    bare = [_ANSWER_PREFIX.sub("", name, count=1) for name in body.request_ids]
    return json_response({"aborted": served.abort([*body.request_ids, *bare])})


@router.get("/props")
async def props(served: Served) -> Response:
    """llama.cpp's description of the server."""
    tokenizer = served.tokenizer
    defaults = served.sampling_params({})
    return json_response(
        {
            "default_generation_settings": {
                "n_ctx": served.max_model_len,
                "params": {
                    "temperature": defaults.temperature,
                    "top_k": defaults.top_k,
                    "top_p": defaults.top_p,
                    "min_p": defaults.min_p,
                    "repeat_penalty": defaults.repetition_penalty,
                },
            },
            "total_slots": served.ready.ledger.max_num_seqs,
            "model_alias": served.name,
            "model_path": served.path.name,
            "chat_template": tokenizer.chat_template or "",
            "bos_token": _text(served, tokenizer.bos_id),
            "eos_token": _text(served, tokenizer.eos_id),
            "modalities": {"vision": False, "audio": False},
            "build_info": f"tokenmill {__version__}",
            "is_sleeping": False,
        }
    )


@router.get("/slots")
async def slots(served: Served) -> Response:
    """What runs and waits, oldest first, in llama.cpp's names; without texts."""
    return json_response(_slots(served))


@router.get("/statistics")
async def statistics(served: Served, after: Annotated[int, Query(ge=0)] = 0) -> Response:
    """The engine now and since the start, for live views: times in seconds, ``time`` and steps by one clock, the
    server's start and the engine's last death since 1970.

    Of the latest steps, those that ran since there had been ``after`` of them.
    """
    report, ledger, steps, death = served.engine.report, served.ready.ledger, served.steps, served.engine.last_death
    unknown = steps.steps - after if after <= steps.steps else steps.steps
    return json_response(
        {
            "time": time.monotonic(),
            "server_started": served.created,
            "model": served.name,
            "engine": {
                "state": served.engine.state.value,
                "reason": served.engine.reason,
                "restarts": served.engine.restarts,
                "last_death": None if death is None else {"reason": death.reason, "time": death.time},
                "architecture": served.ready.architecture,
                "max_model_len": ledger.max_model_len,
                "max_num_seqs": ledger.max_num_seqs,
                "step_target": served.engine_config.step_target,
            },
            "running": 0 if report is None else report.running,
            "waiting": 0 if report is None else report.waiting,
            "requests": _slots(served, MAX_LISTED),
            "kv": {"page_tokens": PAGE_TOKENS, "groups": [] if report is None else report.usage},
            "prefix_cache": {
                "queries": 0 if report is None else report.prefix_queries,
                "hits": 0 if report is None else report.prefix_hits,
            },
            "memory": {
                "weights": ledger.weights,
                "kv": ledger.kv,
                "scratch": ledger.scratch,
                "budget": ledger.budget.limit,
            },
            "tokens": {"prompt": steps.prompt_tokens, "generated": steps.sampled},
            "latency": {
                "first_token": served.metrics.first_token_seconds,
                "between_tokens": served.metrics.between_tokens_seconds,
            },
            "steps": {"count": steps.steps, "latest": list(steps.recent)[-unknown:] if unknown else []},
        }
    )


def _slots(served: ServedModel, most: int | None = None) -> list[dict[str, Any]]:
    now = time.monotonic()
    return [
        {
            "id": number,
            "id_task": generation.record.request_id,
            "n_ctx": served.max_model_len,
            "is_processing": generation.record.first_token is not None,
            "n_prompt_tokens": generation.prompt_tokens,
            "n_decoded": generation.output_tokens,
            "outputs_open": generation.open_outputs,
            "seconds": round(now - generation.record.arrival, 3),
        }
        for number, generation in enumerate(itertools.islice(served.generations, most))
    ]


def _card(served: ServedModel, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "tokenmill",
        "root": served.name,
        "parent": None,
        "max_model_len": served.max_model_len,
        "permission": [],
    }


def _text(served: ServedModel, token_id: int | None) -> str:
    return "" if token_id is None else served.tokenizer.token_bytes(token_id).decode("utf-8", "replace")
