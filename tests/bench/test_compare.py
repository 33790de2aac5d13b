"""Engines in turn: what is measured, and that one engine's failure is a line of the report and not its end."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
import time
from dataclasses import replace

import pytest
from tiny_gguf import write_tiny_gguf
from typer.testing import CliRunner

from tokenmill.bench import compare as comparing
from tokenmill.bench import worker_process
from tokenmill.bench.compare import Workload, compare
from tokenmill.bench.peers import PEERS, Peer, environment_python, install, parse_peer, problem
from tokenmill.bench.roofline import Limits
from tokenmill.bench.spread import Spread, pair_ratios
from tokenmill.bench.work import model_work
from tokenmill.bench.worker_process import WORKERS, WorkerError, WorkerProcess
from tokenmill.cli import app
from tokenmill.errors import UsageError

# An engine that keeps a log of what it was asked, and takes the seconds that its name says.
FAKE = """
import os, sys, time
from .protocol import CannotError, Identity, Latency, Throughput, serve

class Fake:
    def __init__(self, task):
        self.task = task
        self.asked = 0
        print("noise on standard output")
        os.system("echo noise of a child")
        {opening}
        self.identity = Identity("{name}", "1.0", "build line", {{"threads": task.threads}})

    def log(self, what):
        with open(os.path.join(os.environ["FAKE_LOG"]), "a") as file:
            print("{name}", what, file=file)
        self.asked += 1
        {asking}

    def latency(self, prompt, output_tokens):
        self.log("latency")
        return Latency({seconds}, {seconds}, len(prompt), output_tokens - {missing})

    def throughput(self, prompts, output_tokens):
        self.log("throughput")
        return Throughput({seconds}, sum(map(len, prompts)), len(prompts) * output_tokens)

def main():
    serve(Fake)
"""


@pytest.fixture
def workers(tmp_path, monkeypatch):
    """Makes fake workers, Tokenmill's own place included; returns (maker, log file)."""
    folder, log = tmp_path / "workers", tmp_path / "log"
    folder.mkdir()
    log.touch()
    for name in ("__main__.py", "protocol.py"):
        shutil.copy(WORKERS / name, folder)
    monkeypatch.setattr(worker_process, "WORKERS", folder)
    monkeypatch.setattr(comparing.Limits, "now", lambda threads: Limits(1e10, 1e12))
    monkeypatch.setenv("FAKE_LOG", str(log))
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path / "cache"))

    def make(name, seconds=1.0, opening="pass", asking="pass", missing=0):
        source = FAKE.format(name=name, seconds=seconds, opening=opening, asking=asking, missing=missing)
        (folder / f"{name}.py").write_text(textwrap.dedent(source))
        return Peer(name, name, "json", (), ""), sys.executable

    make("tokenmill", seconds=0.5)
    return make, log


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", "llama", ("Q8_0",), 2)


SMALL = Workload("latency", 1, 8, 4)


def test_engines_run_in_turn_and_ratios_are_taken_within_a_round(workers, model):
    make, log = workers
    result = compare(model, [make("slow", 1.0), make("slower", 2.0)], SMALL, rounds=2, threads=1)
    assert log.read_text().split("\n")[:-1] == [f"{n} latency" for n in ("tokenmill", "slow", "slower")] * 3
    ours, slow, slower = result.engines
    assert ours.metrics["prefill"].rate.median == pytest.approx(8 / 0.5)
    assert ours.metrics["decode"].rate.median == pytest.approx(3 / 0.5)
    assert slow.metrics["decode"].ratio.samples == pytest.approx((2.0, 2.0))
    assert slower.metrics["prefill"].ratio.median == pytest.approx(4.0)
    assert ours.metrics["decode"].ratio is None
    least = model_work(model).prefill_seconds(8, Limits(1e10, 1e12))
    assert slow.metrics["prefill"].shares == pytest.approx([least, least])
    assert slow.settings == {"threads": 1}
    assert slow.build == "build line"


def test_throughput_counts_the_tokens_of_all_requests(workers, model):
    make, _ = workers
    result = compare(model, [make("peer", 2.0)], Workload("throughput", 3, 8, 4), rounds=1, threads=1)
    assert result.engines[1].metrics["output"].rate.median == pytest.approx(3 * 4 / 2.0)
    assert result.engines[1].metrics["output"].ratio.median == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ({"opening": "raise CannotError('reads no such file')"}, "reads no such file"),
        ({"opening": "sys.exit(3)"}, "exit code 3"),
        ({"asking": "os.abort()"}, "SIGABRT"),
        ({"asking": "sys.stderr.write('kernel missing'); sys.stderr.flush(); os._exit(9)"}, "kernel missing"),
        ({"asking": "time.sleep(1000)"}, "did not answer within 3 s"),
        ({"missing": 1}, "3 out, asked for 8 and 4"),
        ({"asking": "if self.asked == 3: raise RuntimeError('late')"}, "RuntimeError: late"),
    ],
)
def test_one_engine_fails_and_the_others_go_on(workers, model, fault, expected):
    make, _ = workers
    peers = [make("broken", **fault), make("sound", 1.0)]
    result = compare(model, peers, SMALL, rounds=2, threads=1, timeout=3)
    ours, broken, sound = result.engines
    assert expected in broken.error
    assert len(ours.metrics["decode"].rate.samples) == 2
    assert sound.metrics["decode"].ratio.median == pytest.approx(2.0)
    if "late" in expected:  # what came before the failure still counts
        assert broken.metrics["decode"].ratio.samples == pytest.approx((2.0,))
    else:
        assert "decode" not in broken.metrics or broken.metrics["decode"].ratio is None


def test_a_missing_environment_and_a_missing_module_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path))
    peer, python = parse_peer("llama.cpp")
    assert python == str(environment_python("llama.cpp"))
    assert "bench peers install llama.cpp" in problem(peer, python)
    assert "has no module nowhere" in problem(Peer("x", "x", "nowhere", (), ""), sys.executable)
    assert problem(Peer("x", "x", "json", (), ""), sys.executable) is None


def test_unknown_peers_are_refused():
    with pytest.raises(UsageError, match=r"'llama' is no known peer; known are llama\.cpp"):
        parse_peer("llama")
    assert parse_peer("vllm=/opt/python")[1] == "/opt/python"


def test_every_peer_has_a_worker():
    assert all((WORKERS / f"{peer.worker}.py").exists() for peer in PEERS.values())


def test_an_environment_can_be_made(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    python = install(Peer("empty", "empty", "pip", ("pip",), ""), lambda _: None)
    assert python == environment_python("empty")
    assert problem(Peer("empty", "empty", "pip", (), ""), str(python)) is None


def process_state(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def test_an_idle_worker_is_stopped(workers):
    make, _ = workers
    make("idle")
    worker = WorkerProcess("idle", sys.executable)
    try:
        worker.ask({"do": "open", "model": "", "threads": 1, "context": 1, "sequences": 1, "scratch": ""}, 30)
        deadline = time.monotonic() + 20
        while process_state(worker._process.pid) != "T":
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        worker.close()


def test_a_python_that_does_not_exist_is_reported():
    with pytest.raises(WorkerError, match="cannot be started"):
        WorkerProcess("tokenmill", "/nowhere/python")


def test_ratios_skip_rounds_that_one_side_failed():
    ratio = pair_ratios([4.0, 6.0, None], [2.0, None, 1.0])
    assert ratio is not None
    assert ratio.samples == (2.0,)
    assert pair_ratios([None], [1.0]) is None
    assert Spread.of([3.0, 1.0, 2.0]).median == 2.0


def test_the_verb_prints_and_writes_what_happened(workers, smollm2_path, tmp_path, monkeypatch):
    make, _ = workers
    fake, _ = make("llama_cpp", 1.0)
    monkeypatch.setitem(PEERS, "llama.cpp", replace(PEERS["llama.cpp"], module=fake.module))
    report = tmp_path / "report.json"
    arguments = ["bench", "compare", str(smollm2_path), "--peer", f"llama.cpp={sys.executable}"]
    arguments += ["--peer", "vllm=/nowhere/python", "--workload", "latency", "--rounds", "1", "--json", str(report)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "vllm FAILED: /nowhere/python cannot be started" in result.output
    record = json.loads(report.read_text())
    assert record["kind"] == "compare"
    assert {"model_sha256", "tokenmill", "python", "machine", "command", "date"} <= record.keys()
    names = [engine["name"] for engine in record["comparisons"][0]["engines"]]
    assert names == ["tokenmill", "llama.cpp", "vllm"]
