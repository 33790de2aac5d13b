"""Errors as clients see them: a status, and a body in the form that the route's API documents.

OpenAI's is ``{"error": {"message", "type", "param", "code"}}``, Anthropic's ``{"type": "error", "error": {...}}``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from tokenmill.engine.messages import EngineDeadError, EngineError, EngineOverloadedError
from tokenmill.errors import TokenmillError, UsageError
from tokenmill.tokenizer import ChatTemplateError
from tokenmill.tokenizer.tokenizer import TokenizerError

log = logging.getLogger("tokenmill.server")

CLIENT_CLOSED = 499
"""nginx's status for a client that left before the answer; only the log sees it."""


@dataclass(slots=True, eq=False)
class ApiError(Exception):
    """A request that cannot be served. ``param`` is the parameter at fault, ``retry_after`` in seconds."""

    message: str
    status: int = 400
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None

    def __post_init__(self) -> None:
        Exception.__init__(self, self.message)

    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


class RequestError(EngineError):
    """The engine found something wrong with the request itself."""


class StoppedError(EngineError):
    """Somebody outside of the engine ended the request."""


class ClientGoneError(StoppedError):
    """The client closed its connection; nobody waits for the rest."""


class AbortedError(StoppedError):
    """Somebody asked to stop the request by its id."""


class ShutdownError(StoppedError):
    """The server ended before the request did."""


def unsupported(param: str, why: str) -> ApiError:
    """A parameter that is known and cannot be honoured."""
    return ApiError(f"{param} {why}", param=param, code="unsupported_parameter")


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of ``error``."""
    match error:
        case ApiError():
            return error
        case EngineDeadError():
            return ApiError(f"the request was lost: {error}", 500, code="engine_dead")
        case RequestError():
            return ApiError(str(error))
        case EngineOverloadedError():
            return ApiError(str(error), 503, code="overloaded", retry_after=math.ceil(error.retry_after))
        case ClientGoneError():
            return ApiError(str(error), CLIENT_CLOSED)
        case AbortedError():
            return ApiError(str(error), 409, code="aborted")
        case ShutdownError():
            return ApiError(str(error), 503, code="unavailable", retry_after=1)
        case EngineError():
            return ApiError(str(error), 500, code="engine_error")
        case UsageError() | ChatTemplateError() | TokenizerError():
            return ApiError(str(error))
        case RequestValidationError():
            return _invalid(error.errors(), error.body)
        case HTTPException():
            return ApiError(_http_message(error), error.status_code)
        case TokenmillError():
            return ApiError(str(error), 500)
        case _:
            return ApiError("an internal error; the server's log has it", 500)


def log_text(error: Exception) -> str:
    """What the log says of ``error``. A client's mistake may quote its prompt, so only the kind of it is told."""
    told = as_api_error(error)
    if told.status >= 500 or isinstance(error, StoppedError):
        return told.message
    return f"{told.code or 'invalid request'} {told.param or ''}".strip()


def error_body(error: ApiError, path: str) -> dict[str, Any]:
    """The body for ``error`` on the route ``path``; also what a stream carries."""
    if is_anthropic(path):
        kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": error.message}}
    kind = _OPENAI_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def error_response(error: ApiError, path: str) -> Response:
    """``error`` as an HTTP response."""
    body = msgspec.json.encode(error_body(error, path))
    return Response(body, error.status, error.headers(), media_type="application/json")


def is_anthropic(path: str) -> bool:
    """True for routes whose clients expect Anthropic's bodies."""
    return path.startswith("/v1/messages")


def install_handlers(app: FastAPI) -> None:
    """Has every error leave the application in the API's form."""

    async def handle(request: Request, error: Exception) -> Response:
        told = as_api_error(error)
        request.state.record.error = log_text(error)
        if told.status == 500 and not isinstance(error, EngineError):
            log.error("request failed", exc_info=error)
        return error_response(told, request.url.path)

    for kind in (ApiError, TokenmillError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)


_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    503: "service_unavailable_error",
}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def _http_message(error: HTTPException) -> str:
    match error.status_code:
        case 404:
            return "there is no such route; GET /openapi.json lists them"
        case 405:
            return "this route does not take that method"
        case 400 if "parsing the body" in str(error.detail):
            return "the body is not JSON in UTF-8"
    return str(error.detail)


def _invalid(problems: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """The first problem that validation found, as a sentence about the parameter."""
    problem = problems[0]
    # Pydantic names the tried branches of unions in the place too; a client knows only what it sent.
    place, value = [], body
    for step in problem["loc"][1:]:
        in_object = isinstance(value, dict) and step in value
        in_list = isinstance(value, list) and isinstance(step, int) and step < len(value)
        if in_object or in_list:
            value = value[step]
        elif isinstance(value, dict) and problem["type"] == "missing" and step == problem["loc"][-1]:
            pass
        else:
            continue
        place.append(step)
    param = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).lstrip(".") or None
    match problem["type"]:
        case "extra_forbidden":
            return ApiError(f"{param} is not a parameter of this route", param=param, code="unknown_parameter")
        case "missing" if param is None or problem["loc"] == ("body",):
            return ApiError("the request has no JSON body, or its content-type is not application/json")
        case "missing":
            return ApiError(f"{param} is missing", param=param, code="missing_required_parameter")
        case "json_invalid":
            detail = problem.get("ctx", {}).get("error", "")
            return ApiError(f"the body is not JSON: {detail}" if detail else "the body is not JSON")
        case "value_error":
            cause = problem.get("ctx", {}).get("error")
            if isinstance(cause, ApiError):
                return cause
            return ApiError(f"{param or 'the body'} {cause}", param=param)
        case "model_attributes_type" | "dict_type" if param is None:
            return ApiError("the body must be a JSON object, sent as application/json")
    reason = str(problem["msg"])
    reason = reason[0].lower() + reason[1:]
    return ApiError(f"{param or 'the body'}: {reason}", param=param, code="invalid_value")
