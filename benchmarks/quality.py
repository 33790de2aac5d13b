"""What the native backend loses against fp32 on the same decoded weights, paired with what llama.cpp loses.

    python benchmarks/quality.py MODEL... --llama-cpp-python PEER_VENV/bin/python [--tokens 2000] [--json FILE]

The reference is the torch backend in fp32 on the checkpoint's decoded weights, over windows of real text: Python source
and documentation from the running interpreter's standard library. The rounding of a window's first tokens stays with
all that follow, so the interval is drawn over whole windows. For each model the report holds the divergence of the
native backend, of llama.cpp (fp16 KV, flash attention) on the same file and tokens, their ratio with a 95 % interval,
and how much comes from int8 activations and from the KV element alone (torch backend, one at a time).

Where other work shares the machine, OMP_NUM_THREADS=1 makes the torch backend many times faster.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import tokenmill
from tokenmill.backends.backend import Backend, StepLimits
from tokenmill.backends.native import NativeBackend
from tokenmill.backends.torch import TorchBackend
from tokenmill.evaluate.kl import kl_divergence, ratio_interval, summarize, windows
from tokenmill.evaluate.logits import logits_by_position
from tokenmill.models import bind
from tokenmill.program.kv import PAGE_TOKENS, KvElement
from tokenmill.sources import resolve
from tokenmill.tokenizer import load_tokenizer
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.packing import load_weights

ROWS = 64


def real_text() -> str:
    """Python source (argparse, json.decoder) and prose (the interpreter's licence), from any CPython 3.11 and later."""
    import argparse as code
    import json.decoder as more_code
    import pydoc_data.topics as prose

    parts = [Path(code.__file__).read_text()[:16000], Path(more_code.__file__).read_text()[:8000]]
    topics = [prose.topics[name] for name in sorted(prose.topics)]
    parts.append("\n\n".join(topics)[20000:48000])
    return "\n\n".join(parts)


def all_logits(backend: Backend, cut: list[list[int]]) -> Iterator[np.ndarray]:
    for tokens in cut:
        for _, rows in logits_by_position(backend, tokens):
            yield rows


def divergence(reference: np.ndarray, rows: Iterator[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Per-token KL and top-token agreement of streamed rows against the stored reference."""
    kl, same, start = [], [], 0
    for block in rows:
        for piece in np.array_split(block, -(-len(block) // 16)):
            expected = reference[start : start + len(piece)]
            kl.append(kl_divergence(expected, piece))
            same.append(expected.argmax(axis=1) == piece.argmax(axis=1))
            start += len(piece)
    return np.concatenate(kl), np.concatenate(same)


def measure(name: str, tokens: int, peer: str | None, threads: int, window: int, *, shares: bool) -> dict[str, object]:
    checkpoint = open_checkpoint(resolve(name))
    shapes = {info.name: info.shape for info in checkpoint.tensors.values()}
    bound = bind(checkpoint.metadata, checkpoint.kind, shapes)
    tokenizer = load_tokenizer(checkpoint)
    text = real_text()
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    bos = tokenizer.encode(
        "", add_special=True
    )  # only where the model wants one: to others it is a token like no other
    cut = windows(ids[: tokens + window], window, bos[0] if bos else None)[: -(-tokens // window)]
    limits = StepLimits(tokens=ROWS, sequences=1, sampled=ROWS, context=window)
    pages = [window // PAGE_TOKENS] * len(bound.program.kv_groups)
    weights = load_weights(checkpoint, bound)
    formats = {name: weights.matrix(name).format for name, shape in bound.program.weights.items() if len(shape) == 2}
    total = sum(map(len, cut))
    report: dict[str, object] = {
        "model": name,
        "tokens": total,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }

    with tempfile.TemporaryDirectory() as folder:
        reference = np.memmap(Path(folder) / "reference.f32", np.float32, "w+", shape=(total, bound.config.vocab_size))

        def torch_backend(kv: KvElement, emulate: bool) -> Callable[[], TorchBackend]:
            program = bound.program.with_kv_element(kv)
            return lambda: TorchBackend(
                program, weights, limits, pages, emulate_activations=formats if emulate else None
            )

        backend = torch_backend(KvElement.F32, False)()
        start = 0
        for rows in all_logits(backend, cut):
            reference[start : start + len(rows)] = rows
            start += len(rows)
        backend.close()

        def against_reference(label: str, make: Callable[[], Backend]) -> np.ndarray:
            gc.collect()
            begin = time.perf_counter()
            backend = make()
            kl, same = divergence(reference, all_logits(backend, cut))
            backend.close()
            summary = summarize(kl, same)
            print(f"  {label:28s} {summary}  [{time.perf_counter() - begin:.1f} s]", flush=True)
            report[label] = (
                summary.__dict__
                if hasattr(summary, "__dict__")
                else {field: getattr(summary, field) for field in summary.__slots__}
            )
            return kl

        print(f"{name}: {total} tokens in windows of {window}", flush=True)
        native = against_reference(
            "native",
            lambda: NativeBackend(bound.program.with_kv_element(KvElement.F16), weights, limits, pages, threads),
        )
        against_reference(
            "native, bf16 KV",
            lambda: NativeBackend(bound.program.with_kv_element(KvElement.BF16), weights, limits, pages, threads),
        )
        if shares:
            against_reference("activations alone", torch_backend(KvElement.F32, True))
            against_reference("fp16 KV alone", torch_backend(KvElement.F16, False))
        if peer is not None:
            cut_file, out_file = Path(folder) / "windows.json", Path(folder) / "peer.f32"
            cut_file.write_text(json.dumps(cut))
            script = Path(__file__).parent / "peers" / "llama_cpp_logits.py"
            command = [peer, str(script), str(resolve(name)), str(cut_file), str(out_file), str(threads)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            report["llama.cpp build"] = json.loads(done.stdout.splitlines()[-1])
            rows = np.memmap(out_file, np.float32, "r", shape=reference.shape)
            kl, same = divergence(reference, iter([rows]))
            print(f"  {'llama.cpp':28s} {summarize(kl, same)}", flush=True)
            ratio, lower, upper = ratio_interval(native, kl, block=window)
            report["ratio to llama.cpp"] = {"ratio": ratio, "lower": lower, "upper": upper}
            print(f"  native / llama.cpp           {ratio:.3f}  (95 % interval {lower:.3f} to {upper:.3f})", flush=True)
    weights.close()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--llama-cpp-python", help="python of a virtual environment with llama-cpp-python")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--window", type=int, default=128, help="tokens a window; the interval is drawn over windows")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--no-shares", action="store_true", help="skip what activations and KV cost alone (slow)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    threads = arguments.threads or len(__import__("os").sched_getaffinity(0))
    reports = [
        measure(
            name,
            arguments.tokens,
            arguments.llama_cpp_python,
            threads,
            arguments.window,
            shares=not arguments.no_shares,
        )
        for name in arguments.models
    ]
    if arguments.json:
        record = {"tokenmill": tokenmill.__version__, "command": sys.argv, "models": reports}
        arguments.json.write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
