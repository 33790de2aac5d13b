"""What each network is: one file per architecture family, and :func:`bind`, which recognises a checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenmill.errors import UnsupportedModelError
from tokenmill.models.architecture import (
    GGUF_NAMES,
    Architecture,
    BoundModel,
    ModelConfig,
    TensorSlice,
    hf_prefix,
)
from tokenmill.models.gemma2 import GEMMA2
from tokenmill.models.gemma3 import GEMMA3
from tokenmill.models.hyperparameters import Hyperparameters, ModelConfigError, ReadVector, Source
from tokenmill.models.llama import LLAMA
from tokenmill.models.mistral import MISTRAL
from tokenmill.models.phi3 import PHI3
from tokenmill.models.qwen2 import QWEN2
from tokenmill.models.qwen3 import QWEN3
from tokenmill.program.program import Program
from tokenmill.program.recorder import Recorder

__all__ = ["ARCHITECTURES", "BoundModel", "ModelConfig", "ModelConfigError", "TensorSlice", "bind"]

ARCHITECTURES: tuple[Architecture, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3)


def bind(
    metadata: Mapping[str, Any],
    source: Source,
    tensors: Mapping[str, tuple[int, ...]],
    max_length: int | None = None,
    read_vector: ReadVector | None = None,
) -> BoundModel:
    """Recognises a checkpoint: its architecture, hyper-parameters, program and where each weight lies.

    ``metadata`` is GGUF metadata or a parsed config.json; ``tensors`` gives row-major shapes by name. ``max_length``
    is the configured maximum length in tokens (default: the model's own), which chooses length-dependent RoPE factors.
    ``read_vector(tensor)`` reads the few tensors that shape the program itself (GGUF's ``rope_freqs.weight`` and
    ``rope_factors_*.weight``); it is called only if the checkpoint has them.

    Raises UnsupportedModelError for an unknown architecture or feature, and ModelConfigError, naming the key or
    tensor, for a missing or wrong hyper-parameter and for a missing, mis-shaped or unknown tensor.
    """
    architecture = _recognise(metadata, source)
    if source == "hf" and isinstance(metadata.get("text_config"), Mapping):
        metadata = metadata["text_config"]
    p = Hyperparameters(metadata, source, tensors, max_length, read_vector)
    config = architecture.configure(p)
    recorder = Recorder(config.vocab_size)
    architecture.describe(config, recorder)
    program = recorder.program()

    names = GGUF_NAMES if source == "gguf" else architecture.hf_names.prefixed(hf_prefix(p))
    fused = architecture.fused(config, source)
    sources = {weight: names.locate(weight, fused) for weight in program.weights}
    _check_tensors(program, sources, p)
    used = {where.tensor for where in sources.values()} | ({names.output} if config.tied else set())
    for tensor in tensors:
        if tensor not in used and not _outside_the_network(tensor, names.ignored, hf_prefix(p)):
            raise UnsupportedModelError(f"tensor {tensor} has no place in the {architecture.name} architecture")
    return BoundModel(architecture.name, config, program, sources)


def _recognise(metadata: Mapping[str, Any], source: Source) -> Architecture:
    key = "general.architecture" if source == "gguf" else "model_type"
    name = metadata.get(key)
    if not isinstance(name, str):
        raise ModelConfigError(f"{key} is missing from the checkpoint's metadata: cannot tell which network it is")
    for architecture in ARCHITECTURES:
        if name in (architecture.gguf if source == "gguf" else architecture.hf):
            return architecture
    known = ", ".join(architecture.name for architecture in ARCHITECTURES)
    raise UnsupportedModelError(f"architecture {name!r} is not supported; known architectures: {known}")


def _check_tensors(program: Program, sources: Mapping[str, TensorSlice], p: Hyperparameters) -> None:
    """Every tensor has the shape that its weights, together if it is fused, need."""
    needed: dict[str, tuple[int, ...]] = {}
    for weight, shape in program.weights.items():
        where = sources[weight]
        rows = shape[0] if where.rows is None else max(where.rows[1], needed.get(where.tensor, (0,))[0])
        needed[where.tensor] = (rows, *shape[1:])
    for tensor, shape in needed.items():
        if p.shape(tensor) != shape:
            raise ModelConfigError(f"tensor {tensor} has shape {p.shape(tensor)}, the hyper-parameters need {shape}")


def _outside_the_network(tensor: str, ignored: tuple[str, ...], prefix: str) -> bool:
    """Constants of older exporters, and the other towers of a multimodal model."""
    return any(part in tensor for part in ignored) or (prefix != "" and not tensor.startswith(prefix))
