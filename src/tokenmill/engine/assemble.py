"""From a configuration to a running engine: checkpoint, network, memory plan, weights, backend."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from tokenmill import _native
from tokenmill.backends.backend import Backend, Float32, ModelWeights, PackedMatrix, StepLimits
from tokenmill.backends.head_screen import screen_bytes, screen_pays
from tokenmill.cache_folder import cache_folder
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.core import EngineCore
from tokenmill.engine.engine import Engine
from tokenmill.engine.grammar import Grammars
from tokenmill.engine.kv_cache import KvCache
from tokenmill.engine.ledger import MemoryLedger, memory_budget, parse_size, plan_memory
from tokenmill.engine.scheduler import SchedulerLimits
from tokenmill.engine.swap import SwapSpace
from tokenmill.errors import MemoryLimitError, UsageError
from tokenmill.models import BoundModel, bind
from tokenmill.program.buffers import plan_buffers
from tokenmill.program.hidden_rows import with_hidden_rows
from tokenmill.program.program import Program
from tokenmill.tokenizer import Tokenizer, load_tokenizer
from tokenmill.weights.cache import CacheEntry
from tokenmill.weights.checkpoint import Checkpoint, open_checkpoint

_FIXED_BYTES = 32 << 20
"""Stacks, thread-local buffers and step plans: what no plan counts."""


@dataclass(frozen=True, slots=True)
class ModelText:
    """The side of a model that deals in text."""

    tokenizer: Tokenizer
    generation_defaults: Mapping[str, Any]
    """Sampling parameters that the model's authors recommend."""


@dataclass(frozen=True, slots=True)
class LoadedCore:
    """A model ready to run, without a thread that runs it. ``seconds`` says where the start's time went."""

    bound: BoundModel
    text: ModelText
    ledger: MemoryLedger
    core: EngineCore
    seconds: Mapping[str, float]
    close: Callable[[], None]
    """Frees everything; the core is then gone."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run. ``seconds`` says where the start's time went."""

    path: Path
    bound: BoundModel
    tokenizer: Tokenizer
    generation_defaults: Mapping[str, Any]
    ledger: MemoryLedger
    engine: Engine
    seconds: Mapping[str, float]


class SizedWeights(ModelWeights, Protocol):
    """Weights that know their size."""

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""


class DecodedWeights:
    """Weights straight from a checkpoint, in fp32 (``ModelWeights`` of a backend that does not use packed ones)."""

    def __init__(self, checkpoint: Checkpoint, bound: BoundModel) -> None:
        self._checkpoint = checkpoint
        self._bound = bound

    @property
    def nbytes(self) -> int:
        """Bytes once all are decoded."""
        return sum(4 * _values(shape) for shape in self._bound.program.weights.values())

    def matrix(self, name: str) -> PackedMatrix:
        raise KeyError(f"{name} is not packed")

    def vector(self, name: str) -> Float32:
        return self.decoded(name).reshape(-1)

    def decoded(self, name: str) -> Float32:
        where = self._bound.sources[name]
        return self._checkpoint.decode(where.tensor, where.rows).reshape(self._bound.program.weights[name])

    def close(self) -> None:
        """Nothing is held."""


def load_model(config: EngineConfig, path: Path) -> LoadedModel:
    """Loads the checkpoint at ``path`` and starts its engine.

    Raises ModelFileError, UnsupportedModelError, MemoryLimitError and UsageError; nothing stays open then.
    """
    loaded = load_core(config, path)
    engine = Engine(loaded.core, on_close=loaded.close)
    text = loaded.text
    return LoadedModel(
        path, loaded.bound, text.tokenizer, text.generation_defaults, loaded.ledger, engine, loaded.seconds
    )


def load_core(config: EngineConfig, path: Path, progress: Callable[[], None] = lambda: None) -> LoadedCore:
    """Loads the checkpoint at ``path``, for a caller who runs the core. Raises as :func:`load_model` does.

    ``progress`` is called whenever the load has got a step further: after each of its laps and each part of a weight,
    and while it waits for another process that packs the same model.
    """
    clock = _Clock(progress)
    open_parts: list[Callable[[], None]] = []
    _check_instruction_set()
    try:
        checkpoint = open_checkpoint(path)
        open_parts.append(checkpoint.close)
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        bound = bind(checkpoint.metadata, checkpoint.kind, shapes, config.max_model_len, checkpoint.decode)
        _check_context(config, bound)
        clock.lap("read the model file")
        text = _text(config, checkpoint)
        clock.lap("load the tokenizer")
        grammars = Grammars(text.tokenizer, bound.program.vocab_size)
        open_parts.append(grammars.close)
        program = with_hidden_rows(bound.program).with_kv_element(config.kv_element)
        screen = _screen_bytes(config, checkpoint, bound)
        ledger = _plan(config, checkpoint, bound, program, screen)  # refuses what cannot fit before anything is packed
        weights = _load_weights(config, checkpoint, bound, progress)
        open_parts.append(weights.close)
        clock.lap("load the weights")
        backend, core, actual = _allocate(config, program, weights, ledger, grammars, screen)
        if actual.total > ledger.budget.limit:
            # Kernels need more beside the buffers than was planned for: the KV cache makes room.
            backend.close()
            ledger = _plan(config, checkpoint, bound, program, screen, uncounted=actual.total - ledger.total)
            backend, core, actual = _allocate(config, program, weights, ledger, grammars, screen)
        open_parts.append(backend.close)
        ledger = actual.checked()
    except MemoryError as error:
        _close_all(open_parts)
        raise MemoryLimitError(
            f"the system refused memory while {path.name} was loaded, though the budget allows it; free some, raise "
            "the system's limit (ulimit -v), or lower memory or max_model_len"
        ) from error
    except BaseException:
        _close_all(open_parts)
        raise
    clock.lap("prepare the kernels")
    return LoadedCore(bound, text, ledger, core, clock.seconds, lambda: _close_all(open_parts))


def load_text(config: EngineConfig, path: Path) -> ModelText:
    """Tokenizer and defaults of the checkpoint at ``path``, for a process that does not run the model.

    Raises ModelFileError and UnsupportedModelError.
    """
    checkpoint = open_checkpoint(path)
    try:
        return _text(config, checkpoint)
    finally:
        checkpoint.close()


def _text(config: EngineConfig, checkpoint: Checkpoint) -> ModelText:
    tokenizer = load_tokenizer(checkpoint, _tokenizer_cache(config, checkpoint))
    return ModelText(tokenizer, dict(checkpoint.generation_defaults))


def _check_instruction_set() -> None:
    try:
        _native.active_isa()
    except RuntimeError as error:  # TOKENMILL_ISA
        raise UsageError(str(error)) from error


def _check_context(config: EngineConfig, bound: BoundModel) -> None:
    longest = bound.config.max_position
    if config.max_model_len is not None and config.max_model_len > longest:
        raise UsageError(f"max_model_len is {config.max_model_len}; this model takes at most {longest}")


def _tokenizer_cache(config: EngineConfig, checkpoint: Checkpoint) -> Path | None:
    """Where the tokenizer keeps what is slow to derive; None where nothing can be kept."""
    entry = CacheEntry(checkpoint, None if config.cache_dir is None else Path(config.cache_dir))
    try:
        return entry.sidecar("tokenizer")
    except OSError:
        return None  # the weights come through the same cache, and warn


def _screen_bytes(config: EngineConfig, checkpoint: Checkpoint, bound: BoundModel) -> int:
    """Bytes of the head's screen, 0 if it is to have none. Raises UsageError if it must have one and cannot."""
    if config.screened_head == "off" or (config.screened_head == "auto" and config.backend == "torch"):
        return 0
    types = {name: checkpoint.info(where.tensor).tensor_type for name, where in bound.sources.items()}
    formats = {name: each.weight_format for name, each in types.items() if each.weight_format is not None}
    needed = screen_bytes(bound.program, formats)
    if config.screened_head == "auto":
        return needed if screen_pays(bound.program, formats) else 0
    if needed == 0 or config.backend == "torch":
        raise UsageError(
            f'screened_head is "on", but only the native backend can screen a head, and only one in Q8_0 whose results '
            f'are the logits themselves, which {checkpoint.path.name} may lack; take "auto" or "off"'
        )
    return needed


def _plan(
    config: EngineConfig,
    checkpoint: Checkpoint,
    bound: BoundModel,
    program: Program,
    screen: int,
    uncounted: int = 0,
) -> MemoryLedger:
    """The ledger before anything is allocated: the checkpoint's bytes stand for the packed weights, and buffers are
    counted as if nothing were fused. ``screen`` are the bytes of the head's screen, ``uncounted`` is what this is known
    to miss, in bytes."""
    weights = DecodedWeights(checkpoint, bound).nbytes if config.backend == "torch" else stored_bytes(checkpoint, bound)
    limits = StepLimits(config.max_batch_tokens, config.max_num_seqs, config.logit_rows, bound.config.max_position)
    cache = KvCache(program.kv_groups, [0] * len(program.kv_groups))
    return plan_memory(
        memory_budget(config.memory),
        weights=weights + screen,
        scratch=planned_scratch(program, limits, config.threads) + uncounted,
        groups=program.kv_groups,
        pages_needed=lambda length: cache.pages_needed(length, config.max_batch_tokens),
        longest=bound.config.max_position,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
    )


def stored_bytes(checkpoint: Checkpoint, bound: BoundModel) -> int:
    """Bytes of the tensors that the model uses: what packed weights take too."""
    return sum(checkpoint.info(tensor).nbytes for tensor in {where.tensor for where in bound.sources.values()})


def planned_scratch(program: Program, limits: StepLimits, threads: int) -> int:
    """Bytes beside weights and KV pages, as if nothing were fused; 0 threads means all usable."""
    arena = plan_buffers(program, limits, (), lambda _, width: 4 * width).arena_bytes
    return arena + _FIXED_BYTES + (threads or _native.usable_cpu_count()) * 24 * program.vocab_size


def _load_weights(
    config: EngineConfig, checkpoint: Checkpoint, bound: BoundModel, progress: Callable[[], None]
) -> SizedWeights:
    if config.backend == "torch":
        return DecodedWeights(checkpoint, bound)
    from tokenmill.weights.packing import load_weights

    cache_dir = None if config.cache_dir is None else Path(config.cache_dir)
    return load_weights(checkpoint, bound, cache_dir, progress=lambda _: progress(), threads=config.threads)


def _allocate(
    config: EngineConfig,
    program: Program,
    weights: SizedWeights,
    ledger: MemoryLedger,
    grammars: Grammars,
    screen: int,
) -> tuple[Backend, EngineCore, MemoryLedger]:
    """Backend and core with the pages of ``ledger``, and the ledger with the bytes that they took."""
    limits = StepLimits(
        tokens=config.max_batch_tokens,
        sequences=config.max_num_seqs,
        sampled=config.logit_rows,
        context=ledger.max_model_len,
    )
    pool = _native.ThreadPool(config.threads)
    backend = _make_backend(config, program, weights, limits, ledger, pool, screened_head=screen > 0)
    swap = None
    if config.swap_space is not None:
        folder = config.swap_dir or Path(config.cache_dir or cache_folder()) / "swap"
        swap = SwapSpace(Path(folder), parse_size(config.swap_space, "swap_space"), len(program.kv_groups), backend)
    core = EngineCore(
        backend,
        vocab_size=program.vocab_size,
        kv_pages=ledger.kv_pages,
        limits=SchedulerLimits(limits.tokens, limits.sequences, limits.sampled, limits.context, config.step_target),
        prefix_caching=config.enable_prefix_caching,
        pool=pool,
        policy=config.policy,
        max_waiting=config.max_waiting,
        swap=swap,
        grammars=grammars,
    )
    scratch = backend.scratch_bytes() + core.scratch_bytes() + _FIXED_BYTES
    actual = replace(
        ledger,
        weights=weights.nbytes + screen,
        kv=backend.kv_bytes(),
        scratch=scratch,
        swap=0 if swap is None else swap.limit,
    )
    return backend, core, actual


def _make_backend(
    config: EngineConfig,
    program: Program,
    weights: ModelWeights,
    limits: StepLimits,
    ledger: MemoryLedger,
    pool: _native.ThreadPool,
    *,
    screened_head: bool,
) -> Backend:
    if config.backend == "torch":
        from tokenmill.backends.torch import TorchBackend

        return TorchBackend(program, weights, limits, ledger.kv_pages)
    from tokenmill.backends.native import NativeBackend

    return NativeBackend(program, weights, limits, ledger.kv_pages, pool, screened_head=screened_head)


def _close_all(parts: list[Callable[[], None]]) -> None:
    while parts:
        parts.pop()()


def _values(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count


class _Clock:
    """Seconds between laps, by name; calls ``lapped`` after each."""

    def __init__(self, lapped: Callable[[], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._lapped = lapped
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
        self._lapped()
