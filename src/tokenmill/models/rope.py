"""RoPE frequencies and their scalings for longer contexts, in double precision.

A frequency is the angle in radians that a pair of elements turns per position: ``theta ** (-2 i / rotary_dim)``
(RoFormer, eq. 15). Where a scaling depends on the length, the *configured* maximum length decides and never the
current one (NUMERICS N5), so a token's rotation does not change while its sequence grows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tokenmill.errors import UnsupportedModelError
from tokenmill.models.hyperparameters import Hyperparameters, ModelConfigError, positive
from tokenmill.program.ops import RopeStyle
from tokenmill.program.recorder import Rotation

Frequencies = tuple[float, ...]

DEFAULT_THETA = 10_000.0


def plain(theta: float, rotary_dim: int) -> Frequencies:
    """Unscaled frequencies."""
    return tuple(theta ** (-2.0 * i / rotary_dim) for i in range(rotary_dim // 2))


def linear(frequencies: Sequence[float], factor: float) -> Frequencies:
    """Position interpolation (Chen et al., 2023)."""
    return tuple(f / factor for f in frequencies)


def dynamic_ntk(theta: float, rotary_dim: int, factor: float, trained: int, length: int) -> Frequencies:
    """NTK-aware scaling of theta for contexts of ``length`` > ``trained`` tokens; unscaled up to ``trained``."""
    stretch = factor * max(length, trained) / trained - (factor - 1.0)
    return plain(theta * stretch ** (rotary_dim / (rotary_dim - 2)), rotary_dim)


def llama3(frequencies: Sequence[float], factor: float, low: float, high: float, trained: int) -> Frequencies:
    """Llama 3.1: wavelengths above ``trained / low`` tokens are stretched by ``factor``, those below
    ``trained / high`` stay, and the ones between are blended."""

    def scaled(frequency: float) -> float:
        turns = trained * frequency / (2 * math.pi)
        blend = min(max((turns - low) / (high - low), 0.0), 1.0)
        return (1.0 - blend) * frequency / factor + blend * frequency

    return tuple(scaled(f) for f in frequencies)


def yarn(
    frequencies: Sequence[float],
    theta: float,
    factor: float,
    trained: int,
    *,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Frequencies:
    """YaRN's NTK-by-parts (Peng et al., 2023, section 3.2): pairs that turn more than ``beta_fast`` times within
    ``trained`` tokens stay, those that turn less than ``beta_slow`` times are interpolated, with a ramp between."""
    rotary_dim = 2 * len(frequencies)

    def pair_of(turns: float) -> float:
        return rotary_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(beta_fast), pair_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    width = high - low if high != low else 0.001
    ramp = (min(max((i - low) / width, 0.0), 1.0) for i in range(len(frequencies)))
    return tuple(f / factor * r + f * (1.0 - r) for f, r in zip(frequencies, ramp, strict=True))


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """YaRN's attention temperature as a factor of cosine and sine (eq. 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def longrope_magnitude(factor: float, trained: int) -> float:
    """LongRoPE's factor of cosine and sine (Ding et al., 2024)."""
    return math.sqrt(1.0 + math.log(factor) / math.log(trained)) if factor > 1.0 else 1.0


def gguf_rotation(
    p: Hyperparameters, head_dim: int, style: RopeStyle, default_theta: float = DEFAULT_THETA
) -> Rotation:
    """The RoPE that GGUF metadata and the tensors ``rope_freqs`` or ``rope_factors_*`` describe."""
    rotary_dim = gguf_rotary_dim(p, head_dim)
    theta = p.number("rope.freq_base", None, default_theta)
    frequencies = plain(theta, rotary_dim)
    context = p.integer("context_length", None)
    trained = p.integer("rope.scaling.original_context_length", None, context)
    if "rope_freqs.weight" in p.tensors:
        frequencies = _divided(frequencies, p.vector("rope_freqs.weight", rotary_dim // 2))
    kind = p.value("rope.scaling.type", None)
    if "rope_factors_long.weight" in p.tensors or kind == "longrope":
        which = "long" if (p.max_length or context) > trained else "short"
        factors = p.vector(f"rope_factors_{which}.weight", rotary_dim // 2)
        magnitude = p.number("rope.scaling.attn_factor", None, longrope_magnitude(context / trained, trained))
        return Rotation(_divided(frequencies, factors), style, magnitude)
    match kind:
        case None | "none":
            # Files from before the type was stored have the linear factor alone.
            return Rotation(linear(frequencies, p.number("rope.scale_linear", None, 1.0)), style)
        case "linear":
            return Rotation(linear(frequencies, p.number("rope.scaling.factor", None)), style)
        case "yarn":
            factor = p.number("rope.scaling.factor", None)
            fast = p.number("rope.scaling.yarn_beta_fast", None, 32.0)
            slow = p.number("rope.scaling.yarn_beta_slow", None, 1.0)
            magnitude = p.number("rope.scaling.attn_factor", None, 1.0) * yarn_magnitude(factor)
            scaled = yarn(frequencies, theta, factor, trained, beta_fast=fast, beta_slow=slow)
            return Rotation(scaled, style, magnitude)
    raise UnsupportedModelError(f"rope.scaling.type is {kind!r}; known: none, linear, yarn, longrope")


def gguf_rotary_dim(p: Hyperparameters, head_dim: int) -> int:
    """How many elements of each head rotate."""
    rotary_dim = p.integer("rope.dimension_count", None, head_dim)
    _check_rotary_dim("rope.dimension_count", rotary_dim, head_dim)
    return rotary_dim


def hf_parameters(p: Hyperparameters) -> Mapping[str, Any]:
    """The object that describes RoPE: ``rope_parameters``, or ``rope_scaling`` of older files; may be empty."""
    parameters = p.value(None, "rope_parameters") or p.value(None, "rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise ModelConfigError(f"rope_parameters is {parameters!r}, must be an object")
    return parameters


def hf_rotation(p: Hyperparameters, head_dim: int, parameters: Mapping[str, Any], theta: float) -> Rotation:
    """The RoPE that ``parameters`` of a config.json describes; ``theta`` is the base where it states none."""
    theta = _number(parameters, "rope_theta", theta)
    partial = _number(parameters, "partial_rotary_factor", p.number(None, "partial_rotary_factor", 1.0))
    rotary_dim = int(head_dim * partial)
    _check_rotary_dim("partial_rotary_factor times the head size", rotary_dim, head_dim)
    frequencies = plain(theta, rotary_dim)
    position = p.integer(None, "max_position_embeddings")
    length = p.max_length or position
    stored = _number(parameters, "original_max_position_embeddings", float(position))
    trained = p.integer(None, "original_max_position_embeddings", int(stored))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    magnitude = 1.0
    match kind:
        case "default":
            pass
        case "linear":
            frequencies = linear(frequencies, _number(parameters, "factor"))
        case "dynamic":
            frequencies = dynamic_ntk(theta, rotary_dim, _number(parameters, "factor"), position, length)
        case "llama3":
            low, high = _number(parameters, "low_freq_factor"), _number(parameters, "high_freq_factor")
            if low >= high:
                raise ModelConfigError(f"low_freq_factor {low} of the RoPE must be below high_freq_factor {high}")
            frequencies = llama3(frequencies, _number(parameters, "factor"), low, high, trained)
        case "yarn":
            factor = _number(parameters, "factor", position / trained)
            fast, slow = _number(parameters, "beta_fast", 32.0), _number(parameters, "beta_slow", 1.0)
            truncate = bool(parameters.get("truncate", True))
            frequencies = yarn(frequencies, theta, factor, trained, beta_fast=fast, beta_slow=slow, truncate=truncate)
            magnitude = _hf_yarn_magnitude(parameters, factor)
        case "longrope":
            factors = _factors(parameters, "long_factor" if length > trained else "short_factor", rotary_dim // 2)
            frequencies = _divided(frequencies, factors)
            default = longrope_magnitude(_number(parameters, "factor", position / trained), trained)
            magnitude = _number(parameters, "attention_factor", default)
        case _:
            known = "default, linear, dynamic, llama3, yarn, longrope"
            raise UnsupportedModelError(f"rope_type is {kind!r}; known: {known}")
    return Rotation(frequencies, RopeStyle.HALF, magnitude)


def _hf_yarn_magnitude(parameters: Mapping[str, Any], factor: float) -> float:
    mscale, mscale_all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        default = yarn_magnitude(factor, float(mscale)) / yarn_magnitude(factor, float(mscale_all_dim))
    else:
        default = yarn_magnitude(factor)
    return _number(parameters, "attention_factor", default)


def _number(parameters: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = parameters.get(key)
    if value is None:
        if default is None:
            raise ModelConfigError(f"{key} is missing from the RoPE parameters")
        return default
    return positive(f"RoPE parameter {key}", value)


def _factors(parameters: Mapping[str, Any], key: str, length: int) -> tuple[float, ...]:
    factors = parameters.get(key)
    if not isinstance(factors, Sequence) or len(factors) != length:
        raise ModelConfigError(f"RoPE parameter {key} must be a list of {length} numbers")
    return tuple(positive(f"RoPE parameter {key}[{i}]", factor) for i, factor in enumerate(factors))


def _divided(frequencies: Sequence[float], factors: Sequence[float]) -> Frequencies:
    return tuple(f / d for f, d in zip(frequencies, factors, strict=True))


def _check_rotary_dim(key: str, rotary_dim: int, head_dim: int) -> None:
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
        raise ModelConfigError(f"{key} is {rotary_dim}, must be even, positive and at most the head size {head_dim}")
