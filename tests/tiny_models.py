"""Tiny models with random weights, and what is needed to run them: weights held in memory, plans of one step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers

from tokenmill.backends.backend import Float32, PackedMatrix, StepLimits
from tokenmill.backends.torch import TorchBackend
from tokenmill.models import BoundModel, TensorSlice, bind
from tokenmill.program.kv import PAGE_TOKENS, KvElement
from tokenmill.program.program import Program
from tokenmill.program.step import SequenceStep, StepPlan, lay_plan

torch.set_num_threads(1)  # tiny tensors: waking a second thread costs more than it computes

LIMITS = StepLimits(tokens=512, sequences=8, sampled=512, context=512)
PAGES = 64


class ArrayWeights:
    """Weights in memory, by program name."""

    def __init__(self, tensors: Mapping[str, Float32], sources: Mapping[str, TensorSlice] | None = None) -> None:
        self._tensors = tensors
        self._sources = sources

    def decoded(self, name: str) -> Float32:
        where = TensorSlice(name) if self._sources is None else self._sources[name]
        tensor = self._tensors[where.tensor]
        return tensor if where.rows is None else tensor[slice(*where.rows)]

    def vector(self, name: str) -> Float32:
        return self.decoded(name)

    def matrix(self, name: str) -> PackedMatrix:
        raise KeyError(name)

    def close(self) -> None:
        pass


def random_transformers_model(config: transformers.PretrainedConfig, seed: int = 0) -> transformers.PreTrainedModel:
    """A model in fp32 whose every parameter, gains and biases too, is far from its usual start."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            else:
                parameter.add_(0.3 * noise)
    return model.eval()


def config_json(model: transformers.PreTrainedModel) -> dict[str, Any]:
    """What ``config.json`` of the saved model holds."""
    metadata: dict[str, Any] = json.loads(model.config.to_json_string())
    return metadata


def saved_tensors(model: transformers.PreTrainedModel) -> dict[str, Float32]:
    """The tensors of the saved model: a tied head is not stored."""
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    return tensors


def shapes(tensors: Mapping[str, Float32]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def bind_model(model: transformers.PreTrainedModel, max_length: int | None = None, **changes: Any) -> BoundModel:
    """The model bound as a checkpoint; ``changes`` replace keys of its config.json."""
    return bind({**config_json(model), **changes}, "hf", shapes(saved_tensors(model)), max_length)


def random_weights(program: Program, seed: int = 0) -> ArrayWeights:
    rng = np.random.default_rng(seed)
    return ArrayWeights(
        {
            name: (rng.standard_normal(shape) * (shape[1] ** -0.5 if len(shape) == 2 else 0.5)).astype(np.float32)
            for name, shape in program.weights.items()
        }
    )


def torch_backend(
    program: Program,
    weights: ArrayWeights,
    element: KvElement = KvElement.F32,
    pages: int = PAGES,
    **options: Any,
) -> TorchBackend:
    program = program.with_kv_element(element)
    return TorchBackend(program, weights, LIMITS, [pages] * len(program.kv_groups), **options)


def whole_plan(ids: Sequence[int], groups: int, first_page: int = 0, sampled: Sequence[int] | None = None) -> StepPlan:
    """One sequence from its start, on consecutive pages, every row sampled unless told otherwise."""
    pages = range(first_page, first_page - (-len(ids) // PAGE_TOKENS))
    rows = range(len(ids)) if sampled is None else sampled
    return lay_plan([SequenceStep(ids, 0, [list(pages)] * groups, sampled=list(rows))], groups)


def logits(backend: TorchBackend, ids: Sequence[int]) -> Float32:
    """``[tokens, vocabulary]`` of one sequence run at once."""
    return backend.run(whole_plan(ids, len(backend.kv_groups)))["logits"].copy()


def relative_error(found: Float32, expected: Float32) -> float:
    """Largest difference relative to the largest expected magnitude."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())
