"""A model class for lm-evaluation-harness that runs the engine in this process.

    import lm_eval
    from tokenmill.evaluate.lm_eval_model import TokenmillLM

    lm_eval.simple_evaluate(model=TokenmillLM("smollm2-135m"), tasks=["arc_easy"])

Needs the ``lm-eval`` extra. All three kinds of requests are supported; those that the harness calls ``loglikelihood``
are scored exactly, greedy flag included. Requests of a task run together.
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
        return self._log_likelihoods([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows as long as the context that overlap by one token."""
        step = self._llm.max_model_len - 2
        totals = [0.0] * len(requests)
        windows, owners = [], []
        for owner, request in enumerate(requests):
            ids = self._ids(request.args[0])
            for begin in range(0, len(ids) - 1, step):
                windows.append((ids[begin : begin + step + 1], 1))
                owners.append(owner)
        for owner, (total, _) in zip(owners, self._log_likelihoods(windows), strict=True):
            totals[owner] += total
        return totals

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

    @property
    def tokenizer_name(self) -> str:
        """What the harness calls the chat template by, in its caches and reports."""
        return str(self._llm.config.model)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, for the harness's reports."""
        return self._llm.tokenizer.chat_template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt text of a conversation; an answer begun by the harness is continued."""
        text = self._llm.tokenizer.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        begun = chat_history[-1]["content"].strip()
        return text[: text.rindex(begun) + len(begun)]

    def close(self) -> None:
        """Frees the model."""
        self._llm.close()

    def _pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Tokens of both, and where the continuation's begin."""
        # The harness's rule: trailing spaces of the context belong to the continuation.
        bare = context.rstrip()
        continuation, context = context[len(bare) :] + continuation, bare
        return self._ids(context + continuation), max(len(self._ids(context)), 1)

    def _ids(self, text: str) -> list[int]:
        """Token ids behind one that every text has before it, so that its first own token is predicted too."""
        ids = self._llm.tokenize(text)
        tokenizer = self._llm.tokenizer
        if ids[:1] == [tokenizer.bos_id]:
            return ids
        prefix = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        return ids if prefix is None else [prefix, *ids]

    def _log_likelihoods(self, pairs: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Of each sequence's tokens from a place on, given as many before them as the context holds, and whether each
        of them is the likeliest."""
        if not pairs:
            return []
        cuts = [max(0, len(ids) + 1 - self._llm.max_model_len) for ids, _ in pairs]
        params = SamplingParams(max_tokens=1, temperature=0, seed=0, prompt_logprobs=0)
        outputs = self._llm.generate([ids[cut:] for (ids, _), cut in zip(pairs, cuts, strict=True)], params)
        found = []
        for (_, first), cut, output in zip(pairs, cuts, outputs, strict=True):
            assert output.prompt_logprobs is not None
            tail = [score for score in output.prompt_logprobs[max(first - cut, 1) :] if score is not None]
            found.append((sum(score.logprob for score in tail), all(score.rank == 1 for score in tail)))
        return found
