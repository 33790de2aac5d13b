"""Spans of requests, as a collector gets them over HTTP, and that one which is down disturbs nobody."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from served_model import SMALL, RunningServer, serving

from tokenmill.errors import UsageError
from tokenmill.server.tracing import otlp_exporter


class Collector(ThreadingHTTPServer):
    """Keeps the spans that it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), CollectorHandler)
        self.spans: list[Span] = []
        self.paths: set[str] = set()


class CollectorHandler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") is None:
            message = ExportTraceServiceRequest.FromString(body)
            for resource in message.resource_spans:
                self.server.spans += [span for scope in resource.scope_spans for span in scope.spans]
        self.server.paths.add(self.path)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def attributes(span: Span) -> dict[str, Any]:
    return {each.key: getattr(each.value, str(each.value.WhichOneof("value"))) for each in span.attributes}


def test_requests_become_spans(tiny_model: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    endpoint = f"http://127.0.0.1:{collector.server_port}"
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with serving(tiny_model, *SMALL, "--otlp-traces-endpoint", endpoint) as server:
        headers = {"traceparent": parent, "x-request-id": "mine"}
        body = {"prompt": "the rain", "max_tokens": 5, "n": 2, "temperature": 0.5, "ignore_eos": True}
        assert server.post("/v1/completions", body, headers=headers).status_code == 200
        assert server.post("/v1/completions", {**body, "stream": True}).status_code == 200
        assert server.post("/v1/embeddings", {"input": "the rain"}).status_code == 200
        impossible = {"structured_outputs": {"regex": "("}}
        assert server.post("/v1/completions", {**body, **impossible}).status_code == 400
        assert server.post("/v1/completions", {"max_tokens": -1}).status_code == 400  # never reached the engine
        server.get("/health")
        server.stop()  # sends what is left
    assert collector.paths == {"/v1/traces"}
    assert {(span.name, span.kind) for span in collector.spans} == {("llm_request", Span.SPAN_KIND_SERVER)}
    whole, streamed, embedding, failed = sorted(collector.spans, key=lambda span: span.start_time_unix_nano)
    assert whole.trace_id.hex() == "0af7651916cd43dd8448eb211c80319c"
    assert whole.parent_span_id.hex() == "b7ad6b7169203331"
    assert not streamed.parent_span_id
    told = attributes(whole)
    assert told["gen_ai.request.id"] == "mine"
    assert told["gen_ai.response.model"] == "tiny"
    assert (told["gen_ai.request.n"], told["gen_ai.request.max_tokens"]) == (2, 5)
    assert told["gen_ai.request.temperature"] == 0.5
    assert told["gen_ai.usage.completion_tokens"] == 10
    assert told["gen_ai.usage.prompt_tokens"] > 0
    parts = ("time_in_queue", "time_in_model_prefill", "time_in_model_decode")
    total = sum(told[f"gen_ai.latency.{part}"] for part in parts)
    assert told["gen_ai.latency.e2e"] == pytest.approx(total, rel=0.01)
    seconds = (whole.end_time_unix_nano - whole.start_time_unix_nano) / 1e9
    assert told["gen_ai.latency.e2e"] == pytest.approx(seconds, rel=0.01)
    assert attributes(embedding)["gen_ai.usage.completion_tokens"] == 0
    assert [span.status.code for span in (whole, streamed, embedding, failed)] == [
        *[Status.STATUS_CODE_UNSET] * 3,
        Status.STATUS_CODE_ERROR,
    ]
    assert not any("rain" in str(span) for span in collector.spans)


def test_a_collector_that_is_down_disturbs_nobody(tiny_model: Path, server: RunningServer) -> None:
    expected = server.complete().json()["choices"]
    with serving(tiny_model, *SMALL, "--otlp-traces-endpoint", "http://127.0.0.1:9/v1/traces") as blind:
        assert [blind.complete().json()["choices"] for _ in range(5)] == [expected] * 5
        assert blind.stop() == 0


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "grpc://127.0.0.1:4317", "http://"])
def test_an_endpoint_that_is_no_url_is_named(endpoint: str) -> None:
    with pytest.raises(UsageError, match="otlp-traces-endpoint"):
        otlp_exporter(endpoint)
