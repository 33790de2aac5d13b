"""The lm-evaluation-harness bridge answers the three kinds of requests as the engine itself scores them."""

from __future__ import annotations

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from tokenmill.evaluate.lm_eval_model import TokenmillLM


@pytest.fixture(scope="module")
def model(smollm2_path):
    made = TokenmillLM(str(smollm2_path), max_model_len=64, threads=1)
    yield made
    made.close()


def requests(kind, *arguments):
    return [Instance(kind, {}, pair, number) for number, pair in enumerate(arguments)]


def test_likelihoods_are_those_of_the_engine(model):
    paris, banana = model.loglikelihood(
        requests("loglikelihood", ("The capital of France is", " Paris"), ("The capital of France is", " Banana"))
    )
    llm = model._llm
    ids = model._ids("The capital of France is Paris")
    assert paris[0] == pytest.approx(float(llm.score(ids)[-1]), abs=1e-5)
    assert paris[0] > banana[0]
    assert not banana[1]
    greedy = llm.generate("The capital of France is", llm.default_params(max_tokens=3, temperature=0))[0].text
    assert model.loglikelihood(requests("loglikelihood", ("The capital of France is", greedy)))[0][1]


def test_a_rolling_likelihood_counts_every_token_once(model):
    text = "One two three four five six seven eight nine ten. " * 8  # longer than the context
    (total,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    count = len(model._ids(text)) - 1
    assert count > 64
    assert -8 * count < total < 0
    short = "One two three four"
    (whole,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", (short,)))
    assert whole == pytest.approx(float(model._llm.score(model._ids(short)).sum()), abs=1e-4)


def test_answers_stop_where_they_are_told(model):
    context = "The capital of France is"
    settings = {"until": ["."], "max_gen_toks": 12, "do_sample": False}
    (answer,) = model.generate_until(requests("generate_until", (context, settings)))
    assert "Paris" in answer
    assert "." not in answer
