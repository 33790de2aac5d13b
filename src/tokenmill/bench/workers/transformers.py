"""Hugging Face transformers on the same weights, decoded from the GGUF file; bf16 where the processor has it."""

from __future__ import annotations

import time
from typing import Any

from .protocol import Identity, Latency, Task, Throughput, computes_bf16, serve


class Transformers:
    """One causal language model with a dynamic KV cache."""

    def __init__(self, task: Task) -> None:
        import torch
        import transformers

        torch.set_num_threads(task.threads)
        self._torch: Any = torch
        dtype = torch.bfloat16 if computes_bf16() else torch.float32
        self._model = load(task.model, dtype)
        self.identity = Identity(
            "transformers",
            f"transformers {transformers.__version__}, torch {torch.__version__}",
            f"torch CPU capability {torch.backends.cpu.get_cpu_capability()}",
            {"dtype": str(dtype), "attn_implementation": "sdpa", "threads": torch.get_num_threads()},
        )

    def latency(self, prompt: list[int], output_tokens: int) -> Latency:
        """See ``Engine``."""
        start = time.perf_counter()
        first, produced = self._run([prompt], output_tokens)
        end = time.perf_counter()
        return Latency(first - start, end - first, len(prompt), produced)

    def throughput(self, prompts: list[list[int]], output_tokens: int) -> Throughput:
        """See ``Engine``; prompts must have one length, so that nothing is padded."""
        start = time.perf_counter()
        _, produced = self._run(prompts, output_tokens)
        return Throughput(time.perf_counter() - start, sum(map(len, prompts)), produced)

    def _run(self, prompts: list[list[int]], output_tokens: int) -> tuple[float, int]:
        """When the first tokens were there, and how many tokens came."""
        torch = self._torch
        with torch.inference_mode():
            ids = torch.tensor(prompts)
            out = self._model(ids, use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            first = time.perf_counter()
            for _ in range(output_tokens - 1):
                out = self._model(ids, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
                ids = out.logits[:, -1].argmax(-1, keepdim=True)
        return first, len(prompts) * output_tokens


def load(model: str, dtype: Any) -> Any:
    """A model from a folder or a .gguf file (decoded while reading: needs ``gguf`` and ``accelerate``)."""
    from pathlib import Path

    from transformers import AutoModelForCausalLM

    path = Path(model)
    if path.suffix == ".gguf":
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype).eval()
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def main() -> None:
    serve(Transformers)
