"""A model with nothing around it but its backend: no engine, no scheduler. For measuring and evaluating."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenmill.backends.backend import Backend, StepLimits
from tokenmill.engine.assemble import DecodedWeights, planned_scratch, stored_bytes
from tokenmill.engine.ledger import MemoryLedger, memory_budget
from tokenmill.errors import UsageError
from tokenmill.models import BoundModel, bind
from tokenmill.program.kv import PAGE_TOKENS, KvElement
from tokenmill.tokenizer import Tokenizer, load_tokenizer
from tokenmill.weights.checkpoint import Checkpoint, open_checkpoint
from tokenmill.weights.packing import load_weights

BackendName = Literal["native", "torch"]


@dataclass(frozen=True, slots=True)
class BareModel:
    """What :func:`open_bare` opened."""

    checkpoint: Checkpoint
    bound: BoundModel
    backend: Backend

    def tokenizer(self) -> Tokenizer:
        """Loads the model's tokenizer. Raises ModelFileError if the file has none."""
        return load_tokenizer(self.checkpoint)


@contextmanager
def open_bare(
    path: Path,
    limits: StepLimits,
    *,
    backend: BackendName = "native",
    kv_element: KvElement = KvElement.F16,
    emulate_activations: bool = False,
    threads: int = 0,
    memory: int | str | None = None,
    beside: int = 0,
    screened_head: bool = False,
) -> Iterator[BareModel]:
    """Opens the model at ``path`` with KV pages for ``limits.sequences`` sequences of ``limits.context`` slots.

    The torch backend computes in fp32 on the decoded weights; ``emulate_activations`` makes it round activations to
    int8 as the native one does. ``memory`` is the budget as in ``LLM``, ``beside`` what the caller will use of it, in
    bytes, a screen for the native backend's ``screened_head`` included. Raises ModelFileError, UnsupportedModelError,
    UsageError for a context that is longer than the model's, and MemoryLimitError, before anything is loaded, if it
    does not fit.
    """
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(path))
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        bound = bind(checkpoint.metadata, checkpoint.kind, shapes, None, checkpoint.decode)
        if limits.context > bound.config.max_position:
            raise UsageError(
                f"the context is {limits.context} tokens; this model takes at most {bound.config.max_position}"
            )
        program = bound.program.with_kv_element(kv_element)
        pages = [limits.sequences * -(-limits.context // PAGE_TOKENS)] * len(program.kv_groups)
        decoded = DecodedWeights(checkpoint, bound).nbytes if backend == "torch" else 0
        MemoryLedger(
            memory_budget(memory),
            weights=stored_bytes(checkpoint, bound) + decoded,
            kv=sum(count * spec.page_bytes for count, spec in zip(pages, program.kv_groups, strict=True)),
            scratch=planned_scratch(program, limits, threads) + beside,
            kv_pages=tuple(pages),
            groups=program.kv_groups,
            max_model_len=limits.context,
            max_num_seqs=limits.sequences,
        ).checked("take a smaller model or a shorter context, or raise memory")
        weights = load_weights(checkpoint, bound, threads=threads)
        stack.callback(weights.close)
        made: Backend
        if backend == "torch":
            from tokenmill.backends.torch import TorchBackend

            formats = {name: weights.matrix(name).format for name in program.matrices()}
            made = TorchBackend(
                program, weights, limits, pages, emulate_activations=formats if emulate_activations else None
            )
        else:
            from tokenmill.backends.native import NativeBackend

            made = NativeBackend(program, weights, limits, pages, threads, screened_head=screened_head)
        stack.callback(made.close)
        yield BareModel(checkpoint, bound, made)
