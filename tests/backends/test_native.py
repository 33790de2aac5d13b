"""The native backend: each op equals torch's, and a token's bits depend on nothing but the tokens before it."""

from __future__ import annotations

import ctypes
import gc
import platform

import numpy as np
import pytest
from native_models import F32, HEAD_DIM, HEADS, KV_HEADS, MIXED, SIXTEEN_BIT, VOCABULARY, WIDTH, PackedWeights, network

from tokenmill import _native
from tokenmill.backends.backend import StepLimits
from tokenmill.backends.native import NativeBackend
from tokenmill.backends.torch import TorchBackend
from tokenmill.program.check import ProgramError
from tokenmill.program.hidden_rows import HIDDEN_ROWS, with_hidden_rows
from tokenmill.program.kv import PAGE_TOKENS, KvElement
from tokenmill.program.ops import Attention, LinearGroup, Rope, Rows
from tokenmill.program.recorder import Recorder
from tokenmill.program.step import SequenceStep, lay_plan

LIMITS = StepLimits(tokens=640, sequences=6, sampled=640, context=1024)
PAGES = 80
PROGRAM = network()
FORMATS = {"f32": F32, "mixed": MIXED, "16bit": SIXTEEN_BIT}
IDS = np.random.default_rng(1).integers(0, VOCABULARY, 600).astype(np.int32)


def backend(formats="mixed", *, threads=1, taps=(), element=KvElement.F16, program=PROGRAM) -> NativeBackend:
    program = program.with_kv_element(element)
    made = NativeBackend(program, PackedWeights(program, FORMATS[formats]), LIMITS, [PAGES, PAGES], threads, taps=taps)
    for group in range(2):
        for plane in range(2):
            made.kv_plane(group, plane)[...] = np.nan if element is KvElement.F32 else 0x7FC1
    return made


class Pool:
    """Page tables of sequences, one per KV group, over pages in random order."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.free = [list(rng.permutation(PAGES)) for _ in range(2)]

    def table(self, slots: int) -> list[list[int]]:
        return [[int(free.pop()) for _ in range(-(-slots // PAGE_TOKENS))] for free in self.free]


def part(ids, begin, end, tables) -> SequenceStep:
    return SequenceStep(ids[begin:end], begin, tables, sampled=range(end - begin))


def whole(native: NativeBackend, ids=IDS, sizes=(10_000,), name="logits") -> np.ndarray:
    """A value of every token, prefilled in chunks of the given sizes; the last repeats."""
    tables, rows, begin, sizes = Pool().table(len(ids)), [], 0, list(sizes)
    while begin < len(ids):
        end = min(len(ids), begin + (sizes.pop(0) if len(sizes) > 1 else sizes[0]))
        rows.append(native.run(lay_plan([part(ids, begin, end, tables)], 2), outputs=[name])[name].copy())
        begin = end
    return np.concatenate(rows)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.fixture(params=_native.available_isas())
def isa(request):
    before = _native.active_isa()
    _native.set_active_isa(request.param)
    yield request.param
    _native.set_active_isa(before)


# ---- against torch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("element", list(KvElement), ids=lambda e: e.name)
def test_each_op_equals_torch_on_identical_inputs(formats, element):
    names = list(PROGRAM.values())
    native = backend(formats, taps=names, element=element)
    plan = lay_plan([part(IDS, 0, 300, Pool().table(300))], 2)
    values = {name: value.copy() for name, value in native.run(plan, outputs=names).items()}
    program = PROGRAM.with_kv_element(element)
    weights = PackedWeights(program, FORMATS[formats])
    oracle = TorchBackend(program, weights, LIMITS, [PAGES, PAGES], emulate_activations=weights.formats)
    oracle.run(plan, 0, 1, outputs=[])
    for index, op in enumerate(program.ops):
        feed(oracle, {value.name: values[value.name] for value in op.inputs()})
        found = oracle_step(oracle, plan, index)
        for name, expected in found.items():
            assert relative_error(values[name], expected) < 1e-5, op


def feed(oracle: TorchBackend, values: dict[str, np.ndarray]) -> None:
    import torch

    oracle._live.clear()
    oracle._live.update({name: torch.tensor(value) for name, value in values.items()})


def oracle_step(oracle: TorchBackend, plan, index: int) -> dict[str, np.ndarray]:
    oracle._plan = plan.buffer.copy()
    return {value.name: tensor.numpy() for value, tensor in oracle._execute(oracle.program.ops[index], plan)}


def test_logits_equal_torch_in_fp32():
    weights = PackedWeights(PROGRAM, F32)
    program = PROGRAM.with_kv_element(KvElement.F32)
    oracle = TorchBackend(program, weights, LIMITS, [PAGES, PAGES])
    expected = oracle.run(lay_plan([part(IDS, 0, 600, Pool().table(600))], 2))["logits"]
    assert relative_error(whole(backend("f32", element=KvElement.F32)), expected) < 2e-5


@pytest.mark.parametrize("formats", FORMATS)
def test_fusion_does_not_change_bits(formats):
    tapped = backend(formats, taps=list(PROGRAM.values()))
    fused = backend(formats)
    assert len(fused.program.ops) < len(tapped.program.ops)
    assert any(isinstance(op, LinearGroup) and any(p.residual for p in op.parts) for op in fused.program.ops)
    assert (whole(fused) == whole(tapped)).all()


@pytest.mark.parametrize("formats", FORMATS)
def test_linears_equal_the_kernel_run_alone(formats):
    native = backend(formats, threads=3, taps=list(PROGRAM.values()))
    plan = lay_plan([part(IDS, 0, 50, Pool().table(50))], 2)
    values = native.run(plan, outputs=list(PROGRAM.values()))
    weights = PackedWeights(PROGRAM, FORMATS[formats])
    for op in PROGRAM.ops:
        if type(op).__name__ == "Linear":
            packed = weights.matrix(op.weight)
            bias = None if op.bias is None else weights.vector(op.bias)
            x = np.ascontiguousarray(values[op.x.name])
            expected = _native.linear(packed.format, packed.data, packed.n, packed.k, x, bias, None, 1)
            assert (values[op.out.name] == expected).all(), op


def test_rope_positions_may_differ_from_slots():
    native = backend("f32", taps=["layers.0.attention.q.normed", "layers.0.attention.q.rotated"])
    ids, table = IDS[:3], Pool().table(3)
    plan = lay_plan([SequenceStep(ids, 0, table, first_position=100_000)], 2)
    values = native.run(plan, outputs=["layers.0.attention.q.normed", "layers.0.attention.q.rotated"])
    rope = next(op for op in PROGRAM.ops if isinstance(op, Rope))
    x = values["layers.0.attention.q.normed"].reshape(3, HEADS, 2, HEAD_DIM // 2).astype(np.float64)
    angle = (100_000 + np.arange(3.0))[:, None, None] * np.array(rope.frequencies)
    a, b = x[:, :, 0], x[:, :, 1]
    expected = np.stack((a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)), axis=2)
    np.testing.assert_allclose(values["layers.0.attention.q.rotated"], expected.reshape(3, -1), atol=1e-6, rtol=1e-6)


# ---- bits ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FORMATS)
def reference(request):
    return request.param, whole(backend(request.param))


@pytest.mark.parametrize("sizes", [(1, 1, 3, 64), (7,), (64,), (256,), (513, 1)], ids=str)
def test_chunking_does_not_change_bits(reference, sizes):
    formats, expected = reference
    assert (whole(backend(formats), sizes=sizes) == expected).all()


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_do_not_change_bits(reference, threads):
    formats, expected = reference
    assert (whole(backend(formats, threads=threads), sizes=(300, 270, 1)) == expected).all()


def test_instruction_sets_do_not_change_bits(reference, isa):
    formats, expected = reference
    assert (whole(backend(formats), IDS[:290], (280, 1)) == expected[:290]).all()


@pytest.fixture(scope="module")
def mixed_reference():
    return whole(backend("mixed"))


@pytest.mark.parametrize("rows", [*range(1, 21), 31, 32, 33, 64, 127, 512])
def test_row_counts_do_not_change_bits(mixed_reference, rows):
    assert (whole(backend(threads=2), IDS[: rows + 5], (5, rows)) == mixed_reference[: rows + 5]).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_neighbours_do_not_change_bits(threads):
    rng = np.random.default_rng(5)
    sequences = [rng.integers(0, VOCABULARY, count).astype(np.int32) for count in (1, 33, 300, 128, 70)]
    expected = [whole(backend(), ids) for ids in sequences]
    native, pool = backend(threads=threads), Pool(3)
    tables, done = [pool.table(len(ids)) for ids in sequences], [0] * len(sequences)
    while any(at < len(ids) for at, ids in zip(done, sequences, strict=True)):
        running = [int(i) for i in rng.permutation(len(sequences)) if done[i] < len(sequences[i])][: rng.integers(1, 6)]
        ends = [min(len(sequences[i]), done[i] + int(rng.integers(1, 70))) for i in running]
        plan = lay_plan([part(sequences[i], done[i], end, tables[i]) for i, end in zip(running, ends, strict=True)], 2)
        logits, row = native.run(plan)["logits"], 0
        for i, end in zip(running, ends, strict=True):
            assert (logits[row : row + end - done[i]] == expected[i][done[i] : end]).all()
            row, done[i] = row + end - done[i], end


@pytest.mark.skipif(platform.machine() != "x86_64", reason="sets the x86 control register")
@pytest.mark.parametrize("threads", [1, 2])
def test_the_callers_floating_point_environment_does_not_matter(reference, threads):
    formats, expected = reference
    libm = ctypes.CDLL("libm.so.6")
    saved, disturbed = (ctypes.c_ubyte * 32)(), (ctypes.c_ubyte * 32)()
    native = backend(formats, threads=threads)
    plan = lay_plan([part(IDS, 0, 40, Pool().table(40))], 2)
    libm.fegetenv(saved)
    libm.fegetenv(disturbed)
    disturbed[28:32] = list((0x1F80 | 0x8040 | 0x6000).to_bytes(4, "little"))  # flush, denormals are zero, towards zero
    libm.fesetenv(disturbed)
    try:
        actual = native.run(plan)["logits"]
    finally:
        libm.fesetenv(saved)
    assert (actual == expected[:40]).all()


# ---- ranges and outputs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 5, 11, 20])
def test_ranges_continue_one_another(cut):
    native = backend()
    plan = lay_plan([part(IDS, 0, 100, Pool().table(100))], 2)
    expected = native.run(plan)["logits"].copy()
    native.run(plan, 0, cut, outputs=())
    assert (native.run(plan, cut)["logits"] == expected).all()


@pytest.mark.parametrize("name", ["hidden", "layers.0.residual"])
def test_a_step_runs_no_further_than_its_outputs_and_its_keys_need(name):
    native = backend(taps=[name])
    end = native.program.end_for([name])
    rest = [value.name for op in native.program.ops[end:] for value in op.outputs()]
    assert "logits" in rest
    assert not any(isinstance(op, Attention) for op in native.program.ops[end:])
    tables = Pool().table(100)
    plan = lay_plan([part(IDS, 0, 60, tables)], 2)
    expected = whole(backend(taps=[name]), IDS[:60], name=name)
    assert (native.run(plan, outputs=[name])[name] == expected).all()
    assert (native.run(plan, end)["logits"] == whole(backend(), IDS[:60])).all()  # nothing but the rest was missing
    after = native.run(lay_plan([part(IDS, 60, 100, tables)], 2))["logits"]
    assert (after == whole(backend(), IDS[:100])[60:]).all()


def test_a_range_refuses_another_plans_values():
    native = backend()
    tables = Pool().table(100)
    native.run(lay_plan([part(IDS, 0, 50, tables)], 2), 0, 3, outputs=())
    with pytest.raises(ValueError, match="another plan"):
        native.run(lay_plan([part(IDS, 0, 51, tables)], 2), 3)


@pytest.mark.parametrize(("first", "last"), [(-1, 3), (3, 2), (0, 1000)])
def test_a_range_outside_of_the_program_is_refused(first, last):
    with pytest.raises(ValueError, match="range of ops"):
        backend().run(lay_plan([part(IDS, 0, 5, Pool().table(5))], 2), first, last)


def test_outputs_have_the_steps_rows():
    native = backend(taps=["hidden", "layers.1.residual"])
    step = SequenceStep(IDS[:9], 0, Pool().table(9), sampled=[2, 8])
    values = native.run(lay_plan([step], 2), outputs=["logits", "hidden", "layers.1.residual"])
    shapes = {name: value.shape for name, value in values.items()}
    assert shapes == {"logits": (2, VOCABULARY), "hidden": (2, WIDTH), "layers.1.residual": (9, WIDTH)}
    assert (values["logits"] == whole(backend(), IDS[:9])[[2, 8]]).all()


def test_hidden_rows_are_the_final_norm_of_every_token():
    native = backend(taps=["hidden"], program=with_hidden_rows(PROGRAM))
    plan = lay_plan([part(IDS, 0, 50, Pool().table(50))], 2)  # which samples every token
    values = native.run(plan, outputs=["logits", "hidden", HIDDEN_ROWS])
    assert (values[HIDDEN_ROWS] == values["hidden"]).all()
    assert (values["logits"] == whole(backend(), IDS[:50])).all()
    expected = values[HIDDEN_ROWS].copy()
    unsampled = lay_plan([SequenceStep(IDS[:50], 0, Pool().table(50))], 2)
    assert (native.run(unsampled, outputs=[HIDDEN_ROWS])[HIDDEN_ROWS] == expected).all()
    assert native.program.end_for(["logits"]) == native.program.end_for([HIDDEN_ROWS]) - 1  # logits do without it


def test_hidden_rows_need_a_final_norm():
    r = Recorder(VOCABULARY)
    r.linear(r.gather_sampled(r.embed("token_embedding", WIDTH), out="sampled"), "output", VOCABULARY, out="logits")
    with pytest.raises(ProgramError, match="0 norms read sampled rows"):
        with_hidden_rows(r.program())


def test_a_step_without_samples_fills_the_cache():
    native, tables = backend(), Pool().table(100)
    empty = native.run(lay_plan([SequenceStep(IDS[:60], 0, tables)], 2))["logits"]
    assert empty.shape == (0, VOCABULARY)
    assert (native.run(lay_plan([part(IDS, 60, 100, tables)], 2))["logits"] == whole(backend(), IDS[:100])[60:]).all()


def test_values_that_are_not_kept_are_refused_with_the_way_to_get_them():
    native = backend()
    with pytest.raises(KeyError, match=r"layers\.0\.residual.*keeps logits.*taps="):
        native.run(lay_plan([part(IDS, 0, 5, Pool().table(5))], 2), outputs=["layers.0.residual"])
    with pytest.raises(KeyError, match=r"cannot tap nonsense"):
        backend(taps=["nonsense"])


# ---- plans that must be refused --------------------------------------------------------------------------------------


def spoil(section: str, index: int, value: int):
    def change(plan):
        getattr(plan, section)[index] = value

    return change


def header(index: int, value: int):
    def change(plan):
        plan.buffer[index] = value

    return change


def page(group: int, index: int, value: int):
    def change(plan):
        plan.page_tables[group, 0, index] = value

    return change


BAD_PLANS = {
    "version": (header(0, 2), "version 2"),
    "tokens": (header(1, 641), "tokens is 641"),
    "no tokens": (header(1, 0), "tokens is 0"),
    "negative tokens": (header(1, -5), "tokens is -5"),
    "sequences": (header(2, 7), "sequences is 7"),
    "sampled": (header(3, 641), "sampled is 641"),
    "groups": (header(4, 1), "groups is 1"),
    "stride": (header(5, 1 << 30), "words"),
    "negative stride": (header(5, -1), "stride"),
    "token id": (spoil("token_ids", 3, VOCABULARY), r"token_ids\[3\] is 101"),
    "negative token id": (spoil("token_ids", 0, -1), r"token_ids\[0\] is -1"),
    "position": (spoil("positions", 1, -1), r"positions\[1\]"),
    "context": (spoil("slots", 99, 1024), r"slots\[99\] is 1024"),
    "gap": (spoil("slots", 50, 60), "consecutive"),
    "first row": (spoil("row_starts", 0, 1), r"row_starts\[0\]"),
    "empty sequence": (spoil("row_starts", 1, 0), r"row_starts\[1\]"),
    "last row": (spoil("row_starts", 2, 99), r"row_starts\[2\]"),
    "sample order": (spoil("sampled_rows", 1, 0), r"sampled_rows\[1\]"),
    "sample range": (spoil("sampled_rows", 99, 100), r"sampled_rows\[99\]"),
    "page": (page(1, 0, PAGES), "page 0 of sequence 0 in KV group 1 is 80"),
    "freed page": (page(0, 1, -1), "page 1 of sequence 0 in KV group 0 is -1"),
    "wild page": (page(0, 0, -7), "is -7"),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_a_bad_plan_is_refused_before_anything_is_touched(case):
    change, message = BAD_PLANS[case]
    native, pool = backend(), Pool()
    plan = lay_plan([part(IDS, 0, 60, pool.table(60)), part(IDS, 0, 40, pool.table(40))], 2)
    change(plan)
    before = [native.kv_plane(group, plane).copy() for group in range(2) for plane in range(2)]
    with pytest.raises(ValueError, match=message):
        native.run(plan, outputs=())
    after = [native.kv_plane(group, plane) for group in range(2) for plane in range(2)]
    assert all((a == b).all() for a, b in zip(before, after, strict=True))


def test_a_truncated_plan_is_refused():
    plan = lay_plan([part(IDS, 0, 60, Pool().table(60))], 2)
    native = backend()
    for words in (0, 7, 8, 100, len(plan.buffer) - 1):
        with pytest.raises(ValueError, match="step plan"):
            native._open().run(_native.PlanWords(plan.buffer[:words]), 0, 1)


def test_pages_before_the_window_may_be_freed():
    native, pool = backend(), Pool()
    tables = pool.table(400)
    native.run(lay_plan([part(IDS, 0, 399, tables)], 2), outputs=())
    tables[1][: (399 - 89) // PAGE_TOKENS] = [-1] * ((399 - 89) // PAGE_TOKENS)  # group 1 has window 90
    assert (native.run(lay_plan([part(IDS, 399, 400, tables)], 2))["logits"] == whole(backend(), IDS[:400])[399:]).all()


# ---- diagnosis -------------------------------------------------------------------------------------------------------


def spoiled(name: str, index: int, value: float, **options) -> NativeBackend:
    weights = PackedWeights(PROGRAM, MIXED)
    weights.vectors[name][index] = value
    return NativeBackend(PROGRAM, weights, LIMITS, [PAGES, PAGES], **options)


@pytest.mark.parametrize(
    ("weight", "op"),
    [
        ("layers.1.mlp_norm", "RmsNorm layers.1.mlp.in"),
        (
            "layers.0.attention.v.bias",
            "LinearGroup layers.0.attention.q.out, layers.0.attention.k.out, layers.0.attention.v.out",
        ),
        ("output_norm", "RmsNorm hidden"),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_diagnosis_names_the_op_that_first_went_wrong(weight, op, threads):
    native = spoiled(weight, 3, np.nan, threads=threads)
    plan = lay_plan([part(IDS, 0, 40, Pool().table(40))], 2)
    assert np.isnan(native.run(plan)["logits"]).any()
    assert native.diagnose(plan, 39).startswith(op)


def test_diagnosis_finds_keys_that_overflow_the_cache():
    native = spoiled("layers.0.attention.v.bias", 5, 1e6)
    plan = lay_plan([part(IDS, 0, 40, Pool().table(40))], 2)
    native.run(plan)
    assert native.diagnose(plan, 0).startswith("Attention layers.0.attention.o.in")


def test_diagnosis_of_a_healthy_row_finds_nothing():
    native, pool = backend(), Pool()
    sick, well = pool.table(60), pool.table(40)
    native.run(lay_plan([part(IDS, 0, 59, sick)], 2))
    native.kv_plane(0, 0)[sick[0][0]] = 0x7FC1
    plan = lay_plan([part(IDS, 0, 40, well), part(IDS, 59, 60, sick)], 2)
    logits = native.run(plan)["logits"]
    assert np.isfinite(logits[:40]).all()
    assert np.isnan(logits[40]).all()
    assert native.diagnose(plan, 5) is None
    assert native.diagnose(plan, 40).startswith("Attention layers.0.attention.o.in")
    with pytest.raises(ValueError, match="no such row"):
        native.diagnose(plan, 41)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_memory_of_weights_and_views_is_kept_alive():
    native = backend()
    expected = native.run(lay_plan([part(IDS, 0, 30, Pool().table(30))], 2))["logits"]
    gc.collect()
    kept = expected.copy()
    again = native.run(lay_plan([part(IDS, 0, 30, Pool().table(30))], 2))["logits"]
    native.close()
    del native
    gc.collect()
    assert (again == kept).all()


def test_bytes_are_counted():
    native = backend(threads=2)
    pages = sum(group.page_bytes * PAGES for group in native.kv_groups)
    assert pages <= native.kv_bytes() < pages + 4096
    widest = max(value.width * 4 for value in native.program.values().values() if value.rows is Rows.TOKENS)
    assert native.scratch_bytes() > LIMITS.tokens * widest
    assert native.kv_plane(0, 0).shape == (PAGES, 2, KV_HEADS, PAGE_TOKENS * HEAD_DIM)


def test_a_closed_backend_says_so():
    native = backend()
    native.close()
    with pytest.raises(ValueError, match="closed"):
        native.run(lay_plan([part(IDS, 0, 5, Pool().table(5))], 2))


def test_a_pool_serves_two_backends_and_outlives_both():
    pool = _native.ThreadPool(3)
    plan = lay_plan([part(IDS, 0, 60, Pool().table(60))], 2)
    expected = backend().run(plan)["logits"].copy()
    first, second = backend(threads=pool), backend(threads=pool)
    assert (first.run(plan)["logits"] == expected).all()
    assert (second.run(plan)["logits"] == expected).all()
    first.close()
    del first
    assert (second.run(plan)["logits"] == expected).all()
    second.close()
    del second
    assert pool.fork_join(200) == [200] * 3  # what the backends told it to read ahead is gone with them


def test_one_pool_of_pages_per_group_is_needed():
    with pytest.raises(ValueError, match="kv_pages has 1 entries, the program 2"):
        NativeBackend(PROGRAM, PackedWeights(PROGRAM, F32), LIMITS, [PAGES])
