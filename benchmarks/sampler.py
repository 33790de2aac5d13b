"""Milliseconds to sample one row of 152k logits, for each parameter and all together, on rows from peaked to flat.

    python benchmarks/sampler.py [--vocabulary 151936] [--samples 9]

One thread; the least of all samples, for on a shared machine the others measure the neighbours.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from tokenmill import _native

SETTINGS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "no filter": {},
    "penalties": {"frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "min_p": {"min_p": 0.05},
    "top_k 40": {"top_k": 40},
    "top_k 20k": {"top_k": 20_000},
    "top_p .95": {"top_p": 0.95},
    "typical .9": {"typical_p": 0.9},
    "logprobs": {"logprobs": 20},
    "usual": {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1, "logprobs": 5},
    "all": {
        **{"temperature": 2.0, "top_k": 80_000, "top_p": 0.95, "typical_p": 0.9},
        **{"frequency_penalty": 0.5, "logprobs": 20},
    },
}


def rows(vocabulary: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    normal = rng.normal(size=vocabulary)
    return {
        "all equal": np.zeros(vocabulary),
        "two levels": (normal > 0).astype(float),
        "few levels": np.round(4 * normal) / 2,
        "spread 0.5": 0.5 * normal,
        "spread 1": normal,
        "spread 2.5": 2.5 * normal,
        "spread 10": 10 * normal,
        "one token": np.where(np.arange(vocabulary) == 77, 30.0, normal),
        "heavy tail": -1.1 * np.log1p(rng.permutation(vocabulary)),
        "half excluded": np.where(rng.random(vocabulary) < 0.5, -np.inf, normal),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--samples", type=int, default=9)
    arguments = parser.parse_args()
    vocabulary = arguments.vocabulary
    sampler = _native.Sampler(vocabulary, _native.ThreadPool(1))
    tokens = np.random.default_rng(2).integers(0, vocabulary, size=4000).astype(np.int32)
    print(f"{'row':14s}" + "".join(f"{name:>11s}" for name in SETTINGS))
    for name, row in rows(vocabulary).items():
        logits = np.ascontiguousarray(row[None], np.float32)
        times = []
        for settings in SETTINGS.values():
            least = float("inf")
            for seed in range(arguments.samples):
                own = _native.SamplerSettings(seed=seed, **settings)  # type: ignore[arg-type]
                output = [_native.TokenHistory(own, tokens, 2000)]
                start = time.perf_counter()
                sampler.sample(logits, [0], output)
                least = min(least, time.perf_counter() - start)
            times.append(least)
        print(f"{name:14s}" + "".join(f"{1e3 * each:11.2f}" for each in times), flush=True)


if __name__ == "__main__":
    main()
