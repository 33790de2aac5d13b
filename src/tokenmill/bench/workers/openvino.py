"""OpenVINO GenAI: its LLM pipeline for one request, its continuous batching for many; its own GGUF reader."""

from __future__ import annotations

import time
from typing import Any

from .protocol import Identity, Latency, Task, Throughput, serve


class OpenVino:
    """One pipeline, latency or throughput hint as the work asks."""

    def __init__(self, task: Task) -> None:
        import openvino
        import openvino_genai

        self._genai: Any = openvino_genai
        self._openvino: Any = openvino
        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": task.threads}
        if task.sequences > 1:
            scheduler = openvino_genai.SchedulerConfig()
            scheduler.max_num_seqs = task.sequences
            scheduler.max_num_batched_tokens = max(512, task.sequences)
            scheduler.enable_prefix_caching = False
            scheduler.cache_size = 2
            settings["PERFORMANCE_HINT"] = "THROUGHPUT"
            self._pipeline: Any = openvino_genai.LLMPipeline(task.model, "CPU", scheduler_config=scheduler, **settings)
        else:
            settings["PERFORMANCE_HINT"] = "LATENCY"
            self._pipeline = openvino_genai.LLMPipeline(task.model, "CPU", **settings)
        self.identity = Identity(
            "OpenVINO GenAI", f"openvino-genai {openvino_genai.__version__}", openvino.get_version(), settings
        )

    def latency(self, prompt: list[int], output_tokens: int) -> Latency:
        """See ``Engine``."""
        stamps: list[float] = []

        class Stamps(self._genai.StreamerBase):  # type: ignore[misc,name-defined]
            def write(streamer, token: Any) -> Any:  # noqa: N805  self is the engine
                stamps.extend([time.perf_counter()] * (len(token) if isinstance(token, list) else 1))
                return self._genai.StreamingStatus.RUNNING

            def end(streamer) -> None:  # noqa: N805
                pass

        start = time.perf_counter()
        result = self._generate([prompt], output_tokens, Stamps())
        produced = len(result.tokens[0])
        return Latency(stamps[0] - start, stamps[-1] - stamps[0], len(prompt), produced)

    def throughput(self, prompts: list[list[int]], output_tokens: int) -> Throughput:
        """See ``Engine``."""
        start = time.perf_counter()
        result = self._generate(prompts, output_tokens, None)
        seconds = time.perf_counter() - start
        return Throughput(seconds, sum(map(len, prompts)), sum(map(len, result.tokens)))

    def _generate(self, prompts: list[list[int]], output_tokens: int, streamer: Any) -> Any:
        import numpy as np

        config = self._pipeline.get_generation_config()
        config.max_new_tokens = config.min_new_tokens = output_tokens
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        ids = self._openvino.Tensor(np.array(prompts, dtype=np.int64))
        mask = self._openvino.Tensor(np.ones((len(prompts), len(prompts[0])), dtype=np.int64))
        inputs = self._genai.TokenizedInputs(ids, mask)
        if streamer is None:
            return self._pipeline.generate(inputs, config)
        return self._pipeline.generate(inputs, config, streamer)


def main() -> None:
    serve(OpenVino)
