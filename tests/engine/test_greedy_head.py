"""A screened head changes no token of a real model, whoever shares its steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tokenmill import LLM, SamplingParams
from tokenmill.errors import UsageError
from tokenmill.sampling import StructuredOutputs, takes_best

GREEDY = SamplingParams(max_tokens=40, temperature=0, seed=0, ignore_eos=True)
PROMPTS = ["def fibonacci(n):", "The capital of France", "1, 2, 4, 8, 16,"]


def tokens(path: Path, *, screened: bool, params: SamplingParams | list[SamplingParams] = GREEDY) -> list[list[int]]:
    head = "on" if screened else "off"
    with LLM(path, max_model_len=256, max_num_seqs=2, screened_head=head) as llm:
        return [output.token_ids for output in llm.generate(PROMPTS, params)]


def test_greedy_tokens_are_the_same(smollm2_path: Path) -> None:
    assert tokens(smollm2_path, screened=True) == tokens(smollm2_path, screened=False)


def test_a_step_that_also_samples_is_computed_in_full(smollm2_path: Path) -> None:
    mixed = [
        GREEDY,
        replace(GREEDY, temperature=0.8, seed=3),
        replace(GREEDY, logprobs=2, repetition_penalty=1.2, max_tokens=20),
    ]
    assert tokens(smollm2_path, screened=True, params=mixed) == tokens(smollm2_path, screened=False, params=mixed)


def test_its_bytes_are_in_the_ledger(smollm2_path: Path) -> None:
    def weights(head: str) -> int:
        with LLM(smollm2_path, max_model_len=64, max_num_seqs=1, screened_head=head) as llm:  # type: ignore[arg-type]
            return llm.memory.weights

    screen = 49152 * (576 // 32 * 22 + 4)
    assert weights("on") == weights("off") + screen
    assert weights("auto") == weights("off")  # less than a third of what a token reads


def test_what_cannot_be_screened_is_refused(smollm2_path: Path) -> None:
    with pytest.raises(UsageError, match="screened_head"):
        LLM(smollm2_path, backend="torch", screened_head="on")
    with pytest.raises(UsageError, match="screened_head"):
        LLM(smollm2_path, screened_head="always")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.1},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"min_tokens": 1},
        {"allowed_token_ids": [1, 2]},
        {"structured_outputs": StructuredOutputs(regex="a+")},
        {"logprobs": 0},
        {"logit_bias": {3: 1.0}},
        {"bad_words": ["no"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whoever_looks_at_more_than_the_largest_logit_says_so(change: dict[str, object]) -> None:
    assert takes_best(GREEDY)
    assert not takes_best(replace(GREEDY, **change))  # type: ignore[arg-type]
