"""Pointwise kernels against fp64, and against themselves on other instruction sets."""

from __future__ import annotations

import ctypes
import math
import platform

import numpy as np
import pytest

from tokenmill import _native

WIDTHS = [1, 8, 15, 16, 17, 63, 64, 65, 128, 576, 1000]


def rows(width: int, seed: int = 0, spread: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((3, width)) * spread).astype(np.float32)


def rms_norm(x, weight, eps=1e-6, offset=0.0):
    out = np.full_like(x, np.nan)
    _native.rms_norm(x, weight, out, eps, offset)
    return out


def activate(kind, gate, up=None):
    out = np.full_like(gate, np.nan)
    _native.gated_activation(kind, gate, np.ones_like(gate) if up is None else up, out)
    return out


def softcap(x, cap):
    out = np.full_like(x, np.nan)
    _native.softcap(x, cap, out)
    return out


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(width, isa):
    x, weight = rows(width, 1), rows(width, 2)[0].copy()
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-6) * (weight.astype(np.float64) + 1)
    np.testing.assert_allclose(rms_norm(x, weight, offset=1.0), expected, rtol=1e-6, atol=1e-6)


def test_rms_norm_of_heads_equals_rms_norm_of_each(isa):
    x, weight = rows(5 * 24, 3), rows(24, 4)[0].copy()
    heads = rms_norm(np.ascontiguousarray(x.reshape(15, 24)), weight)
    assert (rms_norm(x, weight).reshape(15, 24) == heads).all()


def sum_by_rules(squares: np.ndarray) -> np.float32:
    """64 virtual lanes, then the tree. The squares here are whole numbers, so that fma and add agree."""
    lanes = np.zeros(64, np.float32)
    for start in range(0, len(squares), 64):
        part = squares[start : start + 64]
        lanes[: len(part)] += part
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = lanes[:half] + lanes[half:]
    return lanes[0]


def test_rms_norm_adds_in_64_lanes_and_one_tree(isa):
    rng = np.random.default_rng(5)
    x = rng.integers(1, 4096, (1, 1000)).astype(np.float32)
    mean = sum_by_rules(x[0] * x[0]) / np.float32(1000)
    assert mean != np.float32((x[0].astype(np.float64) ** 2).sum()) / np.float32(1000)  # or the order proves nothing
    expected = x * (np.float32(1) / np.sqrt(mean + np.float32(1e-6)))
    assert (rms_norm(x, np.ones(1000, np.float32)) == expected).all()


GELU = np.vectorize(lambda x: 0.5 * x * math.erfc(-x / math.sqrt(2)))
ACTIVATIONS = {
    0: lambda x: x / (1 + np.exp(-x)),
    1: GELU,
    2: lambda x: x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


@pytest.mark.parametrize("kind", ACTIVATIONS, ids=["silu", "gelu", "gelu_tanh"])
def test_activations_have_a_relative_error_of_about_1e6(kind, isa):
    # Down to where the result leaves the range of normal numbers; GELU by tanh rounds an argument near 80 once.
    x = np.concatenate([np.linspace(-10, 10, 40001), np.linspace(-80, 80, 999), [0.0, 1e-30, -1e-30, 1e30]])
    x = x.astype(np.float32)[None]
    with np.errstate(over="ignore"):
        expected = ACTIVATIONS[kind](x.astype(np.float64))
    actual = activate(kind, x)
    normal = np.abs(expected) > 1e-34
    assert np.abs(actual[normal] / expected[normal] - 1).max() < (2e-5 if kind == 2 else 2e-6)
    assert np.abs(actual[~normal]).max() < 1e-33


@pytest.mark.parametrize("kind", ACTIVATIONS, ids=["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("width", WIDTHS)
def test_gates_multiply(kind, width):
    gate, up = rows(width, 6, 3.0), rows(width, 7)
    expected = ACTIVATIONS[kind](gate.astype(np.float64)) * up
    np.testing.assert_allclose(activate(kind, gate, up), expected, rtol=2e-6, atol=1e-12)


def test_softcap_keeps_relative_precision_near_zero_and_saturates(isa):
    x = np.concatenate([np.linspace(-200, 200, 20001), np.geomspace(1e-20, 1, 500), [1e30, -1e30]]).astype(np.float32)[
        None
    ]
    expected = 30 * np.tanh(x.astype(np.float64) / 30)
    nonzero = expected != 0
    actual = softcap(x, 30.0)
    assert np.abs(actual[nonzero] / expected[nonzero] - 1).max() < 1e-6
    assert (actual[~nonzero] == 0).all()


@pytest.mark.parametrize("kind", ACTIVATIONS, ids=["silu", "gelu", "gelu_tanh"])
def test_nan_stays_nan(kind, isa):
    x = rows(33, 8)
    x[1, 17] = np.nan
    for result in (activate(kind, x), softcap(x, 5.0)):
        assert np.isnan(result[1, 17])
        assert np.isfinite(np.delete(result.ravel(), 33 + 17)).all()


# ---- bits ------------------------------------------------------------------------------------------------------------


def everything() -> list[np.ndarray]:
    x, up = rows(333, 9, 4.0), rows(333, 10)
    small = rows(333, 11, 1e-38)
    results = [rms_norm(x, up[0].copy()), softcap(x, 7.0), softcap(small, 7.0)]
    return (
        results + [activate(kind, x, up) for kind in ACTIVATIONS] + [activate(kind, small, x) for kind in ACTIVATIONS]
    )


def test_instruction_sets_do_not_change_bits(isa):
    actual = everything()
    _native.set_active_isa("portable")
    for mine, portable in zip(actual, everything(), strict=True):
        assert (mine.view(np.int32) == portable.view(np.int32)).all()


class FloatEnvironment(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_ubyte * 32),)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="sets the x86 control register")
def test_the_callers_floating_point_environment_does_not_matter(isa):
    expected = everything()
    libm = ctypes.CDLL("libm.so.6")
    saved, disturbed = FloatEnvironment(), FloatEnvironment()
    libm.fegetenv(ctypes.byref(saved))
    libm.fegetenv(ctypes.byref(disturbed))
    mxcsr = 0x1F80 | 0x8040 | 0x2000  # flush to zero, denormals are zero, round down
    disturbed.bytes[28:32] = list(mxcsr.to_bytes(4, "little"))
    x, up, small = rows(333, 9, 4.0), rows(333, 10), rows(333, 11, 1e-38)
    out = [np.empty_like(x) for _ in range(3)]
    weight = up[0].copy()
    libm.fesetenv(ctypes.byref(disturbed))
    try:
        _native.rms_norm(x, weight, out[0], 1e-6, 0.0)
        _native.softcap(small, 7.0, out[1])
        _native.gated_activation(0, small, x, out[2])
    finally:
        libm.fesetenv(ctypes.byref(saved))
    for actual, wanted in zip(out, (expected[0], expected[2], expected[6]), strict=True):
        assert (actual.view(np.int32) == wanted.view(np.int32)).all()


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="one shape"):
        _native.softcap(rows(8), 1.0, np.empty((2, 8), np.float32))
    with pytest.raises(ValueError, match="whole groups"):
        rms_norm(rows(8), np.ones(3, np.float32))
