"""How much of an output head a greedy step must read, for screens of some bits and bounds of some kinds.

    python benchmarks/head_bounds.py smollm2-135m [--every 4]

On real text, for a head in Q8_0: the screen reads the upper bits of each code. What it leaves open is bounded by the
worst case of each group of 32 columns (worst), by the norm of the row's rest times the activation's (norm), likewise
with columns weighed by how large they usually are (weighed), or after the activations' 16 main directions, of other
texts, were taken exactly (directions); built is what the engine does. Prints which share of the head's bytes is read:
the screen and the blocks of 16 rows that may hold the largest logit, which count 1.2 times for not lying together.
"""

from __future__ import annotations

import argparse

import numpy as np

from tokenmill.backends.backend import StepLimits
from tokenmill.bare_model import BareModel, open_bare
from tokenmill.evaluate.text import Kind, Part, corpus
from tokenmill.program.kv import PAGE_TOKENS
from tokenmill.program.step import SequenceStep, lay_plan
from tokenmill.sources import resolve
from tokenmill.weights.formats import TensorType

WINDOW, WINDOWS = 256, 2
DIRECTIONS = 16


def hidden_rows(model: BareModel, part: Part) -> np.ndarray:
    """What the head multiplies, over texts of code and prose."""
    backend, tokenizer = model.backend, model.tokenizer()
    tables = [list(range(WINDOW // PAGE_TOKENS))] * len(backend.kv_groups)
    rows = []
    for kind in (Kind.CODE, Kind.PROSE):
        ids = tokenizer.encode(corpus(kind, part, 8 * WINDOW * WINDOWS))
        for start in range(0, min(len(ids), WINDOW * WINDOWS), WINDOW):
            piece = ids[start : start + WINDOW]
            plan = lay_plan([SequenceStep(piece, 0, tables, range(len(piece)))], len(backend.kv_groups))
            rows.append(backend.run(plan, outputs=("hidden",))["hidden"][32:].copy())
    return np.concatenate(rows)


def as_multiplied(x: np.ndarray) -> np.ndarray:
    """The rows as the kernels see them: int8 with a scale for each 32."""
    groups = x.reshape(len(x), -1, 32)
    scale = np.maximum(np.abs(groups).max(-1, keepdims=True) / 127, 1e-30)
    return np.asarray(np.rint(groups / scale) * scale, np.float32).reshape(x.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--every", type=int, default=4, help="look at one row block of the head in so many")
    arguments = parser.parse_args()
    with open_bare(resolve(arguments.model), StepLimits(WINDOW, 1, WINDOW, WINDOW)) as model:
        name = next(n for n in ("output.weight", "token_embd.weight") if n in model.checkpoint.tensors)
        info = model.checkpoint.info(name)
        if info.tensor_type is not TensorType.Q8_0:
            parser.error(f"the head of {arguments.model} is {info.tensor_type.name}, not Q8_0")
        n, k = info.shape
        other, x = hidden_rows(model, Part.CALIBRATION), as_multiplied(hidden_rows(model, Part.EVALUATION)[::8])
        largest = np.full(len(x), -np.inf)
        for first in range(0, n, 16384):
            part = model.checkpoint.decode(name, (first, min(first + 16384, n)))
            largest = np.maximum(largest, (x @ part.T).max(axis=1))
        chosen = [model.checkpoint.raw(name, (16 * b, 16 * b + 16)) for b in range(0, n // 16, arguments.every)]
    blocks = np.concatenate(chosen).reshape(-1, k // 32, 34)
    scales = blocks[:, :, :2].copy().view(np.float16).astype(np.float32)
    codes = blocks[:, :, 2:].copy().view(np.int8).astype(np.int16)
    rows = len(codes)
    groups = np.abs(x).reshape(len(x), -1, 32).sum(-1)
    directions = np.linalg.svd(other, full_matrices=False)[2][:DIRECTIONS]
    logits = x @ (codes * scales).reshape(rows, k).T
    print(f"{arguments.model}: {name}, {n} x {k}, {len(x)} positions")

    def show(bits: int, kind: str, off: np.ndarray, bound: np.ndarray, extra: float) -> None:
        if not (np.abs(off) <= bound * (1 + 1e-4) + 1e-3).all():
            raise AssertionError(f"{bits} bits, {kind}: the bound is wrong")
        left = (logits - off + bound >= largest[:, None]).reshape(len(x), -1, 16).any(axis=2).mean(axis=1)
        read = ((bits + 0.5) * k / 8 + extra) / (8.5 * k / 8) + 1.2 * left
        low, high = np.quantile(read, [0.5, 0.95])
        print(f"  {bits} bits, {kind:10s} median {low:5.3f}  95 % {high:5.3f}  mean {read.mean():5.3f}", flush=True)

    for bits in (3, 4, 5, 6):
        step = 1 << (8 - bits)
        rest = ((codes - (codes // step * step + (step - 1) / 2)) * scales).reshape(rows, k).astype(np.float32)
        off = x @ rest.T
        show(bits, "worst", off, groups @ (np.abs(scales[:, :, 0]) * (step - 1) / 2).T, 0)
        show(bits, "norm", off, np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(rest, axis=1)), 4)
        usual = np.sqrt(np.sqrt((other**2).mean(0)) / np.sqrt((rest**2).mean(0)))
        bound = np.outer(np.linalg.norm(x / usual, axis=1), np.linalg.norm(rest * usual, axis=1))
        show(bits, "weighed", off, bound, 4)
        along = x @ directions.T
        usual = np.sqrt(
            np.sqrt(((other - other @ directions.T @ directions) ** 2).mean(0)) / np.sqrt((rest**2).mean(0))
        )
        bound = np.outer(np.linalg.norm((x - along @ directions) / usual, axis=1), np.linalg.norm(rest * usual, axis=1))
        show(bits, "directions", off - along @ (rest @ directions.T).T, bound, 6 + DIRECTIONS)
        sign = np.where(codes.max(-1) > -codes.min(-1), -1, 1)[..., None]
        coarse = np.clip((codes * sign + step // 2) // step, -(1 << (bits - 1)), (1 << (bits - 1)) - 1) * step * sign
        rest = ((codes - coarse) * scales).reshape(rows, k).astype(np.float32)
        worst = np.abs(rest).reshape(rows, -1, 32).max(-1)
        show(bits, "built", x @ rest.T, np.outer(np.linalg.norm(groups, axis=1), np.linalg.norm(worst, axis=1)), 4)


if __name__ == "__main__":
    main()
