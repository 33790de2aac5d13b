"""llama.cpp through llama-cpp-python's low-level API: its own batches, its own greedy sampler, no Python per token but
one call.

Flash attention, weights repacked for the processor where llama.cpp can, a batch as long as the prompt, one stream of
keys and values for each sequence.
"""

from __future__ import annotations

import time
from typing import Any

from .protocol import CannotError, Identity, Latency, Logits, Task, Throughput, serve

MICRO_BATCH = 512


class LlamaCpp:
    """One model and one context."""

    def __init__(self, task: Task) -> None:
        import llama_cpp

        if not task.model.endswith(".gguf"):
            raise CannotError("llama.cpp reads GGUF files only")
        self._api: Any = llama_cpp
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(task.model.encode(), model_params)
        if not self._model:
            raise CannotError("llama.cpp does not load this file (its reason is on standard error)")
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = task.sequences
        params.n_ctx = task.sequences * round_up(task.context, 256)
        params.n_batch = 2048
        params.n_ubatch = MICRO_BATCH
        params.n_threads = params.n_threads_batch = task.threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified = False
        params.no_perf = True
        self._batch_tokens = params.n_batch
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise CannotError("llama.cpp makes no context of this size (its reason is on standard error)")
        self._sampler = llama_cpp.llama_sampler_init_greedy()
        self._batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
        self.identity = Identity(
            "llama.cpp",
            f"llama-cpp-python {llama_cpp.__version__}",
            llama_cpp.llama_print_system_info().decode().strip(),
            {
                "flash_attn": True,
                "n_batch": params.n_batch,
                "n_ubatch": params.n_ubatch,
                "n_ctx": params.n_ctx,
                "n_seq_max": params.n_seq_max,
                "kv_unified": False,
                "type_k, type_v": "f16",
            },
        )

    def latency(self, prompt: list[int], output_tokens: int) -> Latency:
        """See ``Engine``."""
        self._clear()
        start = time.perf_counter()
        token = self._prefill([prompt])[0]
        first = time.perf_counter()
        for position in range(len(prompt), len(prompt) + output_tokens - 1):
            token = self._step([(token, position, 0, True)])[0]
        end = time.perf_counter()
        return Latency(first - start, end - first, len(prompt), output_tokens)

    def throughput(self, prompts: list[list[int]], output_tokens: int) -> Throughput:
        """See ``Engine``."""
        self._clear()
        start = time.perf_counter()
        tokens = self._prefill(prompts)
        for step in range(output_tokens - 1):
            tokens = self._step([(token, len(prompts[s]) + step, s, True) for s, token in enumerate(tokens)])
        seconds = time.perf_counter() - start
        return Throughput(seconds, sum(map(len, prompts)), len(prompts) * output_tokens)

    def logits(self, windows: list[list[int]], out: str) -> Logits:
        """See ``Engine``."""
        import ctypes

        vocabulary = self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model))
        row = ctypes.c_float * vocabulary
        with open(out, "wb") as file:
            for window in windows:
                self._clear()
                rows = [(token, position, 0, True) for position, token in enumerate(window)]
                for begin in range(0, len(rows), MICRO_BATCH):
                    part = rows[begin : begin + MICRO_BATCH]
                    self._decode(part)
                    for i in range(len(part)):
                        logits = self._api.llama_get_logits_ith(self._context, i)
                        file.write(row.from_address(ctypes.addressof(logits.contents)))
        return Logits(sum(map(len, windows)), vocabulary)

    def _clear(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def _prefill(self, prompts: list[list[int]]) -> list[int]:
        """The first token of each prompt; prompts share batches."""
        rows = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        tokens: list[int] = []
        for begin in range(0, len(rows), self._batch_tokens):
            tokens += self._step(rows[begin : begin + self._batch_tokens])
        return tokens

    def _step(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Runs rows (token, position, sequence, wants logits) and samples those that want it."""
        self._decode(rows)
        sample = self._api.llama_sampler_sample
        return [sample(self._sampler, self._context, i) for i, row in enumerate(rows) if row[3]]

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted
        status = self._api.llama_decode(self._context, batch)
        if status != 0:
            raise CannotError(f"llama_decode returned {status} for {len(rows)} tokens")


def round_up(tokens: int, unit: int) -> int:
    """``tokens`` as a multiple of ``unit``."""
    return -(-tokens // unit) * unit


def main() -> None:
    serve(LlamaCpp)
