"""Load on a server that this test runs: counts equal the server's own, and what goes wrong is told apart."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import pytest
from typer.testing import CliRunner

from tokenmill.bench.load import (
    LoadRequest,
    Quantiles,
    TraceError,
    poisson_arrivals,
    random_requests,
    read_trace,
    run_load,
    text_requests,
)
from tokenmill.cli import app
from tokenmill.errors import UsageError

pytest.importorskip("httpx")


class Handler(BaseHTTPRequestHandler):
    """Streams ``max_tokens`` tokens; the first prompt id, or the text, chooses a fault."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body.get("prompt") or body["messages"][0]["content"]
        fault = prompt if isinstance(prompt, str) else prompt[0]
        with server.lock:
            server.requests += 1
            server.running += 1
            server.most_running = max(server.most_running, server.running)
            server.bodies.append((self.path, body))
        try:
            if fault == 1:
                self.answer(503, b'{"error": "overloaded"}')
                return
            if not body.get("stream"):
                usage = {"completion_tokens": body["max_tokens"], "prompt_tokens": len(prompt)}
                self.answer(200, json.dumps({"choices": [], "usage": usage} if fault != 4 else {}).encode())
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            for number in range(body["max_tokens"]):
                time.sleep(0.002)
                if fault == 2 and number == 1:
                    return  # the connection closes in the middle
                if fault == 3 and number == 1:
                    self.event({"error": {"message": "out of memory"}})
                    return
                delta = {"delta": {"content": "x"}} if "messages" in body else {"text": "x"}
                self.event({"choices": [{"index": 0, **delta}]})
                with server.lock:
                    server.tokens += 1
            size = len(prompt)
            self.event({"choices": [], "usage": {"completion_tokens": body["max_tokens"], "prompt_tokens": size}})
            self.wfile.write(b"data: [DONE]\n\n")
        finally:
            with server.lock:
                server.running -= 1

    def answer(self, status, content):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def event(self, value):
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.lock, made.bodies = threading.Lock(), []
    made.requests = made.running = made.most_running = made.tokens = 0
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    made.url = f"http://127.0.0.1:{made.server_address[1]}"
    yield made
    made.shutdown()
    made.server_close()


def ids(first, tokens=4):
    return LoadRequest((first, 9, 9), tokens)


def test_a_closed_loop_keeps_its_users_busy_and_counts_what_the_server_counts(server):
    report = run_load(server.url, "m", random_requests(12, 5, 6, 1000), users=3)
    assert (report.requests, report.failed, server.requests) == (12, 0, 12)
    assert report.output_tokens == server.tokens == 72
    assert report.prompt_tokens == 60
    assert 1 < server.most_running <= 3
    assert report.output_tokens_per_second == pytest.approx(72 / report.seconds)
    for exchange in report.exchanges:
        assert 0 < exchange.ttft <= exchange.last
        assert exchange.itl == pytest.approx((exchange.last - exchange.ttft) / 5)
    path, body = server.bodies[0]
    assert path == "/v1/completions"
    assert body["stream"] is True
    assert body["ignore_eos"] is True


def test_each_failure_is_told_apart_and_the_run_goes_on(server):
    report = run_load(server.url, "m", [ids(9), ids(1), ids(2), ids(3), ids(9)], users=2)
    assert (report.requests, report.failed) == (5, 3)
    assert report.output_tokens == 8
    assert len(report.errors) == 3
    joined = " ".join(report.errors)
    assert "HTTP 503" in joined
    assert "overloaded" in joined
    assert "out of memory" in joined
    assert "the stream broke off" in joined or "RemoteProtocolError" in joined


def test_answers_may_come_whole(server):
    report = run_load(server.url, "m", [ids(9), ids(4), ids(9)], users=1, stream=False)
    assert (report.requests, report.failed, report.output_tokens, report.prompt_tokens) == (3, 1, 8, 6)
    assert list(report.errors) == ["KeyError: 'usage'"]
    assert report.ttft_seconds is None
    assert report.request_seconds.p50 > 0
    assert report.client_cpu_seconds > 0


def test_a_server_that_dies_fails_the_rest_and_no_more():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    server.server_close()
    report = run_load(url, "m", [ids(9)] * 3, users=1)
    assert report.failed == 3
    assert "ConnectError" in next(iter(report.errors))
    assert report.ttft_seconds is None
    assert report.goodput_requests_per_second == 0


def test_requests_come_when_they_are_due(server):
    due = [LoadRequest((9,), 2, at) for at in (0.0, 0.1, 0.2)]
    report = run_load(server.url, "m", due)
    sent = sorted(exchange.sent for exchange in report.exchanges)
    assert sent[1] >= 0.1
    assert sent[2] >= 0.2
    with pytest.raises(UsageError, match="no arrival"):
        run_load(server.url, "m", [ids(9)])


def test_poisson_arrivals_have_the_asked_rate():
    arrivals = [request.arrival for request in poisson_arrivals([ids(9)] * 4000, 5.0, seed=3)]
    assert arrivals == sorted(arrivals)
    assert 4000 / arrivals[-1] == pytest.approx(5.0, rel=0.05)
    gaps = [b - a for a, b in pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.15)  # exponential


def test_goodput_counts_requests_within_both_bounds(server):
    requests = random_requests(4, 5, 4, 1000)
    every = run_load(server.url, "m", requests, users=1, ttft_bound=60, itl_bound=60)
    none = run_load(server.url, "m", requests, users=1, ttft_bound=0.0, itl_bound=60)
    assert every.goodput_requests_per_second == every.requests_per_second > 0
    assert none.goodput_requests_per_second == 0 < none.requests_per_second


def test_quantiles_are_values_that_occurred():
    quantiles = Quantiles.of([float(i) for i in range(1, 101)])
    assert quantiles == Quantiles(50.5, 50.0, 90.0, 99.0)
    assert Quantiles.of([2.0]) == Quantiles(2.0, 2.0, 2.0, 2.0)


def test_traces_are_replayed_with_messages_and_arrivals(server, tmp_path):
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "arrival": 0.05},
        {"prompt": "text", "max_tokens": 3, "arrival": 0.0},
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    report, picture = tmp_path / "report.json", tmp_path / "load.svg"
    pytest.importorskip("matplotlib")
    arguments = ["bench", "serve", server.url, "--model", "m", "--trace", str(trace), "--json", str(report)]
    result = CliRunner().invoke(app, [*arguments, "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    record = json.loads(report.read_text())
    assert record["load_unit"] == "trace"
    assert record["runs"][0]["output_tokens"] == server.tokens == 5
    assert [path for path, _ in server.bodies] == ["/v1/completions", "/v1/chat/completions"]
    assert picture.exists()


def test_a_sweep_is_one_run_for_each_load(server, tmp_path):
    report = tmp_path / "report.json"
    arguments = ["bench", "serve", server.url, "--model", "m", "--concurrency", "1,2", "--requests", "4"]
    result = CliRunner().invoke(app, [*arguments, "--output-tokens", "2", "--ttft", "60000", "--json", str(report)])
    assert result.exit_code == 0, result.output
    runs = json.loads(report.read_text())["runs"]
    assert [run["load"] for run in runs] == [1.0, 2.0]
    assert [(run["output_tokens"], run["asked_tokens"]) for run in runs] == [(8, 8), (8, 8)]
    prompts = [tuple(body["prompt"]) for _, body in server.bodies]
    assert len(set(prompts)) == len(prompts) == 8, "a later run would find an earlier one's prompts cached"
    result = CliRunner().invoke(
        app, ["bench", "serve", server.url, "--model", "m", "--rate", "50,100", "--requests", "4"]
    )
    assert "requests per second" in result.output


def test_senseless_loads_are_refused(tmp_path):
    for arguments, message in (
        (["--rate", "1", "--concurrency", "1"], "give one"),
        (["--rate", "0"], "--rate is '0'"),
        (["--trace", str(tmp_path / "none")], "cannot be read"),
    ):
        result = CliRunner().invoke(app, ["bench", "serve", "http://127.0.0.1:1", "--model", "m", *arguments])
        assert message in str(result.exception)
    (tmp_path / "trace").write_text('{"prompt": "x"}\n')
    with pytest.raises(TraceError, match="line 1: KeyError: 'max_tokens'"):
        read_trace(tmp_path / "trace")


def test_prompts_cut_from_a_text_are_its_own_words():
    text = "".join(chr(97 + i % 26) for i in range(500))
    assert all(request.prompt in text and len(request.prompt) == 40 for request in text_requests(5, text, 40, 8))
