"""OpenTelemetry spans, one for each request that reached the engine, in vLLM's names and attributes.

They leave in a thread of their own, from a queue that is bounded: a collector that is slow or down costs spans, never a
request. Texts are not in them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tokenmill import __version__
from tokenmill.errors import UsageError
from tokenmill.server.request_log import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

SPAN_NAME = "llm_request"
_EXPORT_SECONDS = 3
"""How long one export may take, at the end of the server too."""


def otlp_exporter(endpoint: str) -> SpanExporter:
    """Sends spans to a collector by OTLP over HTTP. Raises UsageError for an address that is none."""
    address = urlsplit(endpoint)
    if address.scheme not in ("http", "https") or not address.netloc:
        raise UsageError(f"--otlp-traces-endpoint is {endpoint!r}; it must be a URL such as http://127.0.0.1:4318")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ModuleNotFoundError as error:
        needed = f"--otlp-traces-endpoint needs the otel extra ({error.name} is missing): pip install 'tokenmill[otel]'"
        raise UsageError(needed) from error
    url = endpoint if address.path.strip("/") else endpoint.rstrip("/") + "/v1/traces"
    return OTLPSpanExporter(url, timeout=_EXPORT_SECONDS)


class Tracing:
    """Makes spans of request records."""

    def __init__(self, exporter: SpanExporter, model: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        # Named by the standard variable, like every other setting of the SDK.
        service = os.environ.get("OTEL_SERVICE_NAME", "tokenmill")
        self._provider = TracerProvider(resource=Resource.create({"service.name": service}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("tokenmill.server", __version__)
        self._model = model

    def record(self, record: RequestRecord, headers: Mapping[str, str]) -> None:
        """The span of a request that has ended, below the caller's if ``headers`` have a ``traceparent``."""
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if record.params is None:
            return
        end, now = time.time_ns(), time.monotonic()
        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        span = self._tracer.start_span(
            SPAN_NAME,
            TraceContextTextMapPropagator().extract(carrier),
            SpanKind.SERVER,
            self._attributes(record, now),
            start_time=end - int((now - record.arrival) * 1e9),
        )
        if record.error is not None:
            span.set_status(StatusCode.ERROR, record.error)
        span.end(end)

    def close(self) -> None:
        """Sends what is left, if somebody takes it."""
        self._provider.shutdown()

    def _attributes(self, record: RequestRecord, now: float) -> dict[str, str | int | float]:
        assert record.params is not None
        params = record.params
        found: dict[str, str | int | float | None] = {
            "gen_ai.response.model": self._model,
            "gen_ai.request.id": record.request_id,
            "gen_ai.request.n": params.n,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.usage.num_sequences": params.n,
            "gen_ai.usage.prompt_tokens": record.prompt_tokens,
            "gen_ai.usage.completion_tokens": record.output_tokens,
            "gen_ai.latency.e2e": now - record.arrival,
        }
        if record.started:
            found["gen_ai.latency.time_in_queue"] = max(record.started - record.arrival, 0.0)
            found["gen_ai.latency.time_in_model_inference"] = now - record.started
        if record.first_token is not None:
            found["gen_ai.latency.time_to_first_token"] = record.first_token - record.arrival
            found["gen_ai.latency.time_in_model_decode"] = now - record.first_token
            if record.started:
                found["gen_ai.latency.time_in_model_prefill"] = record.first_token - record.started
        return {name: value for name, value in found.items() if value is not None}
