"""Sampling parameters are checked when they are made."""

from __future__ import annotations

import pytest

from tokenmill.sampling import SamplingError, SamplingParams, bad_word_ids


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("min_tokens", -1),
        ("temperature", -0.1),
        ("temperature", 0.0001),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_p", 1.1),
        ("top_p", True),
        ("top_k", -2),
        ("top_k", 2.0),
        ("min_p", -0.1),
        ("typical_p", 2),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-40),
        ("repetition_penalty", float("inf")),
        ("seed", -1),
        ("seed", 2**64),
        ("stop", [""]),
        ("stop", [3]),
        ("stop_token_ids", [-1]),
        ("ignore_eos", 1),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", {-1: 1.0}),
        ("logprobs", -1),
        ("logprobs", 129),
        ("prompt_logprobs", 1.0),
        ("n", 0),
        ("priority", 1001),
        ("cache_salt", ""),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-1]),
        ("bad_words", [" "]),
        ("bad_words", ["a"] * 1025),
        ("structured_outputs", {"regex": "a"}),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(SamplingError) as refusal:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert name in str(refusal.value)


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(SamplingError, match="min_tokens is 9, more than max_tokens = 4"):
        SamplingParams(min_tokens=9, max_tokens=4)


def test_token_ids_outside_of_the_vocabulary_are_refused() -> None:
    with pytest.raises(SamplingError, match=r"stop_token_ids names token 10, outside of the vocabulary 0\.\.9"):
        SamplingParams(stop_token_ids=[10]).check_vocabulary(10)
    with pytest.raises(SamplingError, match="logit_bias names token 12"):
        SamplingParams(logit_bias={12: 1.0}).check_vocabulary(10)
    with pytest.raises(SamplingError, match="allowed_token_ids names token 11"):
        SamplingParams(allowed_token_ids=[1, 11]).check_vocabulary(10)


def test_bad_words_are_spelled_at_a_beginning_and_after_a_space() -> None:
    spelled = {"cat": [1], " cat": [2], "ab": [3, 4], " ab": [5, 3, 4], "x": [6], " x": [6]}
    assert bad_word_ids(["cat", "ab", "  cat", "x"], spelled.__getitem__) == ((1,), (2,), (3, 4), (6,))


def test_defaults_of_a_model_are_taken_and_overridden() -> None:
    defaults = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": 3, "repetition_penalty": None}
    params = SamplingParams.from_defaults(defaults, top_p=0.5, max_tokens=7)
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.6, 0.5, 20, 7)
    assert params.repetition_penalty == 1.0


def test_a_model_that_does_not_sample_is_greedy_by_default() -> None:
    assert SamplingParams.from_defaults({"do_sample": False, "temperature": 0.6}).temperature == 0


def test_an_unknown_override_is_refused_by_name() -> None:
    with pytest.raises(SamplingError, match="'top_q' is not a sampling parameter"):
        SamplingParams.from_defaults({}, top_q=1)


def test_a_text_is_one_stop_string() -> None:
    assert SamplingParams(stop="ab").stop_strings == ("ab",)


@pytest.mark.parametrize(
    ("name", "value"),
    [("stop", 5), ("stop", None), ("stop_token_ids", 5), ("stop_token_ids", "5"), ("logit_bias", [1])],
)
def test_a_value_that_is_no_collection_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(SamplingError, match=f"{name} is "):
        SamplingParams(**{name: value})  # type: ignore[arg-type]
