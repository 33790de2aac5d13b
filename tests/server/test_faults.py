"""What clients, operators and machines do to a server: it gives every page back, says what happened, and goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from served_model import SMALL, RunningServer, command, serving
from tiny_gguf import write_poisoned_model

LONG = {"prompt": "the rain", "max_tokens": 2000, "temperature": 0, "ignore_eos": True}


def raw_request(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = ["POST /v1/completions HTTP/1.1", "host: x", "content-type: application/json", "connection: close"]
    return "\r\n".join([*head, f"content-length: {len(data)}", "", ""]).encode() + data


@contextlib.contextmanager
def sent(server: RunningServer, body: dict[str, Any], receive_buffer: int = 0) -> Iterator[socket.socket]:
    """A connection on which a completion was asked for, and nothing read yet."""
    with socket.socket() as connection:
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(120)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(raw_request(body))
        yield connection


def read_all(connection: socket.socket) -> bytes:
    data = b""
    while block := connection.recv(1 << 20):
        data += block
    return data


def text_of(server: RunningServer, **parameters: Any) -> str:
    answer = server.post("/v1/completions", {"temperature": 0, "ignore_eos": True, **parameters})
    text: str = answer.json()["choices"][0]["text"]
    return text


def cancelled(server: RunningServer) -> float:
    return server.metric("tokenmill:requests_cancelled_total", reason="client_gone")


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_vanishes_in_decode_is_gone_at_once(server: RunningServer, streamed: bool) -> None:
    neighbour: dict[str, Any] = {"prompt": "a neighbour", "max_tokens": 300, "temperature": 1, "seed": 4}
    expected = text_of(server, **neighbour)
    before, gone = server.metric("vllm:generation_tokens_total"), cancelled(server)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(text_of, server, **neighbour)
        with sent(server, {**LONG, "n": 4, "temperature": 1, "stream": streamed}):
            # 300 are the neighbour's at most.
            server.until(lambda: server.metric("vllm:generation_tokens_total") > before + 320, "tokens")
        server.until_idle()
        assert answer.result() == expected
    assert cancelled(server) == gone + 1
    assert server.metric("vllm:generation_tokens_total") - before < 300 + 4 * 1900


def test_a_client_that_vanishes_in_prefill_is_gone_at_once(tiny_model: Path) -> None:
    with serving(tiny_model, *SMALL, "--max-batch-tokens", "16", "--no-prefix-caching") as server:
        prompts = [[number, *range(1, 200)] * 10 for number in range(8)]  # 16,000 tokens, 1,000 steps
        with sent(server, {"prompt": prompts, "max_tokens": 1}):
            server.until(lambda: server.metric("vllm:num_requests_running") > 0, "the prefill has begun")
        server.until_idle()
        assert cancelled(server) == 1
        assert server.metric("vllm:generation_tokens_total") < 8
        assert server.metric("vllm:iteration_tokens_total_sum") < 16_000


def test_a_slow_reader_holds_up_nobody_and_gets_everything(server: RunningServer) -> None:
    body = {**LONG, "stream": True, "logprobs": 20}
    with sent(server, body, receive_buffer=4096) as connection:
        server.until(lambda: server.metric("vllm:num_requests_running") > 0, "it runs")
        assert server.complete("meanwhile").status_code == 200
        server.until_idle()  # the engine is done with it, long before it is read
        data = read_all(connection)
    assert data.rstrip().endswith(b"0")  # the last chunk
    assert b"data: [DONE]" in data
    assert data.count(b'"text":') <= 2001
    assert b'"finish_reason":"length"' in data


def test_a_request_can_be_stopped_by_its_id(server: RunningServer) -> None:
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(server.post, "/v1/completions", LONG, headers={"x-request-id": "stop-me"})
        server.until(lambda: any(s["id_task"] == "stop-me" for s in server.get("/slots").json()), "it runs")
        assert server.post("/abort_requests", {"request_ids": ["cmpl-stop-me", "unknown"]}).json() == {"aborted": 1}
        assert answer.result().status_code == 409
    assert server.post("/abort_requests", {"request_ids": ["cmpl-stop-me"]}).json() == {"aborted": 0}


def test_five_hundred_clients_share_the_places(tiny_model: Path) -> None:
    with serving(tiny_model, *SMALL, "--max-num-seqs", "32") as server:
        _ask_five_hundred_times(server)
        server.until_idle()


def _ask_five_hundred_times(server: RunningServer) -> None:
    expected = [text_of(server, prompt=f"client {number}", max_tokens=4) for number in range(20)]

    async def ask(number: int) -> tuple[int, str]:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        body = {"prompt": f"client {number % 20}", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        writer.write(raw_request(body))
        answer = await reader.read()
        writer.close()
        head, _, rest = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(rest)["choices"][0]["text"]

    async def ask_all() -> list[tuple[int, str]]:
        return await asyncio.gather(*(ask(number) for number in range(500)))

    assert asyncio.run(ask_all()) == [(200, text) for text in expected] * 25


def test_a_full_queue_is_a_503_with_a_time_to_come_back(tiny_model: Path) -> None:
    with serving(tiny_model, *SMALL, "--max-queued-requests", "2") as server:
        never = server.complete(n=11)
        assert never.status_code == 400
        assert never.json()["error"]["param"] == "n"
        assert "at most 10 outputs" in never.json()["error"]["message"]
        with sent(server, {**LONG, "n": 10, "temperature": 1}):
            server.until(lambda: len(server.get("/slots").json()) == 1, "it runs")
            refused = server.complete()
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "overloaded"
            assert server.get("/health").status_code == 200
        server.until_idle()
        assert server.complete().status_code == 200
        assert server.metric("vllm:admission_rejections_total") == 1


def test_a_list_of_any_length_takes_few_places(tiny_model: Path) -> None:
    prompts = [f"client {number}" for number in range(60)]
    with serving(tiny_model, *SMALL, "--max-queued-requests", "4") as server, ThreadPoolExecutor() as pool:
        expected = [text_of(server, prompt=prompt, max_tokens=20) for prompt in prompts]
        vectors = [server.post("/v1/embeddings", {"input": prompt}).json()["data"][0] for prompt in prompts]
        embedded = server.post("/v1/embeddings", {"input": prompts}).json()["data"]
        assert [each["embedding"] for each in embedded] == [each["embedding"] for each in vectors]
        body = {"prompt": prompts, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
        whole = pool.submit(server.post, "/v1/completions", {**body, "n": 2})
        server.until(lambda: len(server.get("/slots").json()) == 1, "it runs")
        most = 0.0
        while not whole.done():
            load = [server.metric(f"vllm:num_requests_{state}") for state in ("running", "waiting")]
            most = max(most, sum(load))
        assert most <= 12
        texts = [choice["text"] for choice in whole.result().json()["choices"]]
        assert texts == [text for text in expected for _ in range(2)]
        assert [choice["text"] for choice in server.post("/v1/completions", body).json()["choices"]] == expected
        with sent(server, {**body, "max_tokens": 1000}):  # a client that leaves takes what has not begun with it
            server.until(lambda: server.metric("vllm:num_requests_running") > 0, "it runs")
        server.until_idle()
        assert server.metric("vllm:admission_rejections_total") == 0


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGSEGV], ids=lambda death: death.name)
def test_an_engine_that_dies_in_mid_step(tiny_model: Path, death: signal.Signals) -> None:
    with serving(tiny_model, *SMALL) as server, ThreadPoolExecutor() as pool:
        expected = text_of(server, prompt="again", max_tokens=8)
        whole = pool.submit(server.post, "/v1/completions", {**LONG, "n": 3, "temperature": 1})
        with sent(server, {**LONG, "stream": True}) as connection:
            first = connection.recv(1000)
            engine = server.engine_pid()
            os.kill(engine, signal.SIGSTOP)  # holds the engine where it is, so that both requests are in flight
            os.kill(engine, death)
            os.kill(engine, signal.SIGCONT)
            data = first + read_all(connection)
        assert data.startswith(b"HTTP/1.1 200")
        assert (
            b'data: {"error":{"message":"the request was lost: the engine process was ended by ' + death.name.encode()
            in data
        )
        assert b"[DONE]" in data
        answer = whole.result()
        assert answer.status_code == 500
        assert death.name in answer.json()["error"]["message"]
        server.until(lambda: server.get("/health").status_code == 200, "the engine is back")
        assert server.engine_pid() != engine
        assert text_of(server, prompt="again", max_tokens=8) == expected
        assert server.metric("tokenmill:engine_deaths_total") == 1
        assert server.metric("vllm:request_success_total", finished_reason="error") == 4
        server.until_idle()


def test_an_engine_that_hangs_fails_what_runs_and_is_started_again(tiny_model: Path) -> None:
    with serving(tiny_model, *SMALL, "--watchdog-timeout", "2") as server, ThreadPoolExecutor() as pool:
        expected = text_of(server, prompt="again", max_tokens=8)
        with sent(server, {**LONG, "stream": True}) as connection:
            first = connection.recv(1000)
            engine = server.engine_pid()
            os.kill(engine, signal.SIGSTOP)
            whole = pool.submit(server.post, "/v1/completions", LONG)  # the engine never hears of it
            server.until(lambda: server.get("/health").status_code == 503, "health says so")
            data = first + read_all(connection)
        assert data.startswith(b"HTTP/1.1 200")
        assert b'data: {"error":{"message":"the request was lost: the engine hung' in data
        assert b"[DONE]" in data
        answer = whole.result()
        assert answer.status_code in (500, 503)
        assert "the engine hung: no step and no answer for 2 s" in answer.json()["error"]["message"]
        server.until(lambda: server.get("/health").status_code == 200, "the engine is back")
        assert not Path(f"/proc/{engine}").exists()
        assert text_of(server, prompt="again", max_tokens=8) == expected
        os.kill(server.engine_pid(), signal.SIGSTOP)  # while it has nothing to do
        server.until(lambda: server.metric("tokenmill:engine_deaths_total") == 2, "it is missed without a request")
        server.until(lambda: server.get("/health").status_code == 200, "the engine is back again")
        assert text_of(server, prompt="again", max_tokens=8) == expected


def test_an_engine_that_is_slow_but_gets_on_is_left_alone(tiny_model: Path) -> None:
    with serving(tiny_model, *SMALL, "--watchdog-timeout", "4") as server, sent(server, LONG) as connection:
        server.until(lambda: server.metric("vllm:num_requests_running") == 1, "it runs")
        engine = server.engine_pid()
        for _ in range(14):  # seven seconds without a step, but never four in a row
            os.kill(engine, signal.SIGSTOP)
            time.sleep(0.5)
            os.kill(engine, signal.SIGCONT)
            time.sleep(0.05)
        data = read_all(connection)
        assert data.startswith(b"HTTP/1.1 200")
        assert b'"finish_reason":"length"' in data
        assert server.engine_pid() == engine
        assert server.metric("tokenmill:engine_deaths_total") == 0


def test_health_is_503_while_there_is_no_engine(tiny_model: Path, tmp_path: Path) -> None:
    original = tiny_model.read_bytes()
    own_model = tmp_path / "own.gguf"
    own_model.write_bytes(original)
    with serving(own_model, *SMALL) as server:
        try:
            own_model.write_bytes(original[:1000])  # what a restart finds is broken
            os.kill(server.engine_pid(), signal.SIGKILL)
            server.until(lambda: server.get("/health").status_code == 503, "health says so")
            refused = server.complete()
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
            server.until(lambda: "own.gguf" in server.get("/health").json()["error"]["message"], "the reason")
            assert server.get("/ready").status_code == 503
            assert server.metric("tokenmill:engine_up") == 0
        finally:
            own_model.write_bytes(original)
        server.until(lambda: server.get("/ready").status_code == 200, "it is well again")
        assert server.complete().status_code == 200


def test_sigterm_lets_running_requests_finish(tiny_model: Path) -> None:
    with serving(tiny_model, *SMALL) as server:
        expected = text_of(server, **{**LONG, "max_tokens": 1000})
        with sent(server, {**LONG, "max_tokens": 1000, "stream": True}) as connection:
            first = connection.recv(1000)
            server.process.send_signal(signal.SIGTERM)
            data = first + read_all(connection)
        events = [line for line in data.decode().splitlines() if line.startswith("data: {")]
        assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in events) == expected
        assert server.process.wait(60) == 0
        with pytest.raises(httpx.ConnectError):
            server.get("/health")
    assert not any("leaked" in line for line in server.log)  # native objects that the interpreter's end has missed


def test_sigterm_under_load_finishes_what_runs_and_what_waits(tiny_model: Path) -> None:
    prompts = [f"client {number}" for number in range(24)]
    with serving(tiny_model, *SMALL) as server, contextlib.ExitStack() as opened:
        expected = [text_of(server, prompt=prompt, max_tokens=200) for prompt in prompts]
        body = {"max_tokens": 200, "temperature": 0, "ignore_eos": True}
        connections = [opened.enter_context(sent(server, {**body, "prompt": prompt})) for prompt in prompts]
        server.until(lambda: server.metric("vllm:request_prompt_tokens_count") == 48, "all have arrived")
        server.process.send_signal(signal.SIGTERM)
        answers = [read_all(connection).partition(b"\r\n\r\n") for connection in connections]
        assert [json.loads(data)["choices"][0]["text"] for _, _, data in answers] == expected
        assert server.process.wait(60) == 0


def test_sigterm_waits_no_longer_than_it_may(tiny_model: Path) -> None:
    with serving(tiny_model, *SMALL, "--shutdown-timeout", "0.2", "--max-batch-tokens", "8") as server:
        prompts = [[number, *range(1, 200)] * 10 for number in range(8)]  # 2,000 steps of prefill before anything
        with sent(server, {"prompt": prompts, "max_tokens": 2000, "stream": True}) as connection:
            server.until(lambda: server.metric("vllm:num_requests_running") > 0, "it runs")
            assert server.stop() == 0
            data = read_all(connection)
        status, error = data.split(b"\r\n")[0], data.find(b"shutting down")
        assert error >= 0
        begun = b"200" in status and 0 <= data.find(b'"text"') < error
        assert b"503" in status or begun


def test_a_second_signal_ends_at_once(tiny_model: Path) -> None:
    with serving(tiny_model, *SMALL) as server, sent(server, {**LONG, "n": 8, "stream": True}) as connection:
        connection.recv(1000)
        engine = server.engine_pid()
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 128 + signal.SIGTERM
        server.until(lambda: not Path(f"/proc/{engine}/cmdline").exists(), "the engine is gone too")


def test_a_port_in_use_is_one_line(tiny_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(command(tiny_model, "--port", str(port)), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert str(port) in line
    assert "in use" in line
    assert done.stdout == ""


def test_a_model_that_cannot_be_loaded_is_one_line(tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_model.read_bytes()[:20_000])
    done = subprocess.run(command(broken, "--port", "0"), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if "error" in line][-1].startswith("error: ")
    assert "broken.gguf" in done.stderr
    assert "Traceback" not in done.stderr
    small = subprocess.run(
        command(tiny_model, "--port", "0", "--memory", "1MB"), capture_output=True, text=True, check=False
    )
    assert small.returncode == 1
    assert "error: " in small.stderr
    assert "Traceback" not in small.stderr


def test_a_log_on_a_full_disk_stops_nothing(tiny_model: Path) -> None:
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(
            command(tiny_model, *SMALL, "--port", "0"), stdout=subprocess.PIPE, stderr=full, text=True
        )
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split(" is served at ")[1].strip()
            for _ in range(3):
                answer = httpx.post(url + "/completions", json={"prompt": "hi", "max_tokens": 2}, timeout=120)
                assert answer.status_code == 200
        finally:
            process.kill()
            process.communicate()


def test_swap_files_that_cannot_be_written_lose_nothing(tiny_model: Path, tmp_path: Path) -> None:
    requests = [{"prompt": f"client {n}", "max_tokens": 900, "temperature": 1, "seed": n} for n in range(8)]
    with serving(tiny_model, *SMALL) as roomy, ThreadPoolExecutor(8) as pool:
        expected = list(pool.map(lambda body: text_of(roomy, **body), requests))
    with serving(tiny_model, *SMALL, "--memory", "43MB", "--swap-space", "1GB") as server:
        # A disk that takes no more: the engine's files, unlike its pipes and sockets, have a limit now.
        resource.prlimit(server.engine_pid(), resource.RLIMIT_FSIZE, (4096, 4096))
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda body: text_of(server, **body), requests))
        assert answers == expected
        assert server.metric("vllm:num_preemptions_total") > 0
        assert any("cannot write the swap file" in line for line in server.log)
        server.until_idle()


def test_a_neighbour_whose_logits_are_no_numbers_fails_alone(tmp_path: Path) -> None:
    neighbours = [{"prompt": f"client {n}", "max_tokens": 1500, "temperature": 1, "seed": n} for n in range(3)]
    with serving(write_poisoned_model(tmp_path / "poisoned.gguf", "~"), *SMALL) as server:
        # Nobody may come to it by chance.
        bias = {str(server.post("/tokenize", {"prompt": "~"}).json()["tokens"][0]): -100}
        neighbours = [{**body, "logit_bias": bias} for body in neighbours]
        with ThreadPoolExecutor(3) as pool:
            expected = list(pool.map(lambda body: text_of(server, **body), neighbours))
            answers = [pool.submit(text_of, server, **body) for body in neighbours]
            server.until(lambda: server.metric("vllm:num_requests_running") == 3, "the neighbours run")
            for path, body in (
                ("/v1/completions", {"prompt": "rain~", "max_tokens": 5}),
                ("/v1/completions", {"prompt": "rain~", "max_tokens": 5, "stream": True}),
                ("/v1/embeddings", {"input": "rain~"}),
            ):
                failed = server.post(path, body)
                assert failed.status_code == 500
                assert "NaN" in failed.json()["error"]["message"]
                assert "Embed embedding" in failed.json()["error"]["message"]
            assert [answer.result() for answer in answers] == expected
        assert server.metric("vllm:request_success_total", finished_reason="error") == 3
        assert server.metric("tokenmill:engine_deaths_total") == 0
        server.until_idle()


def test_two_servers_start_on_one_cold_cache(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path))
    answers: list[str] = []

    def serve_one() -> None:
        with serving(tiny_model, *SMALL) as server:
            answers.append(text_of(server, prompt="together", max_tokens=8))

    threads = [threading.Thread(target=serve_one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(answers) == 2
    assert answers[0] == answers[1]


def test_an_idle_server_uses_no_processor_time(shared_server: RunningServer) -> None:
    shared_server.complete()
    processes = [shared_server.process.pid, shared_server.engine_pid()]
    before = sum(map(processor_seconds, processes))
    time.sleep(3)
    assert sum(map(processor_seconds, processes)) - before <= 0.03  # 1 %


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
