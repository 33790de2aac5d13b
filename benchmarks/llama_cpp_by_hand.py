"""Are `bench compare`'s figures of llama.cpp those that llama-cpp-python's own interface gives? Timed in turn.

    PEER_VENV/bin/python benchmarks/llama_cpp_by_hand.py MODEL.gguf [--prompt-tokens 128] [--rounds 3]

Runs in the peer's environment; the worker is the one that `bench compare` starts. Prints medians of tokens per second
and their ratio, and exits 1 if one is off by more than 10 %.
"""

import argparse
import importlib
import os
import random
import statistics
import sys
import time
import types
from pathlib import Path

WORKERS = Path(__file__).parents[1] / "src" / "tokenmill" / "bench" / "workers"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    import llama_cpp

    package = types.ModuleType("bench_workers")
    package.__path__ = [str(WORKERS)]
    sys.modules[package.__name__] = package
    protocol = importlib.import_module("bench_workers.protocol")
    context = given.prompt_tokens + given.output_tokens
    task = protocol.Task(given.model, given.threads, context, 1, "")
    worker = importlib.import_module("bench_workers.llama_cpp").LlamaCpp(task)
    llama = llama_cpp.Llama(
        given.model,
        n_ctx=context,
        n_batch=2048,
        n_threads=given.threads,
        n_threads_batch=given.threads,
        flash_attn=True,
        verbose=False,
    )

    def by_hand(prompt):
        llama.reset()
        start = time.perf_counter()
        llama.eval(prompt)
        token = llama.sample(temp=0.0)
        first = time.perf_counter()
        for _ in range(given.output_tokens - 1):
            llama.eval([token])
            token = llama.sample(temp=0.0)
        return first - start, time.perf_counter() - first

    def by_worker(prompt):
        answer = worker.latency(prompt, given.output_tokens)
        return answer.prefill_seconds, answer.decode_seconds

    draw = random.Random(0)
    rates = {by_worker: [], by_hand: []}
    for number in range(given.rounds + 1):
        prompt = [draw.randrange(llama.n_vocab()) for _ in range(given.prompt_tokens)]
        for run, kept in rates.items():
            prefill, decode = run(prompt)
            if number > 0:  # the first one warms up
                kept.append((given.prompt_tokens / prefill, (given.output_tokens - 1) / decode))
    sound = True
    for index, name in enumerate(("prefill", "decode")):
        ours, theirs = (statistics.median(rate[index] for rate in rates[run]) for run in (by_worker, by_hand))
        sound &= abs(ours / theirs - 1) <= 0.10
        print(f"{name}: compare's worker {ours:.1f} tokens/s, by hand {theirs:.1f}, ratio {ours / theirs:.3f}")
    sys.exit(not sound)


if __name__ == "__main__":
    main()
