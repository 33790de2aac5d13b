"""What cannot be served is refused with a status, a body in OpenAI's form, and the name of the parameter."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from served_model import SMALL, RunningServer, serving

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
TEXT = {"prompt": "hi", "max_tokens": 1}

BAD_COMPLETIONS: list[tuple[str, dict[str, Any]]] = [
    ("temperature", {"temperature": "hot"}),
    ("temperature", {"temperature": True}),
    (None, {"temperature": -1}),
    (None, {"temperature": 1e-9}),
    (None, {"top_p": 1.5}),
    ("max_tokens", {"max_tokens": -1}),
    ("max_tokens", {"max_tokens": 1.5}),
    ("max_tokens", {"max_tokens": 0}),
    ("n", {"n": 0}),
    ("n", {"n": 1000}),
    ("logprobs", {"logprobs": 100}),
    ("stop", {"stop": 3}),
    ("stop", {"stop": ["x"] * 100}),
    ("stop", {"stop": "x" * 10_000}),
    ("logit_bias", {"logit_bias": {"x": 1}}),
    ("logit_bias", {"logit_bias": {"1": 1000}}),
    ("logit_bias", {"logit_bias": {str(i): 1 for i in range(10_000)}}),
    (None, {"logit_bias": {"100000": 1}}),
    ("seed", {"seed": 2**70}),
    ("prompt", {"prompt": None}),
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": ""}),
    ("prompt[1]", {"prompt": ["a", ""]}),
    ("prompt", {"prompt": {"text": "a"}}),
    ("prompt", {"prompt": [1, "a"]}),
    ("prompt", {"prompt": ["a"] * 5000}),
    ("prompt", {"prompt": [320]}),
    ("prompt", {"prompt": [-1]}),
    ("prompt", {"prompt": [1] * 2048}),
    ("best_of", {"best_of": 3}),
    ("truncate_prompt_tokens", {"truncate_prompt_tokens": -2}),
    ("spaces_between_special_tokens", {"spaces_between_special_tokens": False}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
    ("stream_options", {"stream": True, "stream_options": {"include_obfuscation": True}}),
    ("prompt_logprobs", {"stream": True, "prompt_logprobs": 1}),
    ("suffix", {"suffix": "b", "echo": True}),
    ("nonsense", {"nonsense": 1}),
    ("stream_options.nonsense", {"stream": True, "stream_options": {"nonsense": 1}}),
]
BAD_CHATS: list[tuple[str | None, dict[str, Any]]] = [
    ("messages", {"messages": []}),
    ("messages", {"messages": "hi"}),
    ("messages", {"messages": [{"role": "king", "content": "hi"}]}),
    ("messages", {"messages": [{"role": "user"}]}),
    ("messages", {"messages": [{"role": "user", "content": 3}]}),
    ("tools", {"tools": [{"type": "retrieval"}]}),
    ("tool_choice", {"tool_choice": "auto"}),
    ("parallel_tool_calls", {"parallel_tool_calls": False}),
    ("top_logprobs", {"top_logprobs": 3}),
    ("top_logprobs", {"logprobs": True, "top_logprobs": 30}),
    ("modalities", {"modalities": ["audio"]}),
    ("store", {"store": True}),
    ("functions", {"functions": [{"name": "f"}]}),
    ("reasoning_effort", {"reasoning_effort": "high"}),
    ("chat_template", {"chat_template": "{{ 1 }}"}),
    ("chat_template_kwargs", {"chat_template_kwargs": {"messages": []}}),
    ("max_tokens", {"max_tokens": 3, "max_completion_tokens": 4}),
    ("continue_final_message", {"continue_final_message": True, "add_generation_prompt": False}),
]


def error_of(answer: Any, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]
    return error


@pytest.mark.parametrize(("param", "given"), BAD_COMPLETIONS, ids=lambda value: json.dumps(value)[:40])
def test_a_completion_parameter_that_cannot_be(server: RunningServer, param: str | None, given: dict[str, Any]) -> None:
    error = error_of(server.post("/v1/completions", {**TEXT, **given}))
    name = param or next(iter(given))
    assert error["param"] in (param, name)
    assert name.split(".")[0].split("[")[0] in error["message"]


@pytest.mark.parametrize(("param", "given"), BAD_CHATS, ids=lambda value: json.dumps(value)[:40])
def test_a_chat_parameter_that_cannot_be(server: RunningServer, param: str, given: dict[str, Any]) -> None:
    error = error_of(server.post("/v1/chat/completions", {**CHAT, **given}))
    assert error["param"] == param
    assert param in error["message"]


def test_neutral_values_of_parameters_that_are_not_supported_are_taken(server: RunningServer) -> None:
    neutral = {
        "response_format": {"type": "text"},
        "service_tier": "auto",
        "store": False,
        "user": "me",
        "metadata": {"a": "b"},
        "parallel_tool_calls": True,
        "logit_bias": None,
        "functions": None,
        "skip_special_tokens": True,
        "priority": 0,
    }
    assert server.post("/v1/chat/completions", {**CHAT, **neutral}).status_code == 200


def test_an_unknown_model_is_not_found(server: RunningServer) -> None:
    error = error_of(server.post("/v1/completions", {**TEXT, "model": "gpt-4"}), 404)
    assert error["code"] == "model_not_found"
    assert "tiny" in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"[]",
        b'"text"',
        b"null",
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800", "max_tokens": 1}',
        b'{"prompt": "a", "stop": "\\udfff"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_a_malformed_body_is_a_400(server: RunningServer, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    error_of(server.post("/v1/completions", content=body, headers=headers))
    error_of(server.post("/v1/chat/completions", content=body, headers=headers))


def test_a_body_that_is_no_json_by_its_type_is_a_400(server: RunningServer) -> None:
    answer = server.post("/v1/completions", content=json.dumps(TEXT), headers={"content-type": "text/plain"})
    assert "JSON" in error_of(answer)["message"]


def test_unknown_routes_and_methods(server: RunningServer) -> None:
    error_of(server.get("/v1/nothing"), 404)
    error_of(server.get("/v1/completions"), 405)


def test_a_long_prompt_of_text_is_refused_after_tokenizing(server: RunningServer) -> None:
    error = error_of(server.post("/v1/completions", {**TEXT, "prompt": "rain " * 200_000}))
    assert error["code"] == "context_length_exceeded"


def test_bodies_and_headers_have_bounds(tiny_model: Path) -> None:
    with serving(tiny_model, *SMALL, "--max-body-size", "10kB") as server:
        error_of(server.post("/v1/completions", {**TEXT, "prompt": "x" * 20_000}), 413)
        chunked = (b" " * 1000 for _ in range(20))
        headers = {"content-type": "application/json"}
        error_of(server.post("/v1/completions", content=chunked, headers=headers), 413)
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n")
            answer = b""
            try:
                for _ in range(1000):
                    connection.sendall(b"x-padding: " + b"y" * 1000 + b"\r\n")
                answer = connection.recv(1000)
            except ConnectionError:
                pass  # closed while we were still talking
            assert answer == b"" or b"431" in answer
        assert server.get("/health").status_code == 200
        assert server.metric("tokenmill:requests_rejected_total", reason="body_too_large") == 2
