"""A model with nothing around it but its backend: no engine, no scheduler. For measuring and evaluating."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenmill.backends.backend import Backend, StepLimits
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
) -> Iterator[BareModel]:
    """Opens the model at ``path`` with KV pages for ``limits.sequences`` sequences of ``limits.context`` slots.

    The torch backend computes in fp32 on the decoded weights; ``emulate_activations`` makes it round activations to
    int8 as the native one does. Raises ModelFileError, UnsupportedModelError, and UsageError for a context that is
    longer than the model's.
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
        weights = load_weights(checkpoint, bound, threads=threads)
        stack.callback(weights.close)
        pages = [limits.sequences * -(-limits.context // PAGE_TOKENS)] * len(program.kv_groups)
        made: Backend
        if backend == "torch":
            from tokenmill.backends.torch import TorchBackend

            formats = {name: weights.matrix(name).format for name in program.matrices()}
            made = TorchBackend(
                program, weights, limits, pages, emulate_activations=formats if emulate_activations else None
            )
        else:
            from tokenmill.backends.native import NativeBackend

            made = NativeBackend(program, weights, limits, pages, threads)
        stack.callback(made.close)
        yield BareModel(checkpoint, bound, made)
