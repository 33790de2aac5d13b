"""/v1/embeddings through the openai package and as plain HTTP."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from served_model import SMALL, RunningServer, serving

from tokenmill import LLM

TEXTS = ["the rain", "the sun in the morning", "x"]


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def ids(server: RunningServer, text: str) -> list[int]:
    found: list[int] = server.post("/tokenize", {"prompt": text}).json()["tokens"]
    return found


def test_texts_tokens_and_lists_of_either(client: openai.OpenAI, server: RunningServer) -> None:
    answer = client.embeddings.create(model="tiny", input=TEXTS)  # the package asks for base64 by itself
    assert [each.index for each in answer.data] == [0, 1, 2]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(len(ids(server, text)) for text in TEXTS)
    as_numbers = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
    as_tokens = client.embeddings.create(model="tiny", input=[ids(server, text) for text in TEXTS])
    assert [each.embedding for each in answer.data] == [each.embedding for each in as_numbers.data]
    assert [each.embedding for each in answer.data] == [each.embedding for each in as_tokens.data]
    for each in answer.data:
        assert len(each.embedding) == 256
        assert np.linalg.norm(each.embedding) == pytest.approx(1, abs=1e-5)
    alone = client.embeddings.create(model="tiny", input=ids(server, TEXTS[1]), dimensions=256)
    assert [each.embedding for each in alone.data] == [answer.data[1].embedding]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_the_server_and_the_library_agree_bit_for_bit(tiny_model: Path, pooling: Any) -> None:
    with LLM(tiny_model, memory="600MB", max_model_len=2048, threads=1) as llm:
        expected = llm.embed(TEXTS, pooling=pooling)
        assert expected.shape == (3, 256)
        assert (expected[0] != expected[1]).any()
    with serving(tiny_model, *SMALL, "--pooling", pooling) as server, ThreadPoolExecutor() as pool:
        busy = pool.submit(server.complete, max_tokens=200, n=4, temperature=1)
        body = {"input": TEXTS, "encoding_format": "base64"}
        data = server.post("/v1/embeddings", body).json()["data"]
        busy.result()
    found = [np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in data]
    assert np.array_equal(np.stack(found), expected)


def test_long_inputs_are_refused_or_cut_as_asked(server: RunningServer) -> None:
    whole = list(range(60, 260)) * 12
    refused = server.post("/v1/embeddings", {"input": ["a", whole]})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "input[1]"
    assert refused.json()["error"]["code"] == "context_length_exceeded"

    def embedded(tokens: list[int], **more: int) -> dict[str, Any]:
        answer: dict[str, Any] = server.post("/v1/embeddings", {"input": tokens, **more}).json()
        return answer

    assert embedded(whole, truncate_prompt_tokens=30)["data"] == embedded(whole[-30:])["data"]
    assert embedded(whole, truncate_prompt_tokens=-1)["usage"]["prompt_tokens"] == 2048


@pytest.mark.parametrize(
    ("param", "given"),
    [
        ("dimensions", {"dimensions": 64}),
        ("encoding_format", {"encoding_format": "int8"}),
        ("input", {"input": []}),
        ("input", {"input": ""}),
        ("input[1]", {"input": ["a", ""]}),
        ("input", {"input": [320]}),
        ("priority", {"priority": 3}),
        ("nonsense", {"nonsense": 1}),
    ],
    ids=json.dumps,
)
def test_what_cannot_be_honoured_is_named(server: RunningServer, param: str, given: dict[str, Any]) -> None:
    answer = server.post("/v1/embeddings", {"model": "tiny", "input": "a", **given})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("path", ["/v1/score", "/score", "/v1/rerank", "/rerank"])
def test_routes_that_need_training_say_that_the_model_generates(server: RunningServer, path: str) -> None:
    answer = server.post(path, {"model": "tiny", "input": "a"})
    assert answer.status_code == 400
    assert "not an embedding model" in answer.json()["error"]["message"]
