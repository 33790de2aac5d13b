"""What it would bring to run Python beside a step instead of between two.

    python benchmarks/overlap.py smollm2-135m --work 100 200

In turn: a decode step alone, with some work of Python before it, and with the same work in another thread beside it.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time

import numpy as np

from tokenmill.backends.backend import Backend, StepLimits
from tokenmill.bare_model import open_bare
from tokenmill.program.kv import PAGE_TOKENS
from tokenmill.program.step import SequenceStep, StepPlan, lay_plan
from tokenmill.sources import resolve


def work(iterations: int) -> None:
    """A fixed amount of Python."""
    total = 0
    for i in range(iterations):
        total += i


def iterations_of(seconds: float) -> int:
    """How many iterations of :func:`work` take so long."""
    count = 1000
    for _ in range(3):
        start = time.perf_counter()
        work(count)
        count = max(int(count * seconds / (time.perf_counter() - start)), 1)
    return count


def measure(backend: Backend, plan: StepPlan, iterations: int, rounds: int) -> tuple[float, ...]:
    """Median seconds: alone, work before, work beside."""
    begin, ended = threading.Semaphore(0), threading.Semaphore(0)

    def beside() -> None:
        for _ in range(rounds):
            begin.acquire()
            work(iterations)
            ended.release()

    threading.Thread(target=beside, daemon=True).start()
    times: tuple[list[float], ...] = ([], [], [])
    for _ in range(rounds):
        marks = [time.perf_counter()]
        backend.run(plan, outputs=())
        marks.append(time.perf_counter())
        work(iterations)
        backend.run(plan, outputs=())
        marks.append(time.perf_counter())
        begin.release()
        backend.run(plan, outputs=())
        ended.acquire()
        marks.append(time.perf_counter())
        for kept, start, end in zip(times, marks[:-1], marks[1:], strict=True):
            kept.append(end - start)
    return tuple(statistics.median(kept) for kept in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--work", type=float, nargs="+", default=[100.0, 200.0], help="microseconds")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--depth", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=250)
    arguments = parser.parse_args()
    depth = arguments.depth
    limits = StepLimits(depth, 1, 1, depth + 1)
    with open_bare(resolve(arguments.model), limits, threads=arguments.threads) as model:
        groups = len(model.backend.kv_groups)
        tables = [list(range(-(-(depth + 1) // PAGE_TOKENS)))] * groups
        prompt = SequenceStep(np.arange(depth, dtype=np.int32), 0, tables)
        model.backend.run(lay_plan([prompt], groups), outputs=())
        plan = lay_plan([SequenceStep([7], depth, tables, [0])], groups)
        for wanted in arguments.work:
            iterations = iterations_of(1e-6 * wanted)
            alone, before, overlapped = measure(model.backend, plan, iterations, arguments.rounds)
            print(
                f"a step alone {1e6 * alone:.0f} us; {wanted:.0f} us of Python before it: "
                f"{1e6 * (before - alone):+.0f} us, beside it: {1e6 * (overlapped - alone):+.0f} us"
            )


if __name__ == "__main__":
    main()
