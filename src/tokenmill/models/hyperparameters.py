"""Reading hyper-parameters from GGUF metadata or from a ``config.json``, with errors that name the key."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tokenmill.errors import TokenmillError, UnsupportedModelError
from tokenmill.program.ops import Activation

Source = Literal["gguf", "hf"]
ReadVector = Callable[[str], npt.NDArray[np.float32]]

LARGEST = 2**31 - 1
_ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_new": Activation.GELU_TANH,
}


class ModelConfigError(TokenmillError):
    """A hyper-parameter or tensor of the checkpoint is missing or does not fit; the message names it."""


class Hyperparameters:
    """The hyper-parameters of one checkpoint.

    Each reader takes the key's name in GGUF (without the architecture's prefix) and in config.json; None means that
    this source never has it. A missing or null key gives ``default``, or raises ModelConfigError if there is none.
    """

    def __init__(
        self,
        metadata: Mapping[str, Any],
        source: Source,
        tensors: Mapping[str, tuple[int, ...]],
        max_length: int | None = None,
        read_vector: ReadVector | None = None,
    ) -> None:
        self.source: Source = source
        self.tensors = tensors
        self.max_length = max_length
        """Configured maximum length in tokens, which chooses length-dependent RoPE factors; None: the model's own."""
        self._metadata = metadata
        self._read_vector = read_vector
        self._prefix = f"{metadata['general.architecture']}." if source == "gguf" else ""

    def key(self, gguf: str | None, hf: str | None) -> str | None:
        """The full key in this checkpoint's source."""
        name = gguf if self.source == "gguf" else hf
        return None if name is None else self._prefix + name

    def value(self, gguf: str | None, hf: str | None) -> Any:
        """The raw value, or None."""
        key = self.key(gguf, hf)
        return None if key is None else self._metadata.get(key)

    def has(self, gguf: str | None, hf: str | None) -> bool:
        """Whether the key is there, null included."""
        key = self.key(gguf, hf)
        return key is not None and key in self._metadata

    def refuse(self, hf: str, why: str) -> None:
        """Raises UnsupportedModelError if config.json sets ``hf`` to anything but null or false."""
        value = self.value(None, hf)
        if value is not None and value is not False:
            raise UnsupportedModelError(f"{hf} is {value!r}: {why}")

    def integer(self, gguf: str | None, hf: str | None, default: int | None = None, least: int = 1) -> int:
        """An integer of at least ``least``; a list with one value per layer is accepted if all are equal."""
        key, value = self._found(gguf, hf, default)
        if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) and len(value) > 0:
            if any(item != value[0] for item in value):
                raise UnsupportedModelError(f"{key} differs from layer to layer, which this architecture does not know")
            value = value[0]
        integral = isinstance(value, int | np.integer) or (isinstance(value, float) and value.is_integer())
        if not integral or isinstance(value, bool) or not least <= value <= LARGEST:
            raise ModelConfigError(f"{key} is {value!r}, must be an integer from {least} to {LARGEST}")
        return int(value)

    def optional_integer(self, gguf: str | None, hf: str | None) -> int | None:
        """A positive integer, or None if the key is missing, null or 0."""
        value = self.value(gguf, hf)
        return None if value is None or (isinstance(value, int | np.integer) and value == 0) else self.integer(gguf, hf)

    def number(self, gguf: str | None, hf: str | None, default: float | None = None) -> float:
        """A positive finite number."""
        key, value = self._found(gguf, hf, default)
        return positive(key, value)

    def optional_number(self, gguf: str | None, hf: str | None, default: float | None = None) -> float | None:
        """A positive finite number; None if the key is null or 0; ``default`` if it is missing."""
        if not self.has(gguf, hf):
            return default
        value = self.value(gguf, hf)
        return None if value is None or value == 0 else self.number(gguf, hf)

    def flag(self, gguf: str | None, hf: str | None, default: bool = False) -> bool:
        """A boolean."""
        key, value = self._found(gguf, hf, default)
        if not isinstance(value, bool | np.bool_):
            raise ModelConfigError(f"{key} is {value!r}, must be true or false")
        return bool(value)

    def activation(self, hf: str, default: Activation) -> Activation:
        """The gate's activation; GGUF does not store it, an architecture implies it."""
        name = self.value(None, hf)
        if name is None:
            return default
        if name not in _ACTIVATIONS:
            raise UnsupportedModelError(f"{hf} is {name!r}; known: {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[name]

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises ModelConfigError if it is missing."""
        if tensor not in self.tensors:
            raise ModelConfigError(f"tensor {tensor} is missing from the checkpoint")
        return tuple(self.tensors[tensor])

    def vector(self, tensor: str, length: int) -> tuple[float, ...]:
        """The elements of a small vector that shapes the network (RoPE factors), checked to be positive."""
        if self.shape(tensor) != (length,):
            raise ModelConfigError(f"tensor {tensor} has shape {self.shape(tensor)}, needs {(length,)}")
        if self._read_vector is None:
            raise ModelConfigError(f"tensor {tensor} shapes the network: binding needs read_vector to read it")
        return tuple(positive(f"tensor {tensor}[{i}]", float(x)) for i, x in enumerate(self._read_vector(tensor)))

    def _found(self, gguf: str | None, hf: str | None, default: object) -> tuple[str, Any]:
        key, value = self.key(gguf, hf), self.value(gguf, hf)
        if value is None and default is None:
            raise ModelConfigError(f"hyper-parameter {key} is missing from the checkpoint's metadata")
        return str(key), default if value is None else value


def positive(key: str, value: object) -> float:
    """``value`` as a float. Raises ModelConfigError naming ``key`` unless it is a positive finite number."""
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not number or not math.isfinite(float(value)) or float(value) <= 0:  # type: ignore[arg-type]
        raise ModelConfigError(f"{key} is {value!r}, must be a positive finite number")
    return float(value)  # type: ignore[arg-type]
