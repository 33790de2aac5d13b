"""The server's configuration: one frozen object, validated once."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tokenmill.engine.messages import Pooling
from tokenmill.errors import UsageError
from tokenmill.server.reasoning import ReasoningParser


class LogFormat(Enum):
    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What ``tokenmill serve`` was asked for. Raises UsageError naming option, value and allowed range."""

    names: tuple[str, ...]
    """Names under which requests may ask for the model; the first is the one that answers carry."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    api_keys: tuple[str, ...] = ()
    """Any of them opens every route but health checks; none leaves them open."""
    admin_api_keys: tuple[str, ...] = ()
    """For the routes that change the server. Without one they are closed if there are ``api_keys``."""
    chat_template: str | None = None
    """Source of a Jinja template that replaces the model's."""
    reasoning_parser: ReasoningParser = ReasoningParser.AUTO
    pooling: Pooling = Pooling.LAST
    """What an embedding is made of."""
    max_queued_requests: int = 1024
    """Outputs that may wait for a place beside the running ones; more are refused with 503."""
    max_body_bytes: int = 16 << 20
    watchdog_seconds: float = 300.0
    """An engine that gets nowhere for so long is taken to hang, killed and started again; 0 waits without end."""
    start_seconds: float = 600.0
    """The same for an engine that loads its model."""
    shutdown_seconds: float = 30.0
    """How long running requests may go on after SIGTERM."""
    keep_alive_seconds: float = 15.0
    """A stream without output gets a comment this often."""
    cors_origins: tuple[str, ...] = ()
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    log_format: LogFormat = LogFormat.TEXT
    otlp_traces_endpoint: str | None = None
    """URL of an OpenTelemetry collector that gets a span of each request, by OTLP over HTTP."""
    log_prompts: bool = False
    """Writes prompts and answers to the log."""

    def __post_init__(self) -> None:
        if not self.names or not all(self.names):
            raise UsageError("--served-model-name must not be empty")
        for option, value, low, high in (
            ("--port", self.port, 0, 65535),
            ("--max-queued-requests", self.max_queued_requests, 0, 1_000_000),
            ("--max-body-size", self.max_body_bytes, 1024, 1 << 30),
            ("--watchdog-timeout", self.watchdog_seconds, 0, 86400),
            ("--start-timeout", self.start_seconds, 0, 86400),
            ("--shutdown-timeout", self.shutdown_seconds, 0, 86400),
        ):
            if not low <= value <= high:
                raise UsageError(f"{option} is {value}; it must be {low} to {high}")
        for option, keys in (("--api-key", self.api_keys), ("--admin-api-key", self.admin_api_keys)):
            if not all(key and key.isascii() and key.isprintable() and " " not in key for key in keys):
                raise UsageError(f"{option} must be printable ASCII without spaces")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise UsageError("--ssl-keyfile needs --ssl-certfile")
        for option, file in (("--ssl-certfile", self.ssl_certfile), ("--ssl-keyfile", self.ssl_keyfile)):
            if file is not None and not file.is_file():
                raise UsageError(f"{option}: there is no file {file}")
