"""Mutated model files: each one opens and decodes or ends in one of our errors, in bounded time and memory."""

import json
import resource
import struct
import time

import numpy as np
import pytest
from model_files import small_model
from safetensors.numpy import save_file

from tokenmill.errors import ModelFileError, UnsupportedModelError
from tokenmill.weights.checkpoint import open_checkpoint

SECONDS = 2.0
GROWTH_BYTES = 64 << 20
SPECIAL = [0, 1, 7, 8, 9, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def mutate(rng: np.random.Generator, whole: bytes, header: int) -> bytes:
    """Up to four mutations, nine in ten within the first ``header`` bytes, where structure is."""
    data = bytearray(whole)
    for _ in range(rng.integers(1, 5)):
        end = min(len(data), header) if rng.random() < 0.9 else len(data)
        position = int(rng.integers(0, max(end, 1)))
        kind = rng.integers(0, 7)
        if kind == 0:
            data[position : position + 1] = bytes([int(rng.integers(0, 256))])
        elif kind == 1:
            data[position : position + 1] = bytes(
                [(data[position] if position < len(data) else 0) ^ 1 << int(rng.integers(0, 8))]
            )
        elif kind == 2:
            del data[position:]
        elif kind == 3:
            data[position:position] = rng.bytes(int(rng.integers(1, 17)))
        elif kind == 4:
            del data[position : position + int(rng.integers(1, 17))]
        elif kind == 5:
            data[position : position + 8] = struct.pack("<Q", int(rng.choice(np.array(SPECIAL, dtype=np.uint64))))
        else:
            source = int(rng.integers(0, max(len(data), 1)))
            data[position : position + 24] = data[source : source + 24]
    return bytes(data)


def exercise(path) -> bool:
    """Opens, reads all metadata and decodes all tensors. Returns whether the file was accepted."""
    try:
        with open_checkpoint(path) as checkpoint:
            dict(checkpoint.metadata)
            for name, info in checkpoint.tensors.items():
                assert checkpoint.decode(name).shape == info.shape
        return True
    except (ModelFileError, UnsupportedModelError):
        return False


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz(path, open_path, whole: bytes, header: int, *, seed: int, mutations: int) -> None:
    path.write_bytes(whole)
    assert exercise(open_path)
    before = peak_bytes()
    rng = np.random.default_rng(seed)
    accepted = 0
    for index in range(mutations):
        path.write_bytes(mutate(rng, whole, header))
        start = time.process_time()
        accepted += exercise(open_path)
        assert time.process_time() - start < SECONDS, f"mutation {index} of seed {seed}"
    assert peak_bytes() - before < GROWTH_BYTES
    assert accepted < mutations, "no mutation was refused: the fuzzer does not reach the structure"


def fuzz_gguf(tmp_path, seed: int, mutations: int) -> None:
    whole = small_model().bytes()
    path = tmp_path / "mutated.gguf"
    fuzz(path, path, whole, whole.index(b"matrix.IQ4_NL") + 64, seed=seed, mutations=mutations)


def test_mutated_gguf_files(tmp_path):
    fuzz_gguf(tmp_path, seed=0, mutations=500)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_ten_thousand_mutated_gguf_files(tmp_path, seed):
    fuzz_gguf(tmp_path, seed, mutations=1000)


def test_mutated_safetensors_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    path = tmp_path / "model.safetensors"
    save_file({f"tensor.{i}": np.ones((i + 1, 8), dtype=np.float16) for i in range(8)}, path, metadata={"format": "pt"})
    whole = path.read_bytes()
    fuzz(path, tmp_path, whole, 8 + struct.unpack("<Q", whole[:8])[0], seed=0, mutations=500)
