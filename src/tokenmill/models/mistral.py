"""Mistral: Llama's network with a sliding window (Jiang et al., "Mistral 7B", 2023).

GGUF files of Mistral models call themselves llama; this is the Hugging Face layout.
"""

from __future__ import annotations

from tokenmill.models.architecture import Architecture, ModelConfig, decoder_config
from tokenmill.models.hyperparameters import Hyperparameters
from tokenmill.models.llama import describe
from tokenmill.program.ops import Activation

WINDOW = 4096
"""Window of the first Mistral 7B, whose config.json may leave it out; later models state null."""


def configure(p: Hyperparameters) -> ModelConfig:
    """Hyper-parameters; the window counts the token itself."""
    layers = p.integer(None, "num_hidden_layers")
    window = p.optional_integer(None, "sliding_window") if p.has(None, "sliding_window") else WINDOW
    activation = p.activation("hidden_act", Activation.SILU)
    return decoder_config(p, activation=activation, windows=(window,) * layers)


MISTRAL = Architecture(name="mistral", gguf=(), hf=("mistral",), configure=configure, describe=describe)
