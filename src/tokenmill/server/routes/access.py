"""What a route gets from the application around it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from tokenmill.server.request_log import RequestRecord
from tokenmill.server.served import ServedModel


async def _served(request: Request) -> ServedModel:
    served = request.app.state.served
    assert isinstance(served, ServedModel)
    return served


async def _record(request: Request) -> RequestRecord:
    record = request.state.record
    assert isinstance(record, RequestRecord)
    return record


Served = Annotated[ServedModel, Depends(_served)]
Record = Annotated[RequestRecord, Depends(_record)]


def new_router() -> APIRouter:
    """A router for routes whose JSON bodies hold Unicode text only."""
    return APIRouter(route_class=_Route)


class _UnicodeRequest(Request):
    """A request whose JSON holds Unicode text only."""

    async def json(self) -> Any:
        value = await super().json()
        # Half a surrogate pair has no UTF-8: it can come escaped only, and neither tokenizer nor answer can hold it.
        body = await self.body()
        if b"\\ud" in body or b"\\uD" in body:
            _check_unicode(value)
        return value


class _Route(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_unicode(request: Request) -> Response:
            return await handle(_UnicodeRequest(request.scope, request.receive))

        return handle_unicode


def _check_unicode(value: Any) -> None:
    """Raises HTTPException for text with a lone surrogate."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            if any("\ud800" <= character <= "\udfff" for character in item):
                raise HTTPException(400, "the body has half of a surrogate pair (\\ud800 to \\udfff): no Unicode text")
        elif isinstance(item, dict):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            stack += item
