"""Builds small model files for the tests: GGUF byte by byte (so that any byte can be wrong), and program bindings."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from tokenmill.program.ops import WeightFormat
from tokenmill.weights.checkpoint import Checkpoint
from tokenmill.weights.formats import TensorType
from tokenmill.weights.gguf import ValueType

_NUMBERS = {
    ValueType.UINT8: "<B", ValueType.INT8: "<b", ValueType.UINT16: "<H", ValueType.INT16: "<h", ValueType.UINT32: "<I",
    ValueType.INT32: "<i", ValueType.FLOAT32: "<f", ValueType.BOOL: "<?", ValueType.UINT64: "<Q", ValueType.INT64: "<q",
    ValueType.FLOAT64: "<d",
}  # fmt: skip


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    """A metadata entry from its parts."""
    return string(key) + struct.pack("<I", kind) + value


def number(key: str, kind: ValueType, value: float) -> bytes:
    return entry(key, kind, struct.pack(_NUMBERS[kind], value))


def array(element: int, count: int, elements: bytes) -> bytes:
    return struct.pack("<IQ", element, count) + elements


def strings(texts: list[str]) -> bytes:
    return array(ValueType.STRING, len(texts), b"".join(map(string, texts)))


def tensor(name: str | bytes, extents: tuple[int, ...], kind: int, offset: int) -> bytes:
    """A tensor entry; ``extents`` in the file's order, the row's length first."""
    return string(name) + struct.pack(f"<I{len(extents)}QIQ", len(extents), *extents, kind, offset)


@dataclass
class GgufFile:
    """The parts of a GGUF file. ``bytes()`` joins them; counts follow the parts unless set."""

    entries: list[bytes] = field(default_factory=list)
    tensors: list[bytes] = field(default_factory=list)
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: bytes = struct.pack("<I", 3)
    tensor_count: int | None = None
    entry_count: int | None = None
    alignment: int = 32

    def bytes(self) -> bytes:
        counts = (
            len(self.tensors) if self.tensor_count is None else self.tensor_count,
            len(self.entries) if self.entry_count is None else self.entry_count,
        )
        head = self.magic + self.version + struct.pack("<QQ", *counts) + b"".join(self.entries + self.tensors)
        return head + b"\0" * (-len(head) % self.alignment) + self.data

    def write(self, path: Path) -> Path:
        path.write_bytes(self.bytes())
        return path


def small_model(seed: int = 0) -> GgufFile:
    """One tensor of every supported type and a metadata value of every kind."""
    rng = np.random.default_rng(seed)
    file = GgufFile()
    file.entries = [
        entry("general.architecture", ValueType.STRING, string("llama")),
        number("general.alignment", ValueType.UINT32, 32),
        *(number(f"number.{kind.name.lower()}", kind, 1) for kind in _NUMBERS),
        entry("list.words", ValueType.ARRAY, strings(["a", "", "Ġthe", "日本", "x" * 300])),
        entry("list.numbers", ValueType.ARRAY, array(ValueType.INT32, 3, struct.pack("<3i", -1, 0, 7))),
        entry("list.floats", ValueType.ARRAY, array(ValueType.FLOAT32, 2, struct.pack("<2f", 0.5, -2.0))),
        entry("list.truths", ValueType.ARRAY, array(ValueType.BOOL, 2, b"\1\0")),
    ]
    for tensor_type in (t for t in TensorType if t.supported):
        file.data += b"\0" * (-len(file.data) % 32)
        n, k = 5, 512
        file.tensors.append(tensor(f"matrix.{tensor_type.name}", (k, n), tensor_type, len(file.data)))
        file.data += finite_blocks(rng, tensor_type, n * k).tobytes()
    return file


def finite_blocks(rng: np.random.Generator, tensor_type: TensorType, values: int) -> np.ndarray:
    """Random blocks whose scales are ordinary numbers."""
    blocks = rng.integers(0, 256, (values // tensor_type.block_size, tensor_type.block_bytes), dtype=np.uint8)
    if tensor_type is TensorType.F32:
        return rng.standard_normal(values, dtype=np.float32).view(np.uint8)
    if tensor_type is TensorType.F16:
        return rng.standard_normal(values).astype(np.float16).view(np.uint8)
    if tensor_type is TensorType.BF16:
        return np.ascontiguousarray(
            rng.standard_normal(values, dtype=np.float32).view(np.uint8).reshape(-1, 4)[:, 2:]
        ).reshape(-1)
    for offset in _SCALE_OFFSETS[tensor_type]:
        scales = rng.uniform(0.001, 0.1, len(blocks)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(-1)


_SCALE_OFFSETS = {
    TensorType.Q4_0: (0,), TensorType.Q4_1: (0, 2), TensorType.Q5_0: (0,), TensorType.Q5_1: (0, 2),
    TensorType.Q8_0: (0,), TensorType.IQ4_NL: (0,), TensorType.Q2_K: (80, 82), TensorType.Q3_K: (108,),
    TensorType.Q4_K: (0, 2), TensorType.Q5_K: (0, 2), TensorType.Q6_K: (208,),
}  # fmt: skip


def bind_all(checkpoint: Checkpoint) -> SimpleNamespace:
    """A binding whose program names every tensor of the checkpoint as it is."""
    return bind({name: (info.shape, name, None) for name, info in checkpoint.tensors.items()})


def bind(weights: dict[str, tuple[tuple[int, ...], str, tuple[int, int] | None]]) -> SimpleNamespace:
    """A binding from program weight to (shape, tensor, rows)."""
    return SimpleNamespace(
        program=SimpleNamespace(weights={name: shape for name, (shape, _, _) in weights.items()}),
        sources={name: SimpleNamespace(tensor=source, rows=rows) for name, (_, source, rows) in weights.items()},
    )


class CopyingPacker:
    """Stands in for the native packing functions: row blocks hold the checkpoint's rows as they are.

    ``version`` rotates the bytes, as a changed layout would.
    """

    def __init__(self, version: int = 0) -> None:
        self.version = version
        self.calls = 0

    def packed_bytes(self, format: int, n: int, k: int) -> int:
        return -(-n // 16) * 16 * TensorType[WeightFormat(format).name].row_bytes(k)

    def pack_matrix(self, format: int, source: np.ndarray, n: int, k: int, out: np.ndarray, threads: int) -> None:
        assert out.size == self.packed_bytes(format, n, k)
        assert out.ctypes.data % 64 == 0
        self.calls += 1
        out[: source.size] = source + np.uint8(self.version)
        out[source.size :] = 0
