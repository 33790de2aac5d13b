"""Minutes of random requests and random cancels against a server of its own: does memory stay flat, are all pages back?

    python scripts/soak.py smollm2-135m --minutes 30 [--rate 2] [SERVE OPTIONS]

Arrivals are Poisson. A third of the clients leave at a random moment: before the answer, in prefill, in the middle of a
stream. The KV cache is small, so that every page of it has been written to, and counts as resident, before the warm-up
is over; prompts that do not fit wait or preempt others. Prints resident memory of the server and its engine, the slope
of their sum after the warm-up (least squares) and the pages that are still held once nothing runs. Exits with 1 if a
page is lost, if memory grows by a MB a minute or more, or if a request fails.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np

WARM_UP = 0.25
"""Share of the time before memory counts: until then pages and buffers are touched for the first time."""
MOST_WARM_UP = 180.0
SAMPLE_SECONDS = 1.0
SLOPE_LIMIT = 1.0
"""MB a minute."""
LEAVES = 1 / 3
MOST_OPEN = 64
"""Requests at once. A machine that is too slow for the rate would pile them up, which is memory too, but no leak."""
PATIENCE = 900.0
"""Seconds for the next byte: on a busy machine an answer may take long, and that is not what this looks for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
    parser.add_argument("--seed", type=int, default=0)
    given, options = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server ends with this process
    limits = ["--max-model-len", "1024", "--max-num-seqs", "16", "--memory", "350MB", *options]
    command = [sys.executable, "-m", "tokenmill", "serve", given.model, "--served-model-name", "m", "--port", "0"]
    with subprocess.Popen([*command, *limits], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        address = re.search(r"(https?://\S+)/v1$", server.stdout.readline().rstrip())
        if address is None:
            sys.exit("the server did not start")
        try:
            good = asyncio.run(soak(address[1], server.pid, given.minutes * 60, given.rate, random.Random(given.seed)))
        finally:
            server.terminate()
    sys.exit(0 if good and server.returncode == 0 else 1)


async def soak(url: str, pid: int, seconds: float, rate: float, rng: random.Random) -> bool:
    """Runs the load and prints what came of it. True if memory stayed flat, no page is lost and no request failed."""
    ends: Counter[str] = Counter()
    samples: list[tuple[float, float, float]] = []
    tasks: set[asyncio.Task[None]] = set()
    begin = time.monotonic()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, trust_env=False, limits=limits) as client:
        due, sampled = begin, begin
        while (now := time.monotonic()) < begin + seconds:
            if now >= sampled:
                samples.append(((now - begin) / 60, *resident_mb(pid)))
                sampled = now + SAMPLE_SECONDS
            if now >= due and len(tasks) == MOST_OPEN:
                due = now + SAMPLE_SECONDS
            elif now >= due:
                task = asyncio.create_task(one_request(client, rng, ends))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                due += rng.expovariate(rate)
            await asyncio.sleep(max(0.0, min(due, sampled) - time.monotonic()))
        await asyncio.gather(*tasks)
        held = await held_pages(client)
    warm = min(WARM_UP * seconds, MOST_WARM_UP) / 60
    settled = np.array([sample for sample in samples if sample[0] >= warm])
    slope = float(np.polyfit(settled[:, 0], settled[:, 1] + settled[:, 2], 1)[0])
    print(f"{seconds / 60:g} minutes, {rate:g} requests a second: {dict(ends)}")
    for name, place in (("server", 1), ("engine", 2)):
        first, last = settled[0, place], settled[-1, place]
        print(f"{name}: {first:.1f} MB resident after {warm:.1f} minutes, {last:.1f} MB at the end")
    print(f"slope after that: {slope:+.3f} MB a minute; pages held at the end: {held}")
    failed = sum(count for end, count in ends.items() if end not in ("ended", "left"))
    return held == 0 and slope < SLOPE_LIMIT and failed == 0


async def one_request(client: httpx.AsyncClient, rng: random.Random, ends: Counter[str]) -> None:
    """Sends one request; counts how it ended."""
    shared = [7 * i % 997 for i in range(rng.choice((0, 0, 64, 320)))]
    body: dict[str, Any] = {
        "model": "m",
        "prompt": shared + [rng.randrange(1000) for _ in range(rng.choice((1, 20, 100, 500)))],
        "max_tokens": rng.randrange(1, 100),
        "temperature": rng.choice((0, 1)),
        "n": rng.choice((1, 1, 1, 3)),
        "ignore_eos": True,
        "stream": rng.random() < 0.7,
    }
    leaving = rng.expovariate(1.0) if rng.random() < LEAVES else None
    try:
        async with asyncio.timeout(leaving), client.stream("POST", "/v1/completions", json=body) as answer:
            text = (await answer.aread()).decode()
            whole = "data: [DONE]" in text if body["stream"] else '"choices"' in text
            ends["ended" if answer.status_code == 200 and whole and '"error"' not in text else text[:200]] += 1
    except TimeoutError:
        ends["left"] += 1
    except httpx.HTTPError as error:
        ends[f"{type(error).__name__}: {error}"] += 1


async def held_pages(client: httpx.AsyncClient, patience: float = 60.0) -> int:
    """Pages that are still in use after everything has ended."""
    used = re.compile(r'^tokenmill:kv_pages\{.*state="used".*\} (\S+)$', re.MULTILINE)
    deadline = time.monotonic() + patience
    while True:
        pages = int(sum(map(float, used.findall((await client.get("/metrics")).text))))
        if not pages or time.monotonic() > deadline:
            return pages
        await asyncio.sleep(0.1)


def resident_mb(pid: int) -> tuple[float, float]:
    """Resident memory of the server and of its engine."""
    read: Callable[[int], float] = lambda of: int(Path(f"/proc/{of}/statm").read_text().split()[1]) * 4096 / 1e6  # noqa: E731
    (engine,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return read(pid), read(int(engine))


if __name__ == "__main__":
    main()
