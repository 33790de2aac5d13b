"""Speed at a depth is measured with the tokens before it in the cache, and starts from an empty process."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

from tokenmill import LLM
from tokenmill.bench.peers import Peer
from tokenmill.bench.startup import measure_startup
from tokenmill.bench.sweep import sweep_latency
from tokenmill.cli import app
from tokenmill.errors import UsageError


def test_each_combination_is_measured_once(smollm2_path, tmp_path, monkeypatch):
    monkeypatch.setattr("tokenmill.bench.roofline.MEMORY_WORKING_SET", 1 << 20)
    report, picture = tmp_path / "sweep.json", tmp_path / "sweep.svg"
    arguments = ["bench", "latency", str(smollm2_path), "--prompt-tokens", "3,9", "--depth", "0,32", "--batch", "1,2"]
    more = ["--output-tokens", "3", "--rounds", "1", "--threads", "1", "--json", str(report), "--plot", str(picture)]
    pytest.importorskip("matplotlib")
    result = CliRunner().invoke(app, [*arguments, *more])
    assert result.exit_code == 0, result.output
    record = json.loads(report.read_text())
    points = [(p["phase"], p["tokens"], p["depth"], p["batch"]) for p in record["points"]]
    prefill = [("prefill", tokens, depth, 1) for depth in (0, 32) for tokens in (3, 9)]
    assert points == prefill + [("decode", 3, depth, batch) for depth in (0, 32) for batch in (1, 2)]
    assert all(p["tokens_per_second"]["median"] > 0 and p["share_of_limit"]["median"] > 0 for p in record["points"])
    assert picture.read_text().startswith("<?xml")


def test_a_depth_that_is_not_cached_is_an_error(smollm2_path):
    with LLM(smollm2_path, max_model_len=128, threads=1, enable_prefix_caching=False) as llm:
        points = sweep_latency(llm, prompt_tokens=[4], depths=[32], batches=[1], output_tokens=2, rounds=1)
        with pytest.raises(UsageError, match="0 of 32 tokens"):
            list(points)
        with pytest.raises(UsageError, match="multiple of 32"):
            list(sweep_latency(llm, prompt_tokens=[4], depths=[33], batches=[1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-tokens", "many"], "--prompt-tokens is 'many'"),
        (["--batch", "0"], "each must be at least 1"),
        (["--plot", "picture.svg"], "give several --depth"),
        (["--depth", "0", "--plot", "picture.gif"], "ends in .png, .svg, .html"),
    ],
)
def test_senseless_options_are_refused(smollm2_path, arguments, message):
    result = CliRunner().invoke(app, ["bench", "latency", str(smollm2_path), *arguments])
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)


def test_a_start_is_a_process_and_a_peer_that_cannot_is_reported(smollm2_path):
    broken = Peer("broken", "nothing_of_that_name", "json", (), "")
    report = measure_startup(smollm2_path, [(broken, sys.executable)], rounds=1, threads=1, context=64)
    ours, other = report.engines
    assert report.first.seconds > 0
    assert report.first.peak_bytes > report.model_bytes
    assert ours.seconds is not None
    assert other.seconds is None
    assert "nothing_of_that_name" in (other.error or "")
