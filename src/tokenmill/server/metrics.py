"""Prometheus metrics: vLLM's names, labels and buckets, so that boards made for it read this server, and a few more.

Names are an interface that other people's dashboards stand on: ``tests/server/golden_metrics.txt`` holds them.
"""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from tokenmill.engine import statistics
from tokenmill.engine.ledger import MemoryLedger
from tokenmill.engine.messages import Timings
from tokenmill.engine.wire import EngineReport
from tokenmill.program.kv import PAGE_TOKENS
from tokenmill.sampling import SamplingParams

# fmt: off
# Buckets in seconds, as vLLM has them.
_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)
_BETWEEN_TOKENS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)
_REQUEST = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)
# fmt: on
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
_HTTP_SECONDS = (0.001, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0)
_SAMPLES = (1, 2, 5, 10, 20)
_LATENCY_BOUNDS = tuple(0.001 * 10 ** (eighth / 8) for eighth in range(41))
"""Eight to a decade, from 1 ms to 100 s."""

FINISHED_REASONS = ("stop", "length", "abort", "error")
REJECTIONS = ("queue_full", "draining", "engine_dead", "unauthorized", "body_too_large")
CANCELLATIONS = ("client_gone", "aborted", "shutdown")


def token_buckets(longest: int) -> tuple[int, ...]:
    """1, 2, 5, 10, ... up to ``longest``."""
    values = [digit * 10**power for power in range(12) for digit in (1, 2, 5)]
    return tuple(value for value in values if value <= longest) or (1,)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, model: str, max_model_len: int) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._labels = {"model_name": model, "engine": "0"}
        self._tokens = token_buckets(max_model_len)
        gauge, counter, histogram = self._gauge, self._counter, self._histogram

        self._running = gauge("vllm:num_requests_running", "Sequences that run")
        self._waiting = gauge("vllm:num_requests_waiting", "Sequences that wait")
        self._kv_usage = gauge("vllm:kv_cache_usage_perc", "Share of KV pages in use, 1 is all")
        self._cache_config = Gauge(
            "vllm:cache_config_info",
            "The KV cache",
            [*self._labels, "block_size", "num_gpu_blocks", "enable_prefix_caching", "cache_dtype"],
            registry=self.registry,
        )
        self._preemptions = counter("vllm:num_preemptions", "Sequences that lost their pages to older ones")
        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of requests that started")
        self._cached_tokens = counter("vllm:prompt_tokens_cached", "Prompt tokens found in the prefix cache")
        self._generated = counter("vllm:generation_tokens", "Generated tokens")
        self._prefix_queries = counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache")
        self._prefix_hits = counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache")
        success = Counter(
            "vllm:request_success", "Outputs that ended", [*self._labels, "finished_reason"], registry=self.registry
        )
        self._success = {r: success.labels(**self._labels, finished_reason=r) for r in FINISHED_REASONS}
        rejections = Counter(
            "vllm:admission_rejections", "Requests refused", [*self._labels, "reason"], registry=self.registry
        )
        self._queue_full = rejections.labels(**self._labels, reason="max_num_queued_reqs")

        self._first_token = histogram("vllm:time_to_first_token_seconds", "Arrival to first token", _FIRST_TOKEN)
        self._between_tokens = histogram("vllm:inter_token_latency_seconds", "Between two tokens", _BETWEEN_TOKENS)
        self._per_token = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time between the tokens of an output", _BETWEEN_TOKENS
        )
        self._end_to_end = histogram("vllm:e2e_request_latency_seconds", "Arrival to end", _REQUEST)
        self._queued = histogram("vllm:request_queue_time_seconds", "Arrival to start", _REQUEST)
        self._inference = histogram("vllm:request_inference_time_seconds", "Start to end", _REQUEST)
        self._prefill = histogram("vllm:request_prefill_time_seconds", "Start to first token", _REQUEST)
        self._decode = histogram("vllm:request_decode_time_seconds", "First token to end", _REQUEST)
        self._request_prompt = histogram("vllm:request_prompt_tokens", "Prompt tokens", self._tokens)
        self._request_output = histogram("vllm:request_generation_tokens", "Generated tokens", self._tokens)
        self._request_most = histogram(
            "vllm:request_max_num_generation_tokens", "Generated tokens of a request's longest output", self._tokens
        )
        self._params_n = histogram("vllm:request_params_n", "n", _SAMPLES)
        self._params_max = histogram("vllm:request_params_max_tokens", "max_tokens", self._tokens)
        self._request_preemptions = histogram("vllm:request_num_preemptions", "Preemptions", (0, 1, 2, 5, 10, 20))
        self._computed = histogram(
            "vllm:request_prefill_kv_computed_tokens", "Prompt tokens that were computed", self._tokens
        )
        self._step_tokens = histogram("vllm:iteration_tokens_total", "Tokens of a step", _STEP_TOKENS)

        self._step_seconds = Histogram(
            "tokenmill:step_seconds",
            "Time of a step that only decodes, or that computes prompts too",
            [*self._labels, "phase"],
            buckets=_STEP_SECONDS,
            registry=self.registry,
        )
        self._memory = Gauge(
            "tokenmill:memory_bytes", "The memory ledger", [*self._labels, "kind"], registry=self.registry
        )
        self._pages = Gauge(
            "tokenmill:kv_pages", "KV pages by state", [*self._labels, "group", "state"], registry=self.registry
        )
        # Every reason is there from the start: a rate over a series that appears with its first event misses it.
        rejected = Counter(
            "tokenmill:requests_rejected", "Requests refused", [*self._labels, "reason"], registry=self.registry
        )
        self._rejected = {reason: rejected.labels(**self._labels, reason=reason) for reason in REJECTIONS}
        cancelled = Counter(
            "tokenmill:requests_cancelled", "Requests stopped", [*self._labels, "reason"], registry=self.registry
        )
        self._cancelled = {reason: cancelled.labels(**self._labels, reason=reason) for reason in CANCELLATIONS}
        self._up = gauge("tokenmill:engine_up", "1 while the engine runs")
        self._deaths = counter("tokenmill:engine_deaths", "Times that the engine process died")
        self._http = Counter("http_requests", "HTTP requests", ["method", "handler", "status"], registry=self.registry)
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "HTTP requests, to the end of the answer",
            ["method", "handler"],
            buckets=_HTTP_SECONDS,
            registry=self.registry,
        )
        self._preemptions_seen = 0

        # vLLM's buckets hold all tokens of a small model in one; a picture needs more.
        self.first_token_seconds = statistics.Histogram(_LATENCY_BOUNDS)
        self.between_tokens_seconds = statistics.Histogram(_LATENCY_BOUNDS)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    # ---- the engine ------------------------------------------------------------------------------------------------

    def engine_started(self, ledger: MemoryLedger, prefix_caching: bool) -> None:
        self._up.set(1)
        for kind, count in (
            ("weights", ledger.weights),
            ("kv", ledger.kv),
            ("scratch", ledger.scratch),
            ("budget", ledger.budget.limit),
        ):
            self._memory.labels(**self._labels, kind=kind).set(count)
        for spec, pages in zip(ledger.groups[:1], ledger.kv_pages[:1], strict=True):
            self._cache_config.labels(
                **self._labels,
                block_size=PAGE_TOKENS,
                num_gpu_blocks=pages,  # vLLM's name; these are pages of host memory
                enable_prefix_caching=prefix_caching,
                cache_dtype=spec.element.name.lower(),
            ).set(1)

    def engine_up(self, up: bool) -> None:
        self._up.set(up)
        if not up:
            self._deaths.inc()
            self._preemptions_seen = 0  # a new engine counts from zero
            self._running.set(0)
            self._waiting.set(0)
            self._kv_usage.set(0)

    def engine_report(self, report: EngineReport) -> None:
        """State and counters after a step."""
        self._running.set(report.running)
        self._waiting.set(report.waiting)
        self._kv_usage.set(max((pool.used / pool.total for pool in report.usage if pool.total), default=0.0))
        for group, pool in enumerate(report.usage):
            for state, count in (("free", pool.free), ("used", pool.used), ("cached", pool.cached)):
                self._pages.labels(**self._labels, group=group, state=state).set(count)
        if report.step is not None:
            self._step_tokens.observe(report.step.rows)
            phase = "prefill" if report.step.prompt_tokens else "decode"
            self._step_seconds.labels(**self._labels, phase=phase).observe(report.step.seconds)
        if report.preemptions > self._preemptions_seen:
            self._preemptions.inc(report.preemptions - self._preemptions_seen)
        self._preemptions_seen = report.preemptions

    # ---- requests --------------------------------------------------------------------------------------------------

    def request_arrived(self, prompt_tokens: int, params: SamplingParams) -> None:
        self._prompt_tokens.inc(prompt_tokens)
        self._request_prompt.observe(prompt_tokens)
        self._params_n.observe(params.n)
        if params.max_tokens is not None:
            self._params_max.observe(params.max_tokens)

    def first_token(self, seconds: float) -> None:
        """``seconds`` since the request's arrival."""
        self._generated.inc()
        self._first_token.observe(seconds)
        self.first_token_seconds.add(seconds)

    def next_token(self, seconds: float) -> None:
        """``seconds`` since the output's token before."""
        self._generated.inc()
        self._between_tokens.observe(seconds)
        self.between_tokens_seconds.add(seconds)

    def output_ended(self, reason: str, timings: Timings, prompt_tokens: int, tokens: int, first: bool) -> None:
        """An output is complete; ``first`` is the one that computed the prompt."""
        self._success[reason].inc()
        self._request_output.observe(tokens)
        self._end_to_end.observe(timings.finished - timings.arrival)
        self._request_preemptions.observe(timings.preemptions)
        if timings.started:
            self._queued.observe(max(timings.started - timings.arrival, 0.0))
            self._inference.observe(timings.finished - timings.started)
        if timings.first_token:
            self._prefill.observe(timings.first_token - timings.started)
            self._decode.observe(timings.finished - timings.first_token)
        if tokens > 1:
            self._per_token.observe((timings.finished - timings.first_token) / (tokens - 1))
        if first:
            self._prefix_queries.inc(prompt_tokens)
            self._prefix_hits.inc(timings.cached_tokens)
            self._cached_tokens.inc(timings.cached_tokens)
            self._computed.observe(prompt_tokens - timings.cached_tokens)

    def outputs_lost(self, reason: str, outputs: int) -> None:
        """Outputs that will not be complete; ``reason`` is one of FINISHED_REASONS."""
        self._success[reason].inc(outputs)

    def request_ended(self, longest_output: int) -> None:
        self._request_most.observe(longest_output)

    def rejected(self, reason: str) -> None:
        """``reason`` is one of REJECTIONS."""
        self._rejected[reason].inc()
        if reason == "queue_full":
            self._queue_full.inc()

    def cancelled(self, reason: str) -> None:
        """``reason`` is one of CANCELLATIONS."""
        self._cancelled[reason].inc()

    def http_request(self, method: str, handler: str, status: int, seconds: float) -> None:
        self._http.labels(method, handler, status).inc()
        self._http_seconds.labels(method, handler).observe(seconds)

    # ---- making them -----------------------------------------------------------------------------------------------

    def _gauge(self, name: str, help_text: str) -> Gauge:
        return Gauge(name, help_text, [*self._labels], registry=self.registry).labels(**self._labels)

    def _counter(self, name: str, help_text: str) -> Counter:
        return Counter(name, help_text, [*self._labels], registry=self.registry).labels(**self._labels)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(name, help_text, [*self._labels], buckets=buckets, registry=self.registry)
        return metric.labels(**self._labels)
