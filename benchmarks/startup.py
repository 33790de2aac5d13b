"""Time from an empty interpreter to the first token, against llama-cpp-python, and peak memory of a first load.

    python benchmarks/startup.py MODEL [--llama-cpp-python PEER_VENV/bin/python] [--rounds 5] [--json FILE]

First load: an empty build cache, peak resident memory (VmHWM) against model + largest tensor. Later loads: both engines
in turn (A B A B), each in a process of its own, with the files in the page cache; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tokenmill.sources import resolve
from tokenmill.weights.checkpoint import open_checkpoint

PROMPT = "def fibonacci(n):"

OURS = """
import time
start = time.perf_counter()
import sys
from tokenmill import LLM, SamplingParams
model, prompt, cache, threads = sys.argv[1:5]
llm = LLM(model, cache_dir=cache, max_model_len=2048, threads=int(threads))
next(iter(llm.stream(prompt, SamplingParams(max_tokens=1, temperature=0))))
print(time.perf_counter() - start)
status = open("/proc/self/status").read()
print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
llm.close()
"""


def run(command: list[str]) -> list[float]:
    # An installed package has its bytecode; an environment that forbids writing it would compile at each start.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return [float(line) for line in done.stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--llama-cpp-python", help="python of a virtual environment with llama-cpp-python")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    path = resolve(arguments.model)
    threads = str(len(os.sched_getaffinity(0)))
    checkpoint = open_checkpoint(path)
    largest = max(tensor.nbytes for tensor in checkpoint.tensors.values())
    size = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    peer_script = str(Path(__file__).parent / "peers" / "llama_cpp_start.py")

    with tempfile.TemporaryDirectory() as cache:
        ours = [sys.executable, "-c", OURS, str(path), PROMPT, cache, threads]
        first_seconds, first_peak = run(ours)
        times: dict[str, list[float]] = {"tokenmill": [], "llama.cpp": []}
        peak = 0.0
        for _ in range(arguments.rounds):
            seconds, peak = run(ours)
            times["tokenmill"].append(seconds)
            if arguments.llama_cpp_python:
                times["llama.cpp"] += run([arguments.llama_cpp_python, peer_script, str(path), PROMPT, threads])
    excess = first_peak - size - largest
    print(
        f"first load     {first_seconds:.2f} s, peak {first_peak / 1e6:.0f} MB = model {size / 1e6:.0f} MB "
        f"+ largest tensor {largest / 1e6:.0f} MB {excess / 1e6:+.0f} MB"
    )
    print(f"later loads    tokenmill {statistics.median(times['tokenmill']):.2f} s, peak {peak / 1e6:.0f} MB")
    report: dict[str, object] = {
        "model": arguments.model,
        "first_seconds": first_seconds,
        "first_peak_bytes": first_peak,
        "model_bytes": size,
        "largest_tensor_bytes": largest,
        "seconds": times,
    }
    if times["llama.cpp"]:
        pairs = [a / b for a, b in zip(times["tokenmill"], times["llama.cpp"], strict=True)]
        report["ratio"] = statistics.median(pairs)
        print(
            f"               llama.cpp {statistics.median(times['llama.cpp']):.2f} s, "
            f"ratio pair by pair {statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
