"""What a screened head brings on real text: milliseconds of a greedy step, bytes of the head that it reads, memory.

    python benchmarks/head_screen.py gemma-3-270m [--tokens 96] [--batch 1]

Continues pieces of code and of prose from this machine's Python, eight tokens with the whole head, the same eight with
the screen and so on in turn, and compares the tokens.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from tokenmill.backends.backend import StepLimits
from tokenmill.backends.native import NativeBackend
from tokenmill.bare_model import open_bare
from tokenmill.evaluate.text import Kind, Part, corpus
from tokenmill.program.kv import PAGE_TOKENS
from tokenmill.program.step import SequenceStep, lay_plan
from tokenmill.sources import resolve

PROMPT, TURN = 128, 8


class Text:
    """Sequences that are continued together, from where they stand, as often as one likes."""

    def __init__(self, backend: NativeBackend, prompts: list[list[int]], context: int) -> None:
        pages = context // PAGE_TOKENS
        tables = [[list(range(row * pages, (row + 1) * pages))] * len(backend.kv_groups) for row in range(len(prompts))]
        self._backend, self._tables = backend, tables
        self.length = PROMPT
        self.last = [prompt[-1] for prompt in prompts]
        for prompt, table in zip(prompts, tables, strict=True):
            backend.run(lay_plan([SequenceStep(prompt[:-1], 0, table)], len(backend.kv_groups)), outputs=("hidden",))

    def turn(self, *, best_only: bool) -> tuple[list[list[int]], float]:
        """The next tokens, which are not kept, and the median of a step's seconds."""
        last, found, seconds = self.last, [], []
        for slot in range(self.length - 1, self.length - 1 + TURN):
            parts = [SequenceStep([token], slot, table, [0]) for token, table in zip(last, self._tables, strict=True)]
            plan = lay_plan(parts, len(self._backend.kv_groups), best_only=best_only)
            start = time.perf_counter()
            logits = self._backend.run(plan)["logits"]
            seconds.append(time.perf_counter() - start)
            last = [int(token) for token in logits.argmax(axis=1)]
            found.append(last)
        return found, float(np.median(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    context = -(-(PROMPT + arguments.tokens + TURN) // PAGE_TOKENS) * PAGE_TOKENS
    limits = StepLimits(PROMPT, arguments.batch, arguments.batch, context)
    with open_bare(resolve(arguments.model), limits, threads=arguments.threads, screened_head=True) as model:
        backend = model.backend
        assert isinstance(backend, NativeBackend)
        tokenizer = model.tokenizer()
        rows = backend.program.vocab_size
        print(f"{arguments.model}: the screen takes {backend.screen_bytes() / 1e6:.1f} MB")
        for kind in (Kind.CODE, Kind.PROSE):
            ids = tokenizer.encode(corpus(kind, Part.EVALUATION, 8 * PROMPT * (arguments.batch + 1)))
            text = Text(backend, [ids[i * PROMPT : (i + 1) * PROMPT] for i in range(arguments.batch)], context)
            times: dict[bool, list[float]] = {False: [], True: []}
            blocks, different = [], 0
            for number in range(arguments.tokens // TURN):
                found = {}
                for screened in ((False, True), (True, False))[number % 2]:
                    before = backend.screen_counts()
                    found[screened], seconds = text.turn(best_only=screened)
                    times[screened].append(seconds)
                    after = backend.screen_counts()
                    if after.rows > before.rows:
                        blocks.append((after.blocks - before.blocks) / (after.rows - before.rows))
                different += found[True] != found[False]
                text.length += TURN
                text.last = found[False][-1]
            plain, screened_times = np.array(times[False][1:]), np.array(times[True][1:])
            low, middle, high = np.quantile(screened_times / plain, [0.25, 0.5, 0.75])
            beside = 100 * np.array(blocks) * 16 / rows
            print(
                f"  {kind.value:6s}{1e3 * np.median(plain):6.2f} ms a step, screened "
                f"{1e3 * np.median(screened_times):.2f}; paired {middle:.3f} ({low:.3f} to {high:.3f}); beside it "
                f"{np.median(beside):.2f} % of the head (mean {np.mean(beside):.2f} %); "
                f"{different} turns of {len(plain) + 1} differ"
            )


if __name__ == "__main__":
    main()
