"""The real SmolLM2, decoded from its GGUF file, computes what transformers computes from the same file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from tiny_models import ArrayWeights, relative_error, shapes, torch_backend, whole_plan

from tokenmill.models import bind

# "The quick brown fox jumps over the lazy dog." and a start of a second sentence, in SmolLM2's vocabulary.
IDS = [504, 2365, 6354, 16438, 27003, 690, 260, 23790, 2767, 30, 533, 216, 33, 41, 38, 41]


def test_smollm2_binds_and_its_logits_equal_those_of_transformers(smollm2_path: Path) -> None:
    reader = gguf.GGUFReader(smollm2_path)
    metadata = {
        name: field.contents() for name, field in reader.fields.items() if name.startswith(("general", "llama"))
    }
    tensors = {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).reshape([int(n) for n in reversed(tensor.shape)])
        for tensor in reader.tensors
    }
    bound = bind(metadata, "gguf", shapes(tensors))
    assert (bound.architecture, bound.config.layers, bound.config.kv_heads) == ("llama", 30, 3)
    assert bound.config.tied
    backend = torch_backend(bound.program, ArrayWeights(tensors, bound.sources), pages=1)
    found = backend.run(whole_plan(IDS, 1))["logits"]

    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    )
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    assert relative_error(found, expected) < 2e-5
    np.testing.assert_array_equal(found.argmax(axis=1), expected.argmax(axis=1))
