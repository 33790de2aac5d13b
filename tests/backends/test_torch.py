"""The torch backend: paging, chunking and ranges change nothing, and each emulated rounding is the stated one."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from tiny_models import (
    LIMITS,
    ArrayWeights,
    bind_model,
    logits,
    random_transformers_model,
    random_weights,
    relative_error,
    saved_tensors,
    torch_backend,
    whole_plan,
)

from tokenmill.backends.backend import Backend
from tokenmill.backends.torch import TorchBackend, round_to_int8
from tokenmill.program.kv import KvElement
from tokenmill.program.ops import ActivationFormat, WeightFormat
from tokenmill.program.program import Program
from tokenmill.program.recorder import Recorder
from tokenmill.program.step import SequenceStep, lay_plan

CLOSE = 5e-6
RNG = np.random.default_rng(11)
IDS = [int(i) for i in RNG.integers(0, 97, 120)]


@pytest.fixture(scope="module")
def gemma() -> tuple[Program, ArrayWeights]:
    """Local layers (window 40) and global ones: two KV groups."""
    config = transformers.Gemma3TextConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        sliding_window=40,
    )
    model = random_transformers_model(config)
    bound = bind_model(model)
    return bound.program, ArrayWeights(saved_tensors(model), bound.sources)


@pytest.fixture
def backend(gemma: tuple[Program, ArrayWeights]) -> TorchBackend:
    return torch_backend(*gemma)


def chunk(ids: list[int], first: int, end: int, pages: list[int], freed: int = 0) -> SequenceStep:
    """Tokens [first, end) of a sequence on ``pages`` in both groups; ``freed`` pages of the local group are gone."""
    local = [-1] * freed + pages[freed:]
    return SequenceStep(ids[first:end], first, [local, pages], sampled=list(range(end - first)))


def test_it_is_a_backend(backend: TorchBackend) -> None:
    typed: Backend = backend
    assert typed.limits == LIMITS
    assert backend.kv_bytes() == sum(64 * group.page_bytes for group in backend.kv_groups)
    logits(backend, IDS[:4])
    assert backend.scratch_bytes() > 0
    backend.close()
    assert backend.kv_bytes() == 0


@pytest.mark.parametrize(
    ("weight", "op"),
    [
        ("layers.2.mlp_norm", "RmsNorm layers.2.mlp.in"),
        ("layers.0.attention.o", "Linear layers.0.attention.o.out"),
        ("output_norm", "RmsNorm hidden"),
    ],
)
def test_diagnosis_names_the_op_that_first_went_wrong(
    gemma: tuple[Program, ArrayWeights], weight: str, op: str
) -> None:
    backend = torch_backend(*gemma)
    plan = whole_plan(IDS[:40], 2)
    backend.run(plan)
    assert backend.diagnose(plan, 39) is None
    backend._weight(weight)[..., 3] = torch.nan
    assert np.isnan(backend.run(plan)["logits"]).any()
    assert backend.diagnose(plan, 39) == op


def test_diagnosis_looks_at_the_rows_own_sequence(backend: TorchBackend) -> None:
    plan = lay_plan([chunk([5] * 20, 0, 20, [1]), chunk([6] * 20, 0, 20, [2])], 2)
    backend._weight("token_embedding")[5] = torch.nan
    assert np.isnan(backend.run(plan)["logits"][3]).any()
    assert backend.diagnose(plan, 3) == "Embed embedding"
    assert backend.diagnose(plan, 25) == "Linear logits"  # the head is tied to the embedding


@pytest.mark.parametrize("cuts", [[64], [31, 32, 33], [*range(1, 120)]], ids=len)
def test_a_prompt_in_chunks_gives_the_logits_of_the_whole(backend: TorchBackend, cuts: list[int]) -> None:
    whole = logits(backend, IDS)
    pages = [9, 3, 40, 5]
    parts = []
    for first, end in zip([0, *cuts], [*cuts, len(IDS)], strict=True):
        parts.append(backend.run(lay_plan([chunk(IDS, first, end, pages)], 2))["logits"].copy())
    assert relative_error(np.concatenate(parts), whole) < CLOSE


def test_sequences_packed_in_one_step_do_not_see_each_other(backend: TorchBackend) -> None:
    prompts = [IDS[:50], IDS[50:51], IDS[40:120]]
    alone = [logits(backend, prompt) for prompt in prompts]
    pages = [[10, 11], [12], [22, 21, 20]]
    plan = lay_plan([chunk(p, 0, len(p), at) for p, at in zip(prompts, pages, strict=True)], 2)
    assert relative_error(backend.run(plan)["logits"], np.concatenate(alone)) < CLOSE


def test_prefill_and_decode_share_a_step(backend: TorchBackend) -> None:
    whole = logits(backend, IDS)
    backend.run(lay_plan([chunk(IDS, 0, 70, [1, 2, 3])], 2))
    plan = lay_plan([chunk(IDS, 70, 71, [1, 2, 3]), chunk(IDS, 0, 33, [7, 6])], 2)
    found = backend.run(plan)["logits"]
    assert relative_error(found, np.concatenate((whole[70:71], whole[:33]))) < CLOSE


def test_pages_used_before_leave_nothing_behind(backend: TorchBackend) -> None:
    fresh = logits(backend, IDS[:40])
    logits(backend, IDS[::-1])
    assert relative_error(logits(backend, IDS[:40]), fresh) < CLOSE


def test_pages_that_left_the_window_may_be_freed(backend: TorchBackend) -> None:
    """At slot 110, a window of 40 reaches back to slot 71: pages 0 and 1 are gone from the local group."""
    whole = logits(backend, IDS)
    pages = [4, 5, 6, 7]
    backend.run(lay_plan([chunk(IDS, 0, 110, pages)], 2))
    found = backend.run(lay_plan([chunk(IDS, 110, 111, pages, freed=2)], 2))["logits"]
    assert relative_error(found, whole[110:111]) < CLOSE
    with pytest.raises(ValueError, match=r"sequence 0 of the step needs pages 2 to 3 of KV group 0.*\[-1, 7\]"):
        backend.run(lay_plan([chunk(IDS, 111, 112, pages, freed=3)], 2))


def test_a_slot_that_was_never_written_shows_as_nan(backend: TorchBackend) -> None:
    assert np.isnan(backend.run(lay_plan([chunk(IDS, 32, 40, [1, 2])], 2))["logits"]).all()


def test_only_sampled_rows_have_logits(backend: TorchBackend) -> None:
    whole = logits(backend, IDS)
    found = backend.run(whole_plan(IDS, 2, sampled=[0, 7, 119]))["logits"]
    assert relative_error(found, whole[[0, 7, 119]]) < CLOSE


def test_position_and_slot_are_separate(gemma: tuple[Program, ArrayWeights]) -> None:
    """RoPE is relative: shifting all positions changes little, shifting half of them a lot."""
    backend = torch_backend(*gemma, dtype="float64")
    near = logits(backend, IDS[:20])
    table = [[0], [0]]

    def steps(second_position: int) -> np.ndarray:
        first = SequenceStep(IDS[:10], 0, table, sampled=range(10), first_position=100)
        second = SequenceStep(IDS[10:20], 10, table, sampled=range(10), first_position=second_position)
        return np.concatenate([backend.run(lay_plan([step], 2))["logits"].copy() for step in (first, second)])

    assert relative_error(steps(110), near) < CLOSE
    assert relative_error(steps(140), near) > 1e-2


# ---- ranges and outputs ----------------------------------------------------------------------------------------------


def test_ranges_of_ops_continue_each_other(backend: TorchBackend) -> None:
    plan = whole_plan(IDS, 2)
    whole = backend.run(plan)["logits"].copy()
    for cut in range(1, len(backend.program.ops), 5):
        assert not backend.run(plan, 0, cut, outputs=())
        assert relative_error(backend.run(plan, cut)["logits"], whole) == 0


def test_any_value_is_an_output(backend: TorchBackend) -> None:
    names = tuple(backend.program.values())
    results = backend.run(whole_plan(IDS[:9], 2, sampled=[8]), outputs=names)
    assert set(results) == set(names)
    for name, value in backend.program.values().items():
        assert results[name].shape == (1 if value.rows.value == "sampled" else 9, value.width)
        assert results[name].dtype == np.float32
    hidden, head = results["hidden"], backend._weights.decoded("token_embedding")
    assert relative_error(hidden @ head.T, results["logits"]) < CLOSE


def test_values_that_are_unknown_or_gone_are_named(backend: TorchBackend) -> None:
    plan = whole_plan(IDS, 2)
    with pytest.raises(KeyError, match="the program has no value elsewhere"):
        backend.run(plan, outputs=("elsewhere",))
    with pytest.raises(KeyError, match="logits is not alive"):
        backend.run(plan, 0, 5, outputs=("logits",))
    backend.run(plan, 0, 20, outputs=())
    with pytest.raises(KeyError, match="embedding is not alive"):
        backend.run(plan, 20, outputs=("embedding",))
    with pytest.raises(ValueError, match=r"ops \[5, 4\) are not a range"):
        backend.run(plan, 5, 4)


def test_a_later_range_must_have_the_same_plan(backend: TorchBackend) -> None:
    backend.run(whole_plan(IDS, 2), 0, 5, outputs=())
    with pytest.raises(ValueError, match="belong to another plan"):
        backend.run(whole_plan(IDS[:5], 2), 5)


# ---- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([chunk(IDS * 5, 0, 513, list(range(17)))], "the step has 513 tokens, the limit is 512"),
        ([chunk(IDS, 0, 1, [i]) for i in range(9)], "the step has 9 sequences, the limit is 8"),
        ([SequenceStep([1], 512, [list(range(17))] * 2)], "513 slots of a sequence, the limit is 512"),
        ([SequenceStep([97], 0, [[0], [0]])], "a token id is outside the vocabulary of 97"),
        ([SequenceStep([-1], 0, [[0], [0]])], "a token id is outside the vocabulary of 97"),
        ([SequenceStep([1], 0, [[64], [0]])], r"needs pages 0 to 0 of KV group 0.*\[64\] there, of 64 pages"),
    ],
)
def test_plans_that_break_the_limits_are_refused(
    backend: TorchBackend, sequences: list[SequenceStep], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        backend.run(lay_plan(sequences, 2))


def test_bad_parameters_are_refused(gemma: tuple[Program, ArrayWeights], backend: TorchBackend) -> None:
    program, weights = gemma
    with pytest.raises(ValueError, match="kv_pages has 1 entries, the program 2 KV groups"):
        TorchBackend(program, weights, LIMITS, [4])
    with pytest.raises(ValueError, match="dtype 'int8' must be"):
        TorchBackend(program, weights, LIMITS, [4, 4], dtype="int8")
    with pytest.raises(ValueError, match="the step has 1 KV groups, the program 2"):
        backend.run(whole_plan(IDS, 1))


def test_without_torch_the_error_says_what_to_install() -> None:
    code = "import sys; sys.modules['torch'] = None; import tokenmill.backends.torch"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "TokenmillError: the torch backend needs torch: pip install 'tokenmill[torch]'" in result.stderr


# ---- precision -------------------------------------------------------------------------------------------------------


def test_other_element_types_of_values_agree_roughly(gemma: tuple[Program, ArrayWeights]) -> None:
    single = logits(torch_backend(*gemma), IDS)
    double = logits(torch_backend(*gemma, dtype="float64"), IDS)
    assert 0 < relative_error(single, double) < CLOSE
    half = logits(torch_backend(*gemma, dtype="bfloat16"), IDS)
    assert 1e-3 < relative_error(half, double) < 0.2


def attention_program(window: int | None, softcap: float | None) -> Program:
    """Two heads of queries on one KV head of 4, straight from the embedding."""
    r = Recorder(97)
    x = r.embed("token_embedding", 8)
    q, k, v = r.linear(x, "q", 8), r.linear(x, "k", 4), r.linear(x, "v", 4)
    h = r.attention(q, k, v, heads=2, kv_heads=1, scale=0.7, softcap=softcap, window=window, out="attended")
    r.linear(r.gather_sampled(h, out="sampled"), "output", 97, out="logits")
    return r.program()


def attention_by_hand(
    values: dict[str, np.ndarray], window: int | None, softcap: float | None, kv: type, p: type
) -> np.ndarray:
    """One row and head at a time in double precision; K, V and the spans' P rounded to ``kv`` and ``p``."""
    q = values["q.out"].astype(np.float64)
    k, v = (values[name].astype(kv).astype(np.float64) for name in ("k.out", "v.out"))
    out = np.zeros_like(q)
    for row in range(len(q)):
        seen = np.arange(0 if window is None else max(0, row - window + 1), row + 1)
        for head in range(2):
            scores = k[seen] @ q[row, 4 * head : 4 * head + 4] * 0.7
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            top, weight, mixed = scores.max(), 0.0, np.zeros(4)
            for span in np.unique(seen // 256):
                chosen = seen // 256 == span
                peak = scores[chosen].max()
                probabilities = np.exp(scores[chosen] - peak).astype(p).astype(np.float64)
                weight += math.exp(peak - top) * probabilities.sum()
                mixed += math.exp(peak - top) * probabilities @ v[seen[chosen]]
            out[row, 4 * head : 4 * head + 4] = mixed / weight
    return out


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("element", [KvElement.F32, KvElement.F16])
@pytest.mark.parametrize("probability", [KvElement.F32, KvElement.F16])
def test_attention_is_what_its_docstring_says(
    window: int | None, softcap: float | None, element: KvElement, probability: KvElement
) -> None:
    program = attention_program(window, softcap)
    backend = torch_backend(program, random_weights(program, seed=5), element, emulate_probabilities=probability)
    ids = [int(i) for i in np.random.default_rng(1).integers(0, 97, 300)]
    values = dict(backend.run(whole_plan(ids, 1), outputs=("q.out", "k.out", "v.out", "attended")))
    types = {KvElement.F32: np.float64, KvElement.F16: np.float16}
    expected = attention_by_hand(values, window, softcap, types[element], types[probability])
    # A score's last bit can tip a probability to its other neighbour among 16-bit numbers.
    tolerance = 3e-6 if probability is KvElement.F32 else 4e-5
    assert relative_error(values["attended"], expected) < tolerance
    other = attention_by_hand(
        values, window, softcap, np.float16 if element is KvElement.F32 else np.float64, np.float64
    )
    assert relative_error(values["attended"], other) > 2 * tolerance


def test_bf16_keys_err_more_than_fp16_ones() -> None:
    program = attention_program(None, None)

    def attended(element: KvElement) -> np.ndarray:
        backend = torch_backend(program, random_weights(program, seed=5), element)
        return backend.run(whole_plan(IDS, 1), outputs=("attended",))["attended"].copy()

    exact = attended(KvElement.F32)
    fp16, bf16 = (relative_error(attended(element), exact) for element in (KvElement.F16, KvElement.BF16))
    assert 1e-5 < 2 * fp16 < bf16 < 2e-2


def int8_by_hand(x: np.ndarray, group: int) -> np.ndarray:
    """NUMERICS N2, one group at a time in fp32."""
    out = np.empty_like(x)
    for row in range(len(x)):
        for begin in range(0, x.shape[1], group):
            part = x[row, begin : begin + group]
            largest = np.abs(part).max()
            inverse = np.float32(127) / largest if largest > 0 else np.float32(0)
            out[row, begin : begin + group] = np.rint(part * inverse) * np.float32(largest / np.float32(127))
    return out


@pytest.mark.parametrize(
    ("format", "group"), [(ActivationFormat.INT8_GROUP32, 32), (ActivationFormat.INT8_GROUP256, 256)]
)
@pytest.mark.parametrize("width", [16, 32, 80, 256, 576])
def test_int8_rounding_is_that_of_the_numerics_contract(format: ActivationFormat, group: int, width: int) -> None:
    x = np.random.default_rng(2).standard_normal((5, width)).astype(np.float32)
    x[1], x[2, :40], x[3, 0] = 0.0, 0.0, 1000.0
    np.testing.assert_array_equal(round_to_int8(torch.tensor(x), format).numpy(), int8_by_hand(x, group))


def test_int8_rounding_takes_halves_to_even_and_keeps_nan() -> None:
    row = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert round_to_int8(row, ActivationFormat.INT8_GROUP32).tolist() == [[127.0, 0.0, 2.0, 2.0, 0.0, -2.0]]
    assert round_to_int8(torch.tensor([[1.0, math.nan]]), ActivationFormat.INT8_GROUP32).isnan().all()


def test_emulated_activations_round_what_each_format_multiplies() -> None:
    r = Recorder(97)
    x = r.embed("token_embedding", 320)
    for name in ("plain", "small", "large"):
        r.linear(x, name, 7)
    program = r.program()
    weights = random_weights(program)
    packed = {"plain": WeightFormat.BF16, "small": WeightFormat.Q4_0, "large": WeightFormat.Q6_K}
    backend = torch_backend(program, weights, emulate_activations=packed)
    names = ("embedding", "plain.out", "small.out", "large.out")
    values = backend.run(whole_plan(IDS, 0), outputs=names)
    rounded = {"plain": values["embedding"]}
    rounded |= {name: int8_by_hand(values["embedding"], group) for name, group in (("small", 32), ("large", 256))}
    for name, x_rounded in rounded.items():
        assert relative_error(values[f"{name}.out"], x_rounded @ weights.decoded(name).T) < CLOSE
