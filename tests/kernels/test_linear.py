"""Linear kernels: the activation quantization and the order of operations of the numerics contract, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from gguf_blocks import (
    ELEMENT_FORMATS,
    F32,
    GROUP_FORMATS,
    QUANTIZED_FORMATS,
    SUPER_BLOCK_FORMATS,
    U8,
    random_rows,
    reference_decode,
)

from tokenmill import _native
from tokenmill.program.ops import ActivationFormat, WeightFormat

ROW_COUNTS = (*range(1, 21), 31, 32, 33, 64, 127, 512)
SEGMENT = 2048
ALL_FORMATS = pytest.mark.parametrize("weight_format", list(WeightFormat), ids=lambda f: f.name)


class Weight:
    """A random matrix: the file's rows, packed, and decoded to float64."""

    def __init__(self, weight_format: WeightFormat, n: int, k: int, seed: int = 0) -> None:
        self.format, self.n, self.k = weight_format, n, k
        self.rows = random_rows(weight_format, n, k, seed)
        self.packed: U8 = np.empty(_native.packed_bytes(weight_format, n, k), np.uint8)
        _native.pack_matrix(weight_format, self.rows.reshape(-1), n, k, self.packed, 1)
        self.exact = reference_decode(weight_format, self.rows).astype(np.float64)

    def linear(self, x: F32, bias: F32 | None = None, residual: F32 | None = None, threads: int = 1) -> F32:
        y: F32 = _native.linear(self.format, self.packed, self.n, self.k, x, bias, residual, threads)
        return y


def activations(m: int, k: int, seed: int = 1) -> F32:
    """Values of many magnitudes, some outliers, as activations are."""
    rng = np.random.default_rng([seed, m, k])
    x = rng.standard_normal((m, k)) * np.exp(rng.standard_normal((m, 1)))
    x[rng.random((m, k)) < 0.003] *= 40
    return x.astype(np.float32)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32))


def width_of(weight_format: WeightFormat) -> int:
    """More than one segment, and a short last chunk where the format allows it."""
    return 2048 + 256 if weight_format in SUPER_BLOCK_FORMATS else 2048 + 96


# ---- an independent model of the contract, in numpy ----------------------------------------------------------------


def fma(a: np.ndarray | float, b: np.ndarray | float, c: np.ndarray | float) -> F32:
    """Correctly rounded fp32 a * b + c: the exact product in float64, the sum rounded to odd, then to fp32."""
    product = np.float64(a) * np.float64(b)
    addend = np.float64(c)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    even = (total.view(np.uint64) & np.uint64(1)) == 0
    toward = np.where(error > 0, np.inf, -np.inf)
    return np.where((error != 0) & even, np.nextafter(total, toward), total).astype(np.float32)


def quantize(x: F32, group: int) -> tuple[np.ndarray, F32]:
    """NUMERICS N2 for finite x: codes ``[m, k]`` and scales ``[m, groups]``."""
    m, k = x.shape
    groups = -(-k // group)
    padded = np.zeros((m, groups * group), np.float32)
    padded[:, :k] = x
    blocks = padded.reshape(m, groups, group)
    amax = np.abs(blocks).max(-1)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(127) / amax
    usable = np.isfinite(inverse)
    codes = np.rint(blocks * np.where(usable, inverse, np.float32(0))[..., None]).astype(np.int32)
    scales = np.where(usable, amax / np.float32(127), np.float32(0))
    return codes.reshape(m, -1)[:, :k], scales.astype(np.float32)


def exact_parts(weight: Weight) -> tuple[np.ndarray, F32, F32, F32 | None, np.ndarray | None, F32 | None]:
    """Read from the file: (signed codes [n, k], fp16 scales, integer scales, minimums, integer minimums, dmin)."""
    f, n, k = weight.format, weight.n, weight.k
    raw = weight.rows

    def half(at: int, size: int) -> F32:
        blocks = raw.reshape(n, -1, size)
        return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)[..., 0].astype(np.float32)

    if f in GROUP_FORMATS:
        size = raw.shape[1] // (k // 32)
        d = half(0, size)
        minimum = half(2, size) if f in (WeightFormat.Q4_1, WeightFormat.Q5_1) else None
        offset = np.zeros_like(d) if minimum is None else minimum
        # The decoding is d * q (+ m) with small whole q: recover q exactly from it.
        decoded = weight.exact.reshape(n, -1, 32)
        codes = np.rint((decoded - offset[..., None].astype(np.float64)) / d[..., None].astype(np.float64)).astype(
            np.int64
        )
        return codes.reshape(n, k), d, np.ones_like(d), minimum, None, None
    size = raw.shape[1] // (k // 256)
    blocks = raw.reshape(n, -1, size)
    if f == WeightFormat.Q2_K:
        d, dmin = half(80, size), half(82, size)
        scales, minimums = blocks[..., :16] & 15, blocks[..., :16] >> 4
    elif f == WeightFormat.Q3_K:
        from gguf.quants import Q3_K

        d, dmin, minimums = half(108, size), None, None
        ones = blocks.copy()
        ones[..., 108:110] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
        ones[..., :32], ones[..., 32:96] = 255, 0b01010101  # every code is 1, so the decoding is the scale
        scales = Q3_K.dequantize(ones.reshape(n, -1)).reshape(n, -1, 16, 16)[..., 0]
    elif f == WeightFormat.Q6_K:
        d, dmin, minimums = half(208, size), None, None
        scales = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8)
    else:
        from gguf.quants import Q4_K

        d, dmin = half(0, size), half(2, size)
        unpacked = Q4_K.get_scale_min(np.ascontiguousarray(blocks[..., 4:16]).reshape(-1, 12))
        scales, minimums = (part.reshape(n, -1, 8) for part in unpacked)
    count = scales.shape[-1]
    step = d[..., None].astype(np.float64) * scales
    lowest = 0.0 if minimums is None or dmin is None else dmin[..., None].astype(np.float64) * minimums
    decoded = weight.exact.reshape(n, -1, count, 256 // count)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint(
            np.nan_to_num((decoded + np.asarray(lowest)[..., None]) / step[..., None], posinf=0, neginf=0)
        ).astype(np.int64)
    return codes.reshape(n, k), d, scales.astype(np.float32), None, minimums, dmin


def emulate(weight: Weight, x: F32, segment: int = SEGMENT, descending: bool = False, group: int | None = None) -> F32:
    """NUMERICS N3 on one matrix, in its order; the switches are the mutations that must be noticed."""
    m, k, n = x.shape[0], weight.k, weight.n
    codes, d, scales, minimum, minimums, dmin = exact_parts(weight)
    super_block = weight.format in SUPER_BLOCK_FORMATS
    a, s = quantize(x, group or (256 if super_block else 32))
    columns = 256 if super_block else 32
    s_of = np.repeat(s, (group or columns) // columns, axis=1) if group else s
    total = np.zeros((m, n), np.float32)
    acc = np.zeros((m, n), np.float32)
    order = range(k // columns)
    for i, block in enumerate(reversed(order) if descending else order):
        part = slice(block * columns, (block + 1) * columns)
        scale = s_of[:, block : block + 1]
        if super_block:
            step = 256 // scales.shape[-1]
            whole = np.zeros((m, n), np.int64)
            minimum_sum = np.zeros((m, n), np.int64)
            for g in range(scales.shape[-1]):
                inner = slice(block * 256 + g * step, block * 256 + (g + 1) * step)
                dot = a[:, inner].astype(np.int64) @ codes[:, inner].T
                whole += dot * scales[:, block, g].astype(np.int64)[None, :]
                if minimums is not None:
                    minimum_sum += (
                        a[:, inner].sum(-1, dtype=np.int64)[:, None] * minimums[:, block, g].astype(np.int64)[None, :]
                    )
            p = whole.astype(np.float32) * d[None, :, block]
            if dmin is not None:
                p = fma(minimum_sum.astype(np.float32), -dmin[None, :, block], p)
            acc = fma(p, scale, acc)
        else:
            dot = (a[:, part].astype(np.int64) @ codes[:, part].T).astype(np.float32)
            acc = fma(dot * scale, d[None, :, block], acc)
            if minimum is not None:
                sums = a[:, part].sum(-1, dtype=np.int64).astype(np.float32)[:, None]
                acc = fma(sums * scale, minimum[None, :, block], acc)
        if (i + 1) * columns % segment == 0 or i + 1 == len(order):
            total, acc = total + acc, np.zeros((m, n), np.float32)
    return total


# ---- activation quantization ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "activation", [ActivationFormat.INT8_GROUP32, ActivationFormat.INT8_GROUP256], ids=lambda a: a.name
)
def test_activation_codes_scales_and_sums_follow_the_contract(activation: ActivationFormat, isa: str) -> None:
    group, summed = (32, 32) if activation == ActivationFormat.INT8_GROUP32 else (256, 16)
    for k in (1, 15, 17, 32, 256, 576, 640, 1000):
        x = activations(5, k)
        x[1] = 0
        x[2] *= np.float32(1e-38)
        x[3] = np.float32(1e-44)
        codes, scales, sums = _native.quantize_rows(x, activation)
        want_codes, want_scales = quantize(x, group)
        assert np.array_equal(codes, want_codes), (isa, k)
        assert same_bits(scales, want_scales), (isa, k)
        padded = np.zeros((5, -(-k // summed) * summed), np.int32)
        padded[:, :k] = want_codes
        assert np.array_equal(sums, padded.reshape(5, -1, summed).sum(-1)), (isa, k)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_group_with_nan_or_infinity_gets_a_nan_scale_and_zero_codes(bad: float, isa: str) -> None:
    for position in (0, 31, 300, 575):
        x = activations(1, 576)
        x[0, position] = bad
        codes, scales, sums = _native.quantize_rows(x, ActivationFormat.INT8_GROUP32)
        group = position // 32
        assert np.isnan(scales[0, group])
        assert np.isnan(scales).sum() == 1
        assert not codes[0, group * 32 : group * 32 + 32].any()
        assert sums[0, group] == 0


# ---- products ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_format", QUANTIZED_FORMATS, ids=lambda f: f.name)
def test_integer_linear_is_the_contract_bit_for_bit(weight_format: WeightFormat, isa: str) -> None:
    weight = Weight(weight_format, 21, width_of(weight_format))
    x = activations(3, weight.k)
    assert same_bits(weight.linear(x), emulate(weight, x)), isa


@pytest.mark.parametrize(
    "weight_format", [WeightFormat.Q4_0, WeightFormat.Q5_1, WeightFormat.Q4_K, WeightFormat.Q6_K], ids=lambda f: f.name
)
def test_another_order_or_another_activation_group_would_be_noticed(weight_format: WeightFormat) -> None:
    weight = Weight(weight_format, 21, 4096)
    x = activations(3, weight.k)
    y = weight.linear(x)
    assert same_bits(y, emulate(weight, x))
    assert not same_bits(y, emulate(weight, x, segment=1 << 20)), "accumulators that never restart"
    assert not same_bits(y, emulate(weight, x, descending=True)), "groups in descending order"
    assert not same_bits(y, emulate(weight, x, group=512)), "activation scales per 512"


@pytest.mark.parametrize("weight_format", QUANTIZED_FORMATS, ids=lambda f: f.name)
def test_integer_linear_is_close_to_the_exact_product_of_the_quantized_activation(weight_format: WeightFormat) -> None:
    weight = Weight(weight_format, 70, width_of(weight_format))
    x = activations(40, weight.k)
    group = 256 if weight_format in SUPER_BLOCK_FORMATS else 32
    codes, scales = quantize(x, group)
    quantized = codes * np.repeat(scales.astype(np.float64), group, axis=1)[:, : weight.k]
    exact = quantized @ weight.exact.T
    norms = np.linalg.norm(quantized, axis=1)[:, None] * np.linalg.norm(weight.exact, axis=1)[None, :]
    assert np.abs(weight.linear(x) - exact).max() <= 1e-5 * np.abs(exact).max()
    assert (np.abs(weight.linear(x) - exact) / norms).max() <= 1e-6


@pytest.mark.parametrize("weight_format", ELEMENT_FORMATS, ids=lambda f: f.name)
def test_element_linear_is_the_contract_bit_for_bit(weight_format: WeightFormat, isa: str) -> None:
    for k in (1, 255, 257, 600):
        weight = Weight(weight_format, 19, k)
        x = activations(2, k)
        total = np.zeros((2, 19), np.float32)
        for begin in range(0, k, 256):
            acc = np.zeros((2, 19), np.float32)
            for column in range(begin, min(begin + 256, k)):
                acc = fma(weight.exact[None, :, column], x[:, column : column + 1], acc)
            total = total + acc
        assert same_bits(weight.linear(x), total), (isa, k)


# ---- law 2: a row does not depend on its neighbours, nor on threads, nor on the processor --------------------------


@ALL_FORMATS
def test_rows_do_not_depend_on_the_row_count(weight_format: WeightFormat, isa: str) -> None:
    weight = Weight(weight_format, 53, width_of(weight_format))
    x = activations(max(ROW_COUNTS), weight.k)
    whole = weight.linear(x)
    for m in ROW_COUNTS:
        begin = max(ROW_COUNTS) - m if m % 2 else 0
        assert same_bits(weight.linear(x[begin : begin + m]), whole[begin : begin + m]), (isa, m)


@ALL_FORMATS
def test_threads_do_not_change_a_bit(weight_format: WeightFormat) -> None:
    weight = Weight(weight_format, 149, width_of(weight_format))
    for m in (1, 9, 33):
        x = activations(m, weight.k)
        one = weight.linear(x, threads=1)
        for threads in (2, 3, 7):
            assert same_bits(weight.linear(x, threads=threads), one), (m, threads)


@ALL_FORMATS
def test_all_instruction_sets_give_the_same_bits(weight_format: WeightFormat) -> None:
    weight = Weight(weight_format, 37, width_of(weight_format))
    before = _native.active_isa()
    results = {}
    try:
        for name in _native.available_isas():
            _native.set_active_isa(name)
            results[name] = [weight.linear(activations(m, weight.k)) for m in (1, 2, 3, 7, 30)]
    finally:
        _native.set_active_isa(before)
    for name, ys in results.items():
        assert all(same_bits(y, want) for y, want in zip(ys, results["portable"], strict=True)), name


@ALL_FORMATS
def test_bias_is_added_to_the_product_and_the_residual_last(weight_format: WeightFormat, isa: str) -> None:
    weight = Weight(weight_format, 37, 256)
    bias = activations(1, 37, seed=3)[0]
    for m in (3, 40):
        x, residual = activations(m, weight.k), activations(m, 37, seed=4)
        y = weight.linear(x)
        assert same_bits(weight.linear(x, bias=bias), y + bias), isa
        assert same_bits(weight.linear(x, residual=residual), y + residual), isa
        assert same_bits(weight.linear(x, bias=bias, residual=residual), (y + bias) + residual), isa


@ALL_FORMATS
def test_nan_reaches_every_output_of_its_row_and_no_other_row(weight_format: WeightFormat, isa: str) -> None:
    weight = Weight(weight_format, 37, 512)
    for m in (5, 30):
        x = activations(m, weight.k)
        clean = weight.linear(x)
        x[3, 300] = np.nan
        y = weight.linear(x)
        assert np.isnan(y[3]).all(), isa
        y[3] = clean[3]
        assert same_bits(y, clean), isa


def test_bad_shapes_are_refused_by_name() -> None:
    weight = Weight(WeightFormat.Q8_0, 20, 64)
    x = activations(2, 64)
    with pytest.raises(ValueError, match="x has 32 columns, expected 64"):
        weight.linear(np.ascontiguousarray(x[:, :32]))
    with pytest.raises(ValueError, match="bias has 19 elements, expected 20"):
        weight.linear(x, bias=np.zeros(19, np.float32))
    with pytest.raises(ValueError, match="residual has 1 rows, expected 2"):
        weight.linear(x, residual=np.zeros((1, 20), np.float32))
    with pytest.raises(ValueError, match="packed has 100 bytes"):
        _native.linear(WeightFormat.Q8_0, weight.packed[:100], 20, 64, x, None, None, 1)
    with pytest.raises(ValueError, match="format must be"):
        _native.quantize_rows(x, 0)
