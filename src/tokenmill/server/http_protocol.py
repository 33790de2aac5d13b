"""uvicorn's HTTP/1.1 protocol with bounds on what comes before a request's body."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10
"""Request line and headers."""
HEAD_SECONDS = 30.0
"""How long a client may take to send them, from the connection or its first byte on."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """Closes connections whose heads are too large or too slow: the parser alone would collect them without end."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head_bytes = 0
        self._in_head = True
        self._head_alarm: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_alarm = self.loop.call_later(HEAD_SECONDS, self._close_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_alarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_alarm is None:
                self._head_alarm = self.loop.call_later(HEAD_SECONDS, self._close_slow)
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(
                b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            )
            self.transport.close()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_alarm()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head, self._head_bytes = True, 0

    def _close_slow(self) -> None:
        self._head_alarm = None
        if self._in_head and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()

    def _stop_alarm(self) -> None:
        if self._head_alarm is not None:
            self._head_alarm.cancel()
            self._head_alarm = None
