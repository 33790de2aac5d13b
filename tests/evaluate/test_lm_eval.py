"""The lm-evaluation-harness bridge answers the three kinds of requests as the engine itself scores them.

Without the harness (the ``lm-eval`` extra, which brings hundreds of megabytes) a stand-in has what the bridge uses of
it: an abstract base class with three methods, and requests with their arguments.
"""

from __future__ import annotations

import abc
import importlib.util
import sys
from dataclasses import dataclass
from types import ModuleType

import pytest


@pytest.fixture(scope="module", autouse=True)
def harness():
    """``lm_eval``, or the stand-in."""
    if importlib.util.find_spec("lm_eval") is not None:
        yield
        return

    class LM(abc.ABC):
        @abc.abstractmethod
        def loglikelihood(self, requests): ...

        @abc.abstractmethod
        def loglikelihood_rolling(self, requests): ...

        @abc.abstractmethod
        def generate_until(self, requests): ...

    @dataclass
    class Instance:
        request_type: str
        doc: dict
        arguments: tuple
        idx: int

        @property
        def args(self):
            return self.arguments

    modules = {
        name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.instance", "lm_eval.api.model")
    }
    modules["lm_eval.api.model"].LM = LM
    modules["lm_eval.api.instance"].Instance = Instance
    sys.modules.update(modules)
    yield
    for name in (*modules, "tokenmill.evaluate.lm_eval_model"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def model(harness, smollm2_path):
    from tokenmill.evaluate.lm_eval_model import TokenmillLM

    made = TokenmillLM(str(smollm2_path), max_model_len=64, threads=1)
    yield made
    made.close()


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

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


def test_a_conversation_becomes_a_prompt_and_a_begun_answer_goes_on(model):
    asked = [{"role": "user", "content": "Name a prime."}]
    prompt = model.apply_chat_template(asked)
    assert prompt == model._llm.tokenizer.apply_chat_template(asked, add_generation_prompt=True)
    begun = model.apply_chat_template([*asked, {"role": "assistant", "content": "The prime"}], False)
    assert begun.endswith("The prime")
    assert model.tokenizer_name
    assert model.chat_template() == model._llm.tokenizer.chat_template


def test_nothing_is_no_request(model):
    assert model.loglikelihood([]) == model.loglikelihood_rolling([]) == model.generate_until([]) == []
