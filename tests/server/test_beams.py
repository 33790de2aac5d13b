"""Beam search over HTTP, in vLLM's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from served_model import RunningServer

from tokenmill import LLM

BY_ID = {"return_tokens_as_token_ids": True}
SEARCH: dict[str, Any] = {"use_beam_search": True, "n": 3, "max_tokens": 8, "length_penalty": 0.6, "temperature": 0}


def test_the_server_finds_what_the_library_finds(server: RunningServer, tiny_model: Path) -> None:
    with LLM(tiny_model, memory="600MB", max_model_len=2048, threads=1) as llm:
        (expected,) = llm.beam_search("the rain", beam_width=3, max_tokens=8, length_penalty=0.6)
    answer = server.post("/v1/completions", {"prompt": "the rain", **SEARCH, "logprobs": 2, **BY_ID}).json()
    assert [choice["text"] for choice in answer["choices"]] == [output.text for output in expected.outputs]
    assert len({choice["text"] for choice in answer["choices"]}) == 3
    for choice, output in zip(answer["choices"], expected.outputs, strict=True):
        told = choice["logprobs"]
        assert sum(told["token_logprobs"]) == pytest.approx(output.cumulative_logprob)
        assert all(2 <= len(top) <= 3 for top in told["top_logprobs"])


def test_a_stream_and_chat_give_the_same_beams(server: RunningServer) -> None:
    body = {"messages": [{"role": "user", "content": "Rain?"}], **SEARCH}
    whole = [each["message"]["content"] for each in server.post("/v1/chat/completions", body).json()["choices"]]
    lines = server.post("/v1/chat/completions", {**body, "stream": True}).text.splitlines()
    streamed = [""] * 3
    for line in lines:
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == whole


@pytest.mark.parametrize(
    ("param", "given"),
    [
        ("top_p", {"top_p": 0.5}),
        ("temperature", {"temperature": 0.7}),
        ("stop", {"stop": "x"}),
        ("min_tokens", {"min_tokens": 2}),
        ("structured_outputs", {"structured_outputs": {"choice": ["a"]}}),
        ("n", {"n": 65}),
        ("max_tokens", {"max_tokens": 0, "echo": True}),
        ("length_penalty", {"use_beam_search": False}),
        ("length_penalty", {"length_penalty": 100}),
    ],
    ids=json.dumps,
)
def test_what_a_search_cannot_follow_is_named(server: RunningServer, param: str, given: dict[str, Any]) -> None:
    answer = server.post("/v1/completions", {"prompt": "a", **SEARCH, **given})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
