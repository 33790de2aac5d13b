"""Bytes and operations of a forward pass, counted by hand for a tiny model."""

import json

import pytest
from tiny_gguf import VOCABULARY, write_tiny_gguf
from typer.testing import CliRunner

from tokenmill.bench.roofline import Limits
from tokenmill.bench.work import ModelWork, model_work
from tokenmill.cli import app
from tokenmill.program.kv import KvElement, KvGroupSpec

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 256, 512, 4, 2, 64, 2
BODY = LAYERS * (HIDDEN * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS) + 3 * HIDDEN * INNER)


def test_work_of_a_tiny_model(tmp_path):
    work = model_work(write_tiny_gguf(tmp_path / "tiny.gguf", "llama", ("Q8_0",), LAYERS))
    assert work.body_parameters == BODY
    assert work.weight_bytes == (BODY + VOCABULARY * HIDDEN) * 34 // 32  # the tied head is read, looked-up rows are not
    assert work.kv_bytes(100) == 2 * LAYERS * KV_HEADS * HEAD_DIM * 2 * 100
    assert work.head_parameters == VOCABULARY * HIDDEN
    wide = model_work(tmp_path / "tiny.gguf", KvElement.F32)
    assert wide.kv_bytes(100) == 2 * work.kv_bytes(100)


def test_a_window_bounds_the_keys_that_are_read(tmp_path):
    work = model_work(write_tiny_gguf(tmp_path / "tiny.gguf", "gemma3", ("Q8_0",), 6))
    one_layer = 2 * KV_HEADS * HEAD_DIM * 2
    assert work.kv_bytes(1000) == one_layer * (5 * 48 + 1000)


def test_the_least_time_is_the_longer_of_moving_and_computing():
    group = KvGroupSpec(1, 1, 64)
    work = ModelWork(weight_bytes=1000, body_parameters=600, head_parameters=400, kv_groups=(group,), vocab_size=10)
    slow_memory, slow_products = Limits(memory=100.0, int8=1e12), Limits(memory=1e12, int8=100.0)
    assert work.prefill_seconds(5, slow_memory) == pytest.approx(10.0)
    assert work.prefill_seconds(5, slow_products) == pytest.approx(2 * 600 * 5 / 100)
    assert work.decode_seconds(3, 32, slow_memory) == pytest.approx((1000 + 3 * work.kv_bytes(32)) / 100)
    assert work.decode_seconds(3, 32, slow_products) == pytest.approx(2 * 1000 * 3 / 100)
    whole = work.prefill_seconds(30, slow_products) + 7 * work.decode_seconds(3, 14, slow_products)
    assert work.request_seconds(3, 10, 8, slow_products) == pytest.approx(whole)
    assert Limits(1.0, 5.0).best(Limits(2.0, 3.0)) == Limits(2.0, 5.0)


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        (
            ["latency", "--prompt-tokens", "20", "--output-tokens", "4", "--rounds", "1"],
            {
                "prefill_tokens_per_second",
                "decode_tokens_per_second",
                "prefill_share_of_limit",
                "decode_share_of_limit",
            },
        ),
        (
            ["throughput", "--requests", "3", "--input-tokens", "9", "--output-tokens", "4", "--rounds", "1"],
            {"output_tokens_per_second", "total_tokens_per_second", "share_of_limit"},
        ),
    ],
)
def test_reports_carry_positive_figures_and_how_to_repeat_them(smollm2_path, tmp_path, arguments, fields):
    report = tmp_path / "report.json"
    result = CliRunner().invoke(app, ["bench", arguments[0], str(smollm2_path), *arguments[1:], "--json", str(report)])
    assert result.exit_code == 0, result.output
    record = json.loads(report.read_text())
    assert all(record[field]["median"] > 0 for field in fields)
    assert {"tokenmill", "python", "machine", "command", "isa", "threads"} <= record.keys()
