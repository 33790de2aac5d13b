"""Metrics: the names are an interface, and the numbers add up."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from served_model import RunningServer

GOLDEN = Path(__file__).parent / "golden_metrics.txt"
PROCESS = re.compile(r"(process|python)_")


def names(text: str) -> list[str]:
    """``type name{labels}`` of every family but those of the Python process."""
    found = set()
    for family in text_string_to_metric_families(text):
        if PROCESS.match(family.name):
            continue
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        if family.name.endswith("_created"):
            continue
        found.add(f"{family.type} {family.name}{{{','.join(labels)}}}")
    return sorted(found)


def test_names_types_and_labels_are_the_golden_ones(server: RunningServer) -> None:
    server.complete(max_tokens=3)
    assert names(server.get("/metrics").text) == GOLDEN.read_text().splitlines()


def test_vllm_buckets(server: RunningServer) -> None:
    text = server.get("/metrics").text
    first = re.findall(r'vllm:time_to_first_token_seconds_bucket{[^}]*le="([^"]+)"', text)
    assert (first[0], first[-2], len(first)) == ("0.001", "2560.0", 23)
    between = re.findall(r'vllm:inter_token_latency_seconds_bucket{[^}]*le="([^"]+)"', text)
    assert (between[0], between[-2], len(between)) == ("0.01", "80.0", 20)
    end = re.findall(r'vllm:e2e_request_latency_seconds_bucket{[^}]*le="([^"]+)"', text)
    assert (end[0], end[-2], len(end)) == ("0.3", "7680.0", 22)


def test_counts_match_the_requests(server: RunningServer) -> None:
    watched = {
        "vllm:prompt_tokens_total": 5.0 + 5,
        "vllm:generation_tokens_total": 3.0 * 7 + 4,
        "vllm:time_to_first_token_seconds_count": 4.0,
        "vllm:inter_token_latency_seconds_count": 3.0 * 6 + 3,
        "vllm:e2e_request_latency_seconds_count": 4.0,
        "vllm:request_queue_time_seconds_count": 4.0,
        "vllm:request_prefill_time_seconds_count": 4.0,
        "vllm:request_generation_tokens_sum": 3.0 * 7 + 4,
        "vllm:request_max_num_generation_tokens_sum": 7.0 + 4,
        "vllm:request_params_n_sum": 4.0,
        "vllm:prefix_cache_queries_total": 10.0,
    }
    before = {name: server.metric(name) for name in watched}
    ends = server.metric("vllm:request_success_total", finished_reason="length")
    http = server.metric("http_requests_total", handler="/v1/completions", status="200")
    server.complete("hello", n=3, temperature=1, max_tokens=7)
    server.complete("world", max_tokens=4)
    assert {name: server.metric(name) - before[name] for name in watched} == watched
    assert server.metric("vllm:request_success_total", finished_reason="length") - ends == 4
    assert server.metric("http_requests_total", handler="/v1/completions", status="200") - http == 2
    assert server.metric("vllm:iteration_tokens_total_sum") > 0
    assert server.metric("tokenmill:step_seconds_count", phase="decode") > 0
    assert server.metric("tokenmill:step_seconds_count", phase="prefill") > 0


def test_gauges_show_memory_and_pages(server: RunningServer) -> None:
    assert server.metric("tokenmill:memory_bytes", kind="kv") > 0
    assert server.metric("tokenmill:memory_bytes", kind="budget") == 600_000_000
    assert server.metric("tokenmill:engine_up") == 1
    pages = [server.metric("tokenmill:kv_pages", state=state) for state in ("free", "used", "cached")]
    assert sum(pages) == server.metric("tokenmill:kv_pages")
    assert server.metric("vllm:kv_cache_usage_perc") == 0
