"""vLLM's CPU build. It reads no GGUF file well: the same weights are written once as a bf16 folder, by transformers."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from .protocol import Identity, Latency, Task, Throughput, computes_bf16, serve


class Vllm:
    """One ``vllm.LLM``."""

    def __init__(self, task: Task) -> None:
        cores = sorted(os.sched_getaffinity(0))[: task.threads]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import torch
        import vllm

        folder = as_folder(task.model, Path(task.scratch))
        self._vllm: Any = vllm
        settings: dict[str, Any] = {
            "dtype": "bfloat16" if computes_bf16() else "float32",
            "max_model_len": task.context,
            "max_num_seqs": task.sequences,
            "max_num_batched_tokens": max(task.context, 2048),
            "enable_prefix_caching": False,
        }
        self._llm: Any = vllm.LLM(model=str(folder), skip_tokenizer_init=True, disable_log_stats=False, **settings)
        self.identity = Identity(
            "vLLM",
            f"vllm {vllm.__version__}, torch {torch.__version__}",
            f"torch CPU capability {torch.backends.cpu.get_cpu_capability()}",
            {**settings, "VLLM_CPU_OMP_THREADS_BIND": os.environ["VLLM_CPU_OMP_THREADS_BIND"]},
        )

    def latency(self, prompt: list[int], output_tokens: int) -> Latency:
        """See ``Engine``; the stamps are vLLM's own."""
        output = self._generate([prompt], output_tokens)[0]
        metrics = output.metrics
        return Latency(
            metrics.first_token_latency,
            metrics.last_token_ts - metrics.first_token_ts,
            len(output.prompt_token_ids),
            len(output.outputs[0].token_ids),
        )

    def throughput(self, prompts: list[list[int]], output_tokens: int) -> Throughput:
        """See ``Engine``."""
        start = time.perf_counter()
        outputs = self._generate(prompts, output_tokens)
        seconds = time.perf_counter() - start
        return Throughput(seconds, sum(map(len, prompts)), sum(len(o.outputs[0].token_ids) for o in outputs))

    def _generate(self, prompts: list[list[int]], output_tokens: int) -> Any:
        params = self._vllm.SamplingParams(
            max_tokens=output_tokens, min_tokens=output_tokens, temperature=0, ignore_eos=True, detokenize=False
        )
        return self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def as_folder(model: str, scratch: Path) -> Path:
    """``model`` if it is a folder, else a bf16 safetensors folder made from the GGUF file, once."""
    path = Path(model)
    if path.is_dir():
        return path
    import torch

    from .transformers import load

    folder = scratch / f"{path.stem}-{path.stat().st_size}-bf16"
    if not (folder / "config.json").exists():
        loaded = load(model, torch.bfloat16)
        loaded.hf_quantizer = None
        if hasattr(loaded.config, "quantization_config"):
            del loaded.config.quantization_config
        part = folder.with_name(folder.name + f".part{os.getpid()}")
        loaded.save_pretrained(part)
        part.rename(folder)
    return folder


def main() -> None:
    serve(Vllm)
