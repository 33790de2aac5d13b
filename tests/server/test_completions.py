"""/v1/completions: texts, token ids, echo, log-probabilities, several outputs, streams, stop strings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from served_model import RunningServer
from tiny_gguf import CONTROL

from tokenmill import LLM, SamplingParams

PROMPT = "the end of the rain in the land"


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Any:
    with LLM(tiny_model, memory="400MB", max_model_len=1024, threads=1) as llm:
        yield llm


def stream(server: RunningServer, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    text = server.post(path, {**body, "stream": True}).text
    events = [part for part in text.split("\n\n") if part]
    assert events[-1] == "data: [DONE]"
    return [json.loads(each.removeprefix("data: ")) for each in events[:-1]]


def test_a_completion_is_what_the_engine_gives_offline(server: RunningServer, llm: LLM) -> None:
    params = SamplingParams(temperature=0.7, seed=5, max_tokens=20, top_p=0.9, ignore_eos=True)
    expected = llm.generate(PROMPT, params)[0]
    answer = server.complete(PROMPT, temperature=0.7, seed=5, max_tokens=20, top_p=0.9, return_token_ids=True).json()
    (choice,) = answer["choices"]
    assert choice["token_ids"] == expected.token_ids
    assert choice["text"] == expected.text
    assert choice["finish_reason"] == "length"
    assert choice["prompt_token_ids"] == expected.prompt_token_ids
    assert answer["object"] == "text_completion"
    assert answer["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)
    assert answer["usage"]["completion_tokens"] == 20


def test_sixteen_tokens_unless_told_otherwise(server: RunningServer) -> None:
    assert server.complete().json()["usage"]["completion_tokens"] == 16


def test_prompts_may_be_token_ids_and_lists(server: RunningServer) -> None:
    ids = server.post("/tokenize", {"prompt": PROMPT}).json()["tokens"]
    alone = server.complete(PROMPT).json()["choices"][0]["text"]
    assert server.complete(ids).json()["choices"][0]["text"] == alone
    for prompts in ([PROMPT, "other"], [ids, ids[:3]]):
        choices = server.complete(prompts).json()["choices"]
        assert [choice["index"] for choice in choices] == [0, 1]
        assert choices[0]["text"] == alone


def test_n_outputs_of_each_prompt_are_numbered_through(server: RunningServer) -> None:
    answer = server.complete(["one", "two"], n=3, temperature=1, seed=1, max_tokens=8).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert len({choice["text"] for choice in answer["choices"]}) > 3
    assert answer["usage"]["completion_tokens"] == 48


def test_echo_with_logprobs_scores_the_prompt_as_the_engine_does(server: RunningServer, llm: LLM) -> None:
    expected = llm.score(PROMPT)
    for max_tokens in (0, 1):
        (choice,) = server.complete(PROMPT, echo=True, logprobs=1, max_tokens=max_tokens).json()["choices"]
        logprobs = choice["logprobs"]
        length = len(expected) + 1
        assert choice["text"].startswith(PROMPT)
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["token_logprobs"][1:length] == pytest.approx(expected.tolist(), abs=1e-5)
        assert len(logprobs["tokens"]) == length + max_tokens
        assert "".join(logprobs["tokens"][:length]) == PROMPT
        assert [PROMPT[at:][: len(t)] for at, t in zip(logprobs["text_offset"], logprobs["tokens"], strict=True)][
            :length
        ] == logprobs["tokens"][:length]
        assert logprobs["top_logprobs"][0] is None
        for token, own, top in list(
            zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
        )[1:]:
            assert top[token] == own
            assert max(top.values()) >= own


def test_a_stream_adds_up_to_the_whole(server: RunningServer) -> None:
    body = {"prompt": PROMPT, "temperature": 0, "ignore_eos": True, "max_tokens": 24, "logprobs": 2, "echo": True}
    (whole,) = server.post("/v1/completions", body).json()["choices"]
    events = stream(server, "/v1/completions", {**body, "stream_options": {"include_usage": True}})
    pieces = [event["choices"][0] for event in events if event["choices"]]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert [piece["finish_reason"] for piece in pieces if piece["finish_reason"]] == ["length"]
    for name in ("tokens", "token_logprobs", "top_logprobs"):
        joined = [entry for piece in pieces if piece["logprobs"] for entry in piece["logprobs"][name]]
        assert joined == whole["logprobs"][name]
    assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 24
    assert {event["id"] for event in events} == {events[0]["id"]}


def test_a_stop_string_ends_the_text_before_it(server: RunningServer) -> None:
    text = server.complete(PROMPT, max_tokens=40).json()["choices"][0]["text"]
    stop = text[10:13]
    (choice,) = server.complete(PROMPT, max_tokens=40, stop=["never", stop]).json()["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_max_tokens_beyond_the_context_ends_with_it(server: RunningServer) -> None:
    answer = server.complete([5] * 2040, max_tokens=100).json()
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_suffix_asks_for_the_middle(server: RunningServer) -> None:
    vocabulary = {text: server.post("/tokenize", {"prompt": text}).json()["tokens"] for text in CONTROL}
    before, after, middle = (vocabulary[name] for name in CONTROL[3:])
    ids = [*before, *_ids(server, "one"), *after, *_ids(server, "three"), *middle]
    expected = server.complete(ids).json()["choices"][0]["text"]
    answer = server.complete("one", suffix="three").json()
    assert answer["choices"][0]["text"] == expected
    assert answer["usage"]["prompt_tokens"] == len(ids)


def test_prompt_logprobs_come_by_id(server: RunningServer, llm: LLM) -> None:
    (choice,) = server.complete(PROMPT, prompt_logprobs=1, max_tokens=1, return_token_ids=True).json()["choices"]
    ids = choice["prompt_token_ids"]
    assert choice["prompt_logprobs"][0] is None
    found = [entry[str(i)]["logprob"] for i, entry in zip(ids[1:], choice["prompt_logprobs"][1:], strict=True)]
    assert found == pytest.approx(llm.score(PROMPT).tolist(), abs=1e-5)


def test_logit_bias_decides(server: RunningServer) -> None:
    (token,) = _ids(server, "x")
    assert server.complete(logit_bias={str(token): 100}, max_tokens=5).json()["choices"][0]["text"] == "xxxxx"


def test_the_same_prompt_again_comes_from_the_cache(server: RunningServer) -> None:
    ids = list(range(40, 140))
    first = server.complete(ids).json()
    second = server.complete(ids).json()
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 96
    assert second["choices"] == first["choices"]


def _ids(server: RunningServer, text: str) -> list[int]:
    ids: list[int] = server.post("/tokenize", {"prompt": text}).json()["tokens"]
    return ids


def test_stops_and_special_tokens_are_in_the_text_if_they_are_wanted(server: RunningServer) -> None:
    plain = server.complete("the rain", max_tokens=12).json()["choices"][0]["text"]
    stop = next(character for character in plain[1:] if character.isascii())
    cut = server.complete("the rain", max_tokens=12, stop=stop).json()["choices"][0]["text"]
    kept = server.complete("the rain", max_tokens=12, stop=stop, include_stop_str_in_output=True).json()["choices"][0]
    assert cut + stop == kept["text"] == plain[: len(kept["text"])]
    end = server.post("/tokenize", {"content": "<|im_end|>"}).json()["tokens"]
    for given, expected in (
        ({}, ""),
        ({"skip_special_tokens": False}, ""),
        ({"include_stop_str_in_output": True}, ""),
        ({"skip_special_tokens": False, "include_stop_str_in_output": True}, "<|im_end|>"),
    ):
        answer = server.complete(max_tokens=3, ignore_eos=False, allowed_token_ids=end, **given).json()["choices"][0]
        assert (answer["text"], answer["finish_reason"]) == (expected, "stop")
    assert (
        server.complete(max_tokens=2, allowed_token_ids=end, skip_special_tokens=False).json()["choices"][0]["text"]
        == 2 * "<|im_end|>"
    )


def test_a_prompt_is_cut_to_its_last_tokens_if_that_is_wanted(server: RunningServer) -> None:
    ids = list(range(60, 200))

    def answer(prompt: object, **given: Any) -> dict[str, Any]:
        found: dict[str, Any] = server.complete(prompt, max_tokens=4, **given).json()
        return found

    cut = answer(ids, truncate_prompt_tokens=10)
    assert cut["usage"]["prompt_tokens"] == 10
    assert cut["choices"][0]["text"] == answer(ids[-10:])["choices"][0]["text"]
    assert answer(ids, truncate_prompt_tokens=500)["usage"]["prompt_tokens"] == 140
    assert answer(ids * 20, truncate_prompt_tokens=-1)["usage"]["prompt_tokens"] == 2047
