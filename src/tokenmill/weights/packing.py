"""From a checkpoint to the weights that kernels read: packed once, through the build cache, and mapped ever after.

The first load streams: a part of a tensor is read from the mapped checkpoint, packed into a buffer, and checksummed and
written by a second thread while the next part is packed; its source pages are given back. Resident memory is the two
buffers and one part of the source, whatever the model's size. The finished file is then mapped read-only.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import mmap
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, cast

import numpy as np

from tokenmill.backends.backend import PackedMatrix
from tokenmill.errors import ModelFileError, UnsupportedModelError
from tokenmill.program.ops import WeightFormat
from tokenmill.weights.cache import CacheEntry
from tokenmill.weights.checkpoint import Checkpoint
from tokenmill.weights.formats import Float32, UInt8
from tokenmill.weights.packed_file import PackedFileWriter, PackedLayout, PackedStore, open_packed

logger = logging.getLogger("tokenmill.weights")

ROW_BLOCK = 16
"""Rows that are packed together; parts of a matrix are whole row blocks, which lie one after the other."""
PART_BYTES = 8 << 20
"""Packed bytes of one part at most (one row block at least)."""


class Slice(Protocol):
    """Rows [first, last) of a checkpoint tensor, or all of it."""

    @property
    def tensor(self) -> str: ...
    @property
    def rows(self) -> tuple[int, int] | None: ...


class ProgramWeights(Protocol):
    """What a program needs: weights by name and shape, ``[n, k]`` or ``[n]``."""

    @property
    def weights(self) -> Mapping[str, tuple[int, ...]]: ...


class Bound(Protocol):
    """A program bound to a checkpoint: where each of its weights comes from."""

    @property
    def program(self) -> ProgramWeights: ...
    @property
    def sources(self) -> Mapping[str, Slice]: ...


class Packer(Protocol):
    """The native packing functions (``csrc/kernels/linear.h``)."""

    def packed_bytes(self, format: int, n: int, k: int) -> int:
        """Bytes of a packed matrix. Raises ValueError if k does not fit the format."""

    def pack_matrix(self, format: int, source: UInt8, n: int, k: int, out: UInt8, threads: int) -> None:
        """Packs ``source`` (the checkpoint's rows) into ``out``."""


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far a load is: bytes packed of all packed bytes, or waiting for another process that packs the same model."""

    stage: Literal["packing", "waiting"]
    done: int
    total: int


Progress = Callable[[LoadProgress], None]


@dataclass(frozen=True, slots=True)
class PlannedWeight:
    """A program weight, where it comes from and what it becomes.

    ``rows`` is the range of the tensor's rows (of its elements, for a vector).
    """

    name: str
    tensor: str
    rows: tuple[int, int]
    shape: tuple[int, ...]
    format: WeightFormat
    block_bytes: int
    """Packed bytes of a row block; of the whole, for a vector."""

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2

    @property
    def nbytes(self) -> int:
        """Packed bytes."""
        return -(-self.shape[0] // ROW_BLOCK) * self.block_bytes if self.is_matrix else self.block_bytes


class PackedWeights:
    """The weights of one program (``ModelWeights``).

    ``origin`` says whether they were mapped from the cache, packed into it, or packed into this process's memory. The
    checkpoint stays the caller's to close.
    """

    def __init__(
        self,
        store: PackedStore,
        plan: Mapping[str, PlannedWeight],
        checkpoint: Checkpoint,
        origin: Literal["mapped", "packed", "memory"],
    ) -> None:
        self._store = store
        self._plan = plan
        self._checkpoint = checkpoint
        self.origin = origin

    @property
    def formats(self) -> Mapping[str, WeightFormat]:
        """The packed format of each matrix."""
        return {weight.name: weight.format for weight in self._plan.values() if weight.is_matrix}

    @property
    def nbytes(self) -> int:
        """Bytes of all packed weights."""
        return self._store.layout.nbytes

    def matrix(self, name: str) -> PackedMatrix:
        """The packed matrix ``name``. Raises KeyError."""
        weight = self._planned(name, matrix=True)
        n, k = weight.shape
        return PackedMatrix(name, weight.format, n, k, self._store.view(name))

    def vector(self, name: str) -> Float32:
        """The vector ``name`` in fp32. Raises KeyError."""
        self._planned(name, matrix=False)
        return self._store.view(name).view(np.float32)

    def decoded(self, name: str) -> Float32:
        """Matrix ``name`` as fp32 ``[n, k]``, decoded from the checkpoint on each call. Raises KeyError."""
        weight = self._planned(name, matrix=True)
        decoded = self._checkpoint.decode(weight.tensor, weight.rows).reshape(weight.shape)
        self._checkpoint.release(weight.tensor, weight.rows)
        return decoded

    def close(self) -> None:
        """Drops the mapping; views in use keep it alive."""
        self._store.close()

    def _planned(self, name: str, matrix: bool) -> PlannedWeight:
        weight = self._plan.get(name)
        if weight is None or weight.is_matrix is not matrix:
            raise KeyError(f"no {'matrix' if matrix else 'vector'} {name!r}")
        return weight


def load_weights(
    checkpoint: Checkpoint,
    bound: Bound,
    cache_dir: Path | None = None,
    *,
    progress: Progress | None = None,
    verify: bool = False,
    use_cache: bool = True,
    threads: int = 0,
    packer: Packer | None = None,
) -> PackedWeights:
    """The program's weights, packed: mapped from the build cache, or packed into it first.

    ``cache_dir`` defaults to :func:`tokenmill.cache_folder.cache_folder`. ``verify`` checks the cached weights'
    checksums. ``threads`` is handed to the packing kernels (0: all of this process's cores). A damaged cache file is
    replaced with one warning; if the cache cannot be written, one warning says so and the weights are packed in memory.

    Raises ModelFileError for a missing or mis-shaped tensor and UnsupportedModelError for one that no kernel takes.
    """
    packer = _native_packer() if packer is None else packer
    plan = plan_weights(checkpoint, bound, packer)
    layout = PackedLayout.of(
        [
            (w.name, "U8", (w.nbytes,), w.nbytes) if w.is_matrix else (w.name, "F32", w.shape, w.nbytes)
            for w in plan.values()
        ]
    )
    load = _Load(checkpoint, plan, layout, packer, threads, progress or (lambda _: None))
    if use_cache:
        try:
            return load.through_cache(CacheEntry(checkpoint, cache_dir), verify)
        except OSError as error:
            logger.warning(
                "the build cache cannot be used (%s); packing %s in memory, as every start will until it can",
                error,
                checkpoint.path.name,
            )
    return load.in_memory()


def plan_weights(checkpoint: Checkpoint, bound: Bound, packer: Packer) -> dict[str, PlannedWeight]:
    """Checks each of the program's weights against the checkpoint. Raises as :func:`load_weights` does."""
    plan = {}
    for name, shape in bound.program.weights.items():
        source = bound.sources[name]
        if len(shape) not in (1, 2):
            raise UnsupportedModelError(
                f"{checkpoint.path}: {name} of shape {list(shape)} is neither vector nor matrix"
            )
        info = checkpoint.tensors.get(source.tensor)
        needed = f"{name} needs shape {list(shape)}"
        if info is None:
            raise ModelFileError(checkpoint.path, f"lacks tensor {source.tensor!r} ({needed})")
        extent = info.rows if len(shape) == 2 else info.values
        first, last = source.rows or (0, extent)
        if not 0 <= first <= last <= extent or (last - first, *info.shape[1:]) != shape:
            found = f"has shape {list(info.shape)}"
            rows = f" from rows {first} to {last}" if source.rows else ""
            raise ModelFileError(checkpoint.path, f"tensor {source.tensor!r} {found}; {needed}{rows}")
        if len(shape) == 1:
            plan[name] = PlannedWeight(name, source.tensor, (first, last), shape, WeightFormat.F32, 4 * shape[0])
            continue
        weight_format = info.tensor_type.weight_format
        if weight_format is None:
            raise UnsupportedModelError(
                f"{checkpoint.path}: tensor {source.tensor!r} has the unsupported type {info.tensor_type.name}"
            )
        try:
            block_bytes = packer.packed_bytes(int(weight_format), ROW_BLOCK, shape[1])
        except (ValueError, OverflowError, TypeError) as error:
            raise UnsupportedModelError(
                f"{checkpoint.path}: tensor {source.tensor!r} of shape {list(info.shape)} has no packed form as "
                f"{info.tensor_type.name} ({error})"
            ) from error
        plan[name] = PlannedWeight(name, source.tensor, (first, last), shape, weight_format, block_bytes)
    return plan


@dataclass(frozen=True, slots=True)
class _Load:
    """One load: what every road to packed weights needs."""

    checkpoint: Checkpoint
    plan: Mapping[str, PlannedWeight]
    layout: PackedLayout
    packer: Packer
    threads: int
    progress: Progress

    def through_cache(self, entry: CacheEntry, verify: bool) -> PackedWeights:
        structure = json.dumps([(w.name, w.tensor, w.rows) for w in self.plan.values()])
        path = entry.weights_path(structure)
        key = self.cache_key(entry.identity)
        try:
            store = open_packed(path, self.layout, key, verify)
        except ModelFileError:
            store = None  # looked at again, and reported, with the lock held
        if store is not None:
            return PackedWeights(store, self.plan, self.checkpoint, "mapped")
        with entry.lock(lambda: self.report("waiting", 0)):
            try:
                store = open_packed(path, self.layout, key, verify)
            except ModelFileError as damage:
                logger.warning("the build cache is damaged and is made again: %s", damage)
            if store is not None:
                return PackedWeights(store, self.plan, self.checkpoint, "mapped")
            entry.remove_leftovers()
            with PackedFileWriter(path, self.layout, key) as writer:
                self.stream(writer)
                writer.finish()
            store = open_packed(path, self.layout, key, verify=False)
            if store is None:
                raise OSError(f"{path} vanished while it was written")
            return PackedWeights(store, self.plan, self.checkpoint, "packed")

    def in_memory(self) -> PackedWeights:
        store = PackedStore.in_memory(self.layout)
        done = 0
        for weight in self.prefetched():
            out = store.view(weight.name)
            for first, last, offset, nbytes in _parts(weight):
                self.pack(weight, first, last, out[offset : offset + nbytes])
                done += nbytes
                self.report("packing", done)
        return PackedWeights(store, self.plan, self.checkpoint, "memory")

    def stream(self, writer: PackedFileWriter) -> None:
        """Packs part after part on this thread while another writes the one before."""
        largest = max((nbytes for weight in self.plan.values() for *_, nbytes in _parts(weight)), default=1)
        buffers = [_aligned_bytes(largest) for _ in range(2)]
        written: list[Future[None]] = []
        done = 0
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenmill-cache") as pool:
            for weight in self.prefetched():
                for first, last, offset, nbytes in _parts(weight):
                    if len(written) >= 2:
                        written[-2].result()  # its buffer is the one used next
                    out = buffers[len(written) % 2][:nbytes]
                    self.pack(weight, first, last, out)
                    written.append(pool.submit(writer.write, weight.name, offset, out))
                    done += nbytes
                    self.report("packing", done)
            for future in written[-2:]:
                future.result()

    def report(self, stage: Literal["packing", "waiting"], done: int) -> None:
        self.progress(LoadProgress(stage, done, sum(weight.nbytes for weight in self.plan.values())))

    def prefetched(self) -> Iterator[PlannedWeight]:
        """The weights in order, each after the kernel was asked to read the next one's tensor."""
        weights = list(self.plan.values())
        for weight, following in zip(weights, [*weights[1:], None], strict=True):
            if following is not None:
                self.checkpoint.prefetch(following.tensor)
            yield weight

    def pack(self, weight: PlannedWeight, first: int, last: int, out: UInt8) -> None:
        """Packs rows [first, last) of a weight into ``out`` and gives the source's pages back."""
        if weight.is_matrix:
            rows = weight.rows[0] + first, weight.rows[0] + last
            source = self.checkpoint.raw(weight.tensor, rows)
            self.packer.pack_matrix(int(weight.format), source, last - first, weight.shape[1], out, self.threads)
            self.checkpoint.release(weight.tensor, rows)
        else:
            values = self.checkpoint.decode(weight.tensor).reshape(-1)[slice(*weight.rows)]
            out.view(np.float32)[:] = values
            self.checkpoint.release(weight.tensor)

    def cache_key(self, identity: str) -> str:
        """Everything the packed bytes depend on."""
        weights = [(w.name, w.tensor, w.rows, w.shape, w.format.name) for w in self.plan.values()]
        return json.dumps({"source": identity, "layout": self.layout_fingerprint(), "weights": weights})

    def layout_fingerprint(self) -> str:
        """Digest of a fixed matrix packed in each format in use: it changes whenever the packed layout does."""
        fingerprint = hashlib.sha256()
        n, k = ROW_BLOCK + 1, 2 * 2048 + 256
        # Knuth's multiplicative hash of 0, 1, 2, ...: bytes without a pattern that a layout could hide in.
        source = (np.arange(4 * n * k, dtype=np.uint32) * np.uint32(2654435761) >> 24).astype(np.uint8)
        types = {info.tensor_type for info in self.checkpoint.tensors.values()}
        for tensor_type in sorted(types):
            weight_format = tensor_type.weight_format
            if weight_format is not None:
                out = _aligned_bytes(self.packer.packed_bytes(int(weight_format), n, k))
                rows = source[: n * tensor_type.row_bytes(k)]
                self.packer.pack_matrix(int(weight_format), rows, n, k, out, 1)
                fingerprint.update(out.data)
        return fingerprint.hexdigest()


def _parts(weight: PlannedWeight) -> Iterator[tuple[int, int, int, int]]:
    """(first row, last row, offset, bytes) of the packed parts of a weight; a vector is one part."""
    n = weight.shape[0]
    blocks = max(1, PART_BYTES // weight.block_bytes) if weight.is_matrix and weight.block_bytes else 1
    step = blocks * ROW_BLOCK if weight.is_matrix else max(n, 1)
    for first in range(0, n, step):
        last = min(first + step, n)
        offset = first // ROW_BLOCK * weight.block_bytes if weight.is_matrix else 0
        nbytes = -(-(last - first) // ROW_BLOCK) * weight.block_bytes if weight.is_matrix else weight.nbytes
        yield first, last, offset, nbytes


def _aligned_bytes(count: int) -> UInt8:
    """Zeros that start at a page, as kernels want at least 64 bytes of alignment."""
    return np.frombuffer(mmap.mmap(-1, max(count, 1)), dtype=np.uint8, count=count)


def _native_packer() -> Packer:
    return cast(Packer, importlib.import_module("tokenmill._native"))
