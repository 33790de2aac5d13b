"""Tokenmill through its public API."""

from __future__ import annotations

import time

from .protocol import Identity, Latency, Task, Throughput, serve


class Tokenmill:
    """One ``LLM``, prefix cache off: no prompt is seen twice, and none should profit if it were."""

    def __init__(self, task: Task) -> None:
        import tokenmill
        from tokenmill import LLM, _native

        self._llm = LLM(
            task.model,
            threads=task.threads,
            max_model_len=task.context,
            max_num_seqs=task.sequences,
            max_batch_tokens=max(512, task.sequences),
            enable_prefix_caching=False,
        )
        self.identity = Identity(
            "tokenmill",
            tokenmill.__version__,
            f"path {_native.active_isa()} of {', '.join(_native.available_isas())}",
            {"kv_cache_dtype": self._llm.config.kv_cache_dtype, "max_batch_tokens": self._llm.config.max_batch_tokens},
        )

    def latency(self, prompt: list[int], output_tokens: int) -> Latency:
        """See ``Engine``."""
        output = self._llm.generate(prompt, _greedy(output_tokens))[0]
        timings = output.timings
        assert timings is not None
        return Latency(
            timings.first_token - timings.arrival,
            timings.finished - timings.first_token,
            len(output.prompt_token_ids),
            len(output.token_ids),
        )

    def throughput(self, prompts: list[list[int]], output_tokens: int) -> Throughput:
        """See ``Engine``."""
        start = time.perf_counter()
        outputs = self._llm.generate(prompts, _greedy(output_tokens))
        seconds = time.perf_counter() - start
        return Throughput(
            seconds, sum(len(o.prompt_token_ids) for o in outputs), sum(len(o.token_ids) for o in outputs)
        )


def _greedy(tokens: int):  # type: ignore[no-untyped-def]  # SamplingParams; the module must load without Tokenmill
    from tokenmill import SamplingParams

    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, seed=0)


def main() -> None:
    serve(Tokenmill)
