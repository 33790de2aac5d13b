"""What every request passes first: an id, the API key, size limits; and what is written down when it ends."""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
import time
from collections.abc import Iterable
from hashlib import sha256

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenmill.server.errors import CLIENT_CLOSED, ApiError, error_response
from tokenmill.server.generation import new_record
from tokenmill.server.served import ServedModel
from tokenmill.server.web_files import WEB_FILES

OPEN_ROUTES = frozenset({"/health", "/ready", "/ping"}) | WEB_FILES.keys()
"""Need no key: whoever watches the server has none, and the web page asks for it."""
ADMIN_ROUTES = frozenset({"/reset_prefix_cache", "/abort_requests"})
"""Change the server, or others' requests."""
MAX_HEADER_BYTES = 64 << 10
BODY_SECONDS = 60.0
"""How long a client may take to send its body."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:/+=-]{1,128}\Z")


class KeyRing:
    """API keys, kept as hashes and compared in constant time."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def has(self, key: str) -> bool:
        digest = sha256(key.encode()).digest()
        found = False
        for known in self._digests:  # all of them, whichever matches
            found |= hmac.compare_digest(digest, known)
        return found


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, served: ServedModel) -> None:
        self._app = app
        self._served = served
        self._keys = KeyRing(served.config.api_keys)
        self._admin_keys = KeyRing(served.config.admin_api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        client = scope["client"][0] if scope.get("client") else ""
        record = new_record(_request_id(headers), scope["method"], scope["path"], client)
        scope.setdefault("state", {})["record"] = record
        finished = False

        async def send_noting(message: Message) -> None:
            nonlocal finished
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.request_id
            elif message["type"] == "http.response.body":
                finished = not message.get("more_body", False)
            await send(message)

        self._served.active_requests += 1
        try:
            refusal = self._refusal(scope, headers)
            if refusal is None:
                await self._app(scope, self._bounded(receive), send_noting)
            else:
                await error_response(refusal, scope["path"])(scope, receive, send_noting)
        finally:
            self._served.active_requests -= 1
            if not finished:
                record.status = record.status if record.status >= 400 else CLIENT_CLOSED
            route = scope.get("route")
            handler = getattr(route, "path", None) or "none"
            seconds = time.monotonic() - record.arrival
            self._served.metrics.http_request(record.method, handler, record.status, seconds)
            record.write()
            if self._served.tracing is not None:
                self._served.tracing.record(record, headers)

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        """Why the request is turned away before it is read."""
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            return ApiError(f"the headers have more than {MAX_HEADER_BYTES} bytes", 431)
        refusal = self._unauthorized(scope, headers)
        if refusal is not None:
            self._served.metrics.rejected("unauthorized")
            return refusal
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length[:20]) > self._served.config.max_body_bytes:
            self._served.metrics.rejected("body_too_large")
            return self._too_large()
        return None

    def _unauthorized(self, scope: Scope, headers: Headers) -> ApiError | None:
        path = scope["path"]
        if path in OPEN_ROUTES or (scope["method"] == "OPTIONS" and path not in ADMIN_ROUTES):
            return None
        if path in ADMIN_ROUTES:
            if not self._admin_keys and self._keys:
                return ApiError("this route needs an admin key, and the server has none (--admin-api-key)", 403)
            keys = self._admin_keys
        else:
            keys = self._keys
        if not keys:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not given:
            return ApiError("an API key is needed: send Authorization: Bearer KEY", 401, code="invalid_api_key")
        if not keys.has(given):
            return ApiError("the API key is wrong", 401, code="invalid_api_key")
        return None

    def _bounded(self, receive: Receive) -> Receive:
        """``receive`` that gives no more than the largest body, and does not wait for it without end."""
        left = self._served.config.max_body_bytes
        deadline = time.monotonic() + BODY_SECONDS
        whole = False

        async def receive_bounded() -> Message:
            nonlocal left, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout(max(deadline - time.monotonic(), 0.0)):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body did not come within {BODY_SECONDS:.0f} s") from None
            left -= len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if left < 0:
                self._served.metrics.rejected("body_too_large")
                raise HTTPException(413, self._too_large().message)
            return message

        return receive_bounded

    def _too_large(self) -> ApiError:
        return ApiError(f"the body has more than {self._served.config.max_body_bytes} bytes (--max-body-size)", 413)


def _request_id(headers: Headers) -> str:
    """The client's own id if it is harmless, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.match(given) else secrets.token_hex(12)
