"""A model class for lm-evaluation-harness that runs the engine in this process.

    import lm_eval
    from tokenmill.evaluate.lm_eval_model import TokenmillLM

    lm_eval.simple_evaluate(model=TokenmillLM("smollm2-135m"), tasks=["arc_easy"])

Needs the ``lm_eval`` package. All three kinds of requests are supported; those that the harness calls ``loglikelihood``
are scored exactly, greedy flag included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from tokenmill.llm import LLM
from tokenmill.sampling import SamplingParams


class TokenmillLM(LM):  # type: ignore[misc]  # lm_eval has no types
    """Wraps one ``LLM``; keyword arguments are those of ``LLM``."""

    def __init__(self, model: str, **arguments: Any) -> None:
        super().__init__()
        self._llm = LLM(model, **arguments)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each (context, continuation), and whether the continuation is the greedy answer."""
        return [self._score(*request.args) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows as long as the context that overlap by one token."""
        return [self._rolling(request.args[0]) for request in requests]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers to (context, settings); ``until``, ``max_gen_toks``, ``temperature`` and ``top_p`` are followed."""
        prompts, params = [], []
        for request in requests:
            context, settings = request.args
            until = settings.get("until") or ()
            sampled = settings.get("do_sample", settings.get("temperature", 0) > 0)
            most = int(settings.get("max_gen_toks", 256))
            ids = self._llm.tokenize(context)
            prompts.append(ids[-(self._llm.max_model_len - most) :])  # the harness's own rule: the end counts
            params.append(
                SamplingParams(
                    max_tokens=most,
                    temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
                    top_p=float(settings.get("top_p", 1.0)),
                    stop=(until,) if isinstance(until, str) else tuple(until),
                    seed=0,
                )
            )
        return [output.text for output in self._llm.generate(prompts, params)] if prompts else []

    def close(self) -> None:
        """Frees the model."""
        self._llm.close()

    def _score(self, context: str, continuation: str) -> tuple[float, bool]:
        # The harness's rule: trailing spaces of the context belong to the continuation.
        bare = context.rstrip()
        continuation, context = context[len(bare) :] + continuation, bare
        whole, before = self._ids(context + continuation), self._ids(context)
        return self._log_likelihood(whole, max(len(before), 1))

    def _rolling(self, text: str) -> float:
        ids = self._ids(text)
        step = self._llm.max_model_len - 2
        windows = [ids[begin : begin + step + 1] for begin in range(0, max(len(ids) - 1, 1), step)]
        return sum(self._log_likelihood(window, 1)[0] for window in windows if len(window) > 1)

    def _ids(self, text: str) -> list[int]:
        """Token ids behind one that every text has before it, so that its first own token is predicted too."""
        ids = self._llm.tokenize(text)
        tokenizer = self._llm.tokenizer
        if ids[:1] == [tokenizer.bos_id]:
            return ids
        prefix = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        return ids if prefix is None else [prefix, *ids]

    def _log_likelihood(self, ids: Sequence[int], first: int) -> tuple[float, bool]:
        """Of tokens ``first`` and following, given as many before them as the context holds; greedy if all are best."""
        cut = max(0, len(ids) + 1 - self._llm.max_model_len)
        params = SamplingParams(max_tokens=1, temperature=0, seed=0, prompt_logprobs=0)
        scores = self._llm.generate(list(ids[cut:]), params)[0].prompt_logprobs
        assert scores is not None
        tail = [score for score in scores[max(first - cut, 1) :] if score is not None]
        return sum(score.logprob for score in tail), all(score.rank == 1 for score in tail)
