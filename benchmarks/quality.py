"""What the native backend loses against fp32 on the same decoded weights, paired with what llama.cpp loses.

    python benchmarks/quality.py MODEL... --llama-cpp-python PEER_VENV/bin/python [--tokens 2000] [--json FILE]

``tokenmill eval kl`` on one text, for several models: Python source and documentation from the running interpreter's
standard library, or what ``--text`` names (a file or corpus:prose, as there). The rounding of a window's first tokens
stays with all that follow, so the interval is drawn over whole windows. Besides the native backend with fp16 and bf16
keys and values, and llama.cpp (fp16 KV, flash attention) on the same file and tokens, it measures how much comes from
int8 activations and from the KV element alone (torch backend, one at a time).

Where other work shares the machine, OMP_NUM_THREADS=1 makes the torch backend many times faster.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from tokenmill.bench.peers import PEERS
from tokenmill.bench.record import record, write_record
from tokenmill.cache_folder import cache_folder
from tokenmill.evaluate.divergence import DivergenceReport, measure_divergence
from tokenmill.evaluate.runs import parse_run
from tokenmill.evaluate.text import read_texts


def real_text() -> str:
    """Python source (argparse, json.decoder) and prose (help topics), from any CPython 3.11 and later."""
    import argparse as code
    import json.decoder as more_code
    import pydoc_data.topics as prose

    parts = [Path(code.__file__).read_text()[:16000], Path(more_code.__file__).read_text()[:8000]]
    topics = [prose.topics[name] for name in sorted(prose.topics)]
    parts.append("\n\n".join(topics)[20000:48000])
    return "\n\n".join(parts)


def show(report: DivergenceReport) -> None:
    print(f"{report.reference}: {report.tokens} tokens in windows of {report.window}", flush=True)
    for run in report.runs:
        ratio = "" if run.ratio is None else f"  first / this {run.ratio}"
        print(f"  {run.name:50s} {run.summary or 'FAILED: ' + str(run.error)}{ratio}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--llama-cpp-python", help="python of a virtual environment with llama-cpp-python")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--window", type=int, default=128, help="tokens a window; the interval is drawn over windows")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--text", help="a UTF-8 file or corpus:code, corpus:prose, corpus:mixed")
    parser.add_argument("--no-shares", action="store_true", help="skip what activations and KV cost alone (slow)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    runs = ["native", "native/bf16"] + ([] if arguments.no_shares else ["torch/f32+int8", "torch/f16"])
    peer = arguments.llama_cpp_python
    text = real_text() if arguments.text is None else read_texts([arguments.text])
    reports = []
    for model in arguments.models:
        report = measure_divergence(
            parse_run("torch", model),
            [parse_run(run, model) for run in runs],
            [] if peer is None else [(PEERS["llama.cpp"], peer)],
            text,
            cache_folder() / "references",
            tokens=arguments.tokens,
            window=arguments.window,
            threads=arguments.threads,
        )
        show(report)
        reports.append(asdict(report))
    if arguments.json:
        write_record(arguments.json, record("quality", {"models": reports}))


if __name__ == "__main__":
    main()
