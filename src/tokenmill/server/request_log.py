"""One line for each request, as text or JSON, on standard error. Prompts and answers are in it only if asked for."""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import dataclass, field

from tokenmill.sampling import SamplingParams
from tokenmill.server.config import LogFormat
from tokenmill.server.web_files import WEB_FILES

log = logging.getLogger("tokenmill.requests")

_QUIET_ROUTES = {"/health", "/ready", "/ping", "/metrics", "/load", "/statistics"} | WEB_FILES.keys()
"""Asked by machines every few seconds, or the files of a page: logged at DEBUG."""


@dataclass(slots=True)
class RequestRecord:
    """What is known of a request when it ends. Times are ``time.monotonic()`` seconds."""

    request_id: str
    method: str
    path: str
    client: str
    arrival: float
    status: int = 0
    params: SamplingParams | None = None
    """Of the prompts that went to the engine, if any did."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    started: float | None = None
    first_token: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    error: str | None = None
    prompts: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    """Texts, kept only if they are to be logged."""

    def write(self) -> None:
        """Logs the request."""
        level = logging.DEBUG if self.path in _QUIET_ROUTES else logging.INFO
        if log.isEnabledFor(level):
            log.log(level, self._sentence(), extra={"record": self})

    def fields(self) -> dict[str, object]:
        """For JSON; what does not apply is left out."""
        seconds = {"total_s": time.monotonic() - self.arrival}
        if self.started:
            seconds["queue_s"] = max(self.started - self.arrival, 0.0)
        if self.first_token is not None:
            seconds["first_token_s"] = self.first_token - self.arrival
        found: dict[str, object] = {
            "request_id": self.request_id,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "client": self.client,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "finish_reasons": self.finish_reasons,
            "error": self.error,
            "prompts": self.prompts,
            "outputs": self.outputs,
            **{name: round(value, 4) for name, value in seconds.items()},
        }
        return {name: value for name, value in found.items() if value not in (None, [], 0)}

    def _sentence(self) -> str:
        now = time.monotonic()
        parts = [f"{self.method} {self.path} {self.status}", self.request_id]
        if self.prompt_tokens:
            cached = f" ({self.cached_tokens} cached)" if self.cached_tokens else ""
            parts.append(f"{self.prompt_tokens} prompt tokens{cached}, {self.output_tokens} generated")
        if self.first_token is not None:
            parts.append(f"first after {self.first_token - self.arrival:.3f} s")
        parts.append(f"{now - self.arrival:.3f} s")
        if self.finish_reasons:
            parts.append(", ".join(dict.fromkeys(self.finish_reasons)))
        if self.error:
            parts.append(f"error: {self.error}")
        parts += [f"prompt {text!r}" for text in self.prompts]
        parts += [f"output {text!r}" for text in self.outputs]
        return "; ".join(parts)


class _TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\r", "\\r")


class _JsonFormatter(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
        }
        request = getattr(record, "record", None)
        if isinstance(request, RequestRecord):
            line |= {"event": "request", **request.fields()}
        else:
            line |= {"event": "message", "message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_logging(form: LogFormat) -> None:
    """Sends the server's log to standard error. A log that cannot be written (a full disk) stops nothing."""
    logging.raiseExceptions = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if form is LogFormat.JSON else _TextFormatter())
    for name, level in (("tokenmill", logging.INFO), ("uvicorn", logging.WARNING), ("opentelemetry", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False
