"""The native sampler against the same definitions written plainly in numpy's float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from tokenmill import _native

OK, NOT_FINITE, NOTHING_ALLOWED = 0, 1, 2
INF = float("inf")
ONE = _native.ThreadPool(1)


def history(tokens: Sequence[int] = (0,), prompt: int | None = None, **settings: object) -> _native.TokenHistory:
    """An output with these tokens, of which ``prompt``, or all, are the prompt's."""
    own = _native.SamplerSettings(**settings)  # type: ignore[arg-type]
    return _native.TokenHistory(own, np.array(tokens, np.int32), len(tokens) if prompt is None else prompt)


def sample(
    logits: np.ndarray, tokens: list[int] | None = None, prompt: int | None = None, **settings: object
) -> tuple[int, int]:
    """Id and status for one row."""
    row = np.ascontiguousarray(logits, dtype=np.float32)[None]
    result = _native.Sampler(row.shape[1], ONE).sample(row, [0], [history(tokens or [0], prompt, **settings)])
    return result.ids[0], result.status[0]


def draw(logits: np.ndarray, draws: int, **settings: object) -> np.ndarray:
    """Counts of ``draws`` ids, each with another seed."""
    row = np.ascontiguousarray(logits, dtype=np.float32)[None]
    outputs = [history(seed=seed, **settings) for seed in range(draws)]
    result = _native.Sampler(row.shape[1], ONE).sample(row, [0] * draws, outputs)
    assert not any(result.status)
    return np.bincount(result.ids, minlength=row.shape[1])


def kept(logits: np.ndarray, draws: int = 3000, **settings: object) -> set[int]:
    return set(np.flatnonzero(draw(logits, draws, **settings)).tolist())


def reference(
    logits: np.ndarray,
    *,
    temperature: float = 1.0,
    min_p: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    typical_p: float = 1.0,
) -> np.ndarray:
    """The distribution that the settings define."""
    x = np.asarray(logits, np.float32).astype(np.float64) / np.float64(np.float32(temperature))
    weights = np.exp(x - x.max())

    def keep(order: np.ndarray, target: float) -> None:
        cumulative = np.cumsum(weights[order])
        last = int(np.searchsorted(cumulative, target - 1e-12))
        weights[order[last + 1 :]] = 0

    weights[weights < np.float32(min_p)] = 0
    best_first = np.lexsort((np.arange(len(x)), -x))
    if top_k:
        weights[best_first[top_k:]] = 0
    if top_p < 1:
        keep(best_first, top_p * weights.sum())
    if typical_p < 1:
        p = weights / weights.sum()
        information = np.where(p > 0, -np.log(np.where(p > 0, p, 1)), INF)
        entropy = (p[p > 0] * information[p > 0]).sum()
        order = np.lexsort((np.arange(len(x)), np.abs(information - entropy)))
        keep(order, typical_p * weights.sum())
    return weights / weights.sum()


SETTINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 3.0},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"typical_p": 0.6},
    {"top_k": 20, "top_p": 0.9, "temperature": 1.3},
    {"min_p": 0.05, "typical_p": 0.7},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_follow_the_distribution_that_the_settings_define(settings: dict[str, float], isa: str) -> None:
    draws = 20_000
    logits = np.random.default_rng(5).normal(size=60) * 1.5
    counts = draw(logits, draws, **settings)
    expected = reference(logits, **settings) * draws  # type: ignore[arg-type]
    assert not counts[expected == 0].any(), "a token was drawn that the settings exclude"
    likely = expected >= 5
    rest = expected[~likely].sum()
    chi_square = ((counts[likely] - expected[likely]) ** 2 / expected[likely]).sum()
    freedom = int(likely.sum()) - 1
    if rest >= 5:
        chi_square += (counts[~likely].sum() - rest) ** 2 / rest
        freedom += 1
    # Mean `freedom`, variance 2 `freedom`: five standard deviations and a little for few degrees.
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom) + 5


def heavy_token(rng: np.random.Generator, n: int) -> np.ndarray:
    row = rng.normal(size=n)
    row[n // 3] = row.max() + 9
    return row


ROWS = {
    "equal": lambda rng, n: np.zeros(n),
    "nearly equal": lambda rng, n: rng.normal(size=n) * 0.01,
    "flat": lambda rng, n: rng.normal(size=n),
    "usual": lambda rng, n: rng.normal(size=n) * 4,
    "steep": lambda rng, n: rng.normal(size=n) * 40,
    "few levels": lambda rng, n: np.round(rng.normal(size=n) * 4) / 2,
    "two levels": lambda rng, n: np.where(rng.random(n) < 0.3, 1.0, 0.0),
    "half excluded": lambda rng, n: np.where(rng.random(n) < 0.5, -INF, rng.normal(size=n)),
    "heavy token": heavy_token,
    "heavy tail": lambda rng, n: -1.1 * np.log1p(rng.permutation(n)),
    "in order": lambda rng, n: np.sort(rng.normal(size=n) * 2),
}


@pytest.mark.parametrize("vocabulary", [70, 1000, 50_000])
@pytest.mark.parametrize("row_of", ROWS.values(), ids=ROWS)
def test_a_draw_is_the_inverse_of_the_cumulative_distribution(
    vocabulary: int, row_of: Callable[[np.random.Generator, int], np.ndarray]
) -> None:
    """In id order, at the seed's uniform number. One token too many or too few among those kept would show."""
    row = np.ascontiguousarray(row_of(np.random.default_rng(vocabulary), vocabulary)[None], np.float32)
    # Keys that tie, or nearly: which of them typical sampling keeps is a matter of the last bits.
    ties = len(np.unique(row)) < 20 or np.ptp(row[np.isfinite(row)]) < 1
    draws = 100
    words = [_native.draw_words(seed, 0, 1) for seed in range(draws)]
    uniform = np.array([((a >> 5) * 2**26 + (b >> 6)) / 2**53 for a, b, _, _ in words])
    sampler = _native.Sampler(vocabulary, ONE)
    for settings in (
        {},
        {"top_k": 17},
        {"top_k": vocabulary - 3},
        {"top_p": 0.5},
        {"top_p": 0.99},
        {"min_p": 0.3},
        {"top_k": 40, "top_p": 0.9},
        {"typical_p": 0.7},
        {"top_k": vocabulary // 10, "top_p": 0.9},
        {"top_k": vocabulary // 10, "typical_p": 0.9},
        {"top_k": vocabulary // 3, "top_p": 0.6, "typical_p": 0.8},
        {"min_p": 0.001, "top_p": 0.05, "typical_p": 0.5},
    ):
        if "typical_p" in settings and ties:
            continue
        outputs = [history(seed=seed, **settings) for seed in range(draws)]
        ids = np.array(sampler.sample(row, [0] * draws, outputs).ids)
        cumulative = np.concatenate([[0], np.cumsum(reference(row[0], **settings))])  # type: ignore[arg-type]
        tolerance = 3e-6
        assert (cumulative[ids] <= uniform + tolerance).all()
        assert (cumulative[ids + 1] >= uniform - tolerance).all()


def test_ties_at_the_border_of_top_k_are_won_by_lower_ids(isa: str) -> None:
    logits = np.array([1.0, 2.0, 1.0, 1.0, 2.0, 1.0])
    assert kept(logits, top_k=3) == {0, 1, 4}
    assert kept(np.zeros(200), top_k=4) == {0, 1, 2, 3}


def test_ties_at_the_border_of_top_p_are_won_by_lower_ids(isa: str) -> None:
    assert kept(np.zeros(8), top_p=0.5) == {0, 1, 2, 3}
    assert kept(np.zeros(5000), 300, top_p=0.001) == {0, 1, 2, 3, 4}


def test_top_p_keeps_the_token_that_reaches_the_mass() -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    assert kept(logits, top_p=0.49) == {0}
    assert kept(logits, top_p=0.51) == {0, 1}
    assert kept(logits, top_p=0.79) == {0, 1}
    assert kept(logits, top_p=0.81) == {0, 1, 2}


def test_top_p_applies_to_what_top_k_left() -> None:
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert kept(logits, top_k=2, top_p=0.6) == {0, 1}  # 0.4 / 0.7 is below 0.6
    assert kept(logits, top_k=2, top_p=0.56) == {0}


def test_the_ends_of_each_range() -> None:
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    every = {0, 1, 2, 3}
    assert kept(logits, top_p=1.0) == every
    assert kept(logits, top_p=0.0) == {0}
    assert kept(logits, top_k=4) == kept(logits, top_k=1000) == kept(logits, top_k=0) == every
    assert kept(logits, top_k=1) == {0}
    assert kept(logits, min_p=0.0) == every
    assert kept(logits, min_p=1.0) == {0}
    assert kept(logits, typical_p=1.0) == every
    assert len(kept(logits, typical_p=0.0)) == 1


@pytest.mark.parametrize("others", [{}, {"top_k": 200}, {"top_k": 5}, {"min_p": 0.1}, {"temperature": 0.01}], ids=str)
@pytest.mark.parametrize("vocabulary", [100, 320, 49152])
def test_a_share_of_nothing_keeps_one_token(isa: str, vocabulary: int, others: dict[str, float]) -> None:
    logits = np.random.default_rng(vocabulary).normal(0, 3, vocabulary)
    assert kept(logits, 20, top_p=0.0, **others) == {int(logits.argmax())}
    assert len(kept(logits, 20, typical_p=0.0, **others)) == 1


def test_typical_sampling_can_drop_the_likeliest_token() -> None:
    # Entropy 2.36 nats: the many tokens of probability 0.05 (3.0 nats) are nearer to it than 0.4 (0.92 nats).
    logits = np.log([0.4] + [0.05] * 12)
    assert 0 not in kept(logits, typical_p=0.5)


def test_a_row_with_one_possible_token_gives_it(isa: str) -> None:
    logits = np.full(300, -INF)
    logits[123] = -4.0
    for settings in ({"temperature": 0.0}, {}, {"top_k": 7}, {"top_p": 0.3}, {"min_p": 0.1}, {"typical_p": 0.5}):
        assert sample(logits, **settings) == (123, OK)


@pytest.mark.parametrize("bad", [float("nan"), INF])
@pytest.mark.parametrize("place", [0, 63, 64, 299])
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"top_p": 0.5}], ids=str)
def test_a_row_with_nan_or_infinity_is_reported(bad: float, place: int, settings: dict[str, float], isa: str) -> None:
    logits = np.zeros(300)
    logits[place] = bad
    assert sample(logits, **settings) == (-1, NOT_FINITE)


def test_a_row_where_nothing_may_be_picked_is_reported() -> None:
    assert sample(np.full(300, -INF))[1] == NOTHING_ALLOWED
    assert sample(np.zeros(3), min_tokens=5, end_ids=[0, 1, 2])[1] == NOTHING_ALLOWED


def test_greedy_takes_the_lowest_of_equal_ids(isa: str) -> None:
    logits = np.zeros(500)
    logits[[77, 78, 300]] = 2.5
    assert sample(logits, temperature=0.0) == (77, OK)


def test_huge_and_tiny_logits_and_temperatures() -> None:
    logits = np.array([-3e38, 3e38, 1.0, -INF])
    assert sample(logits, temperature=0.001) == (1, OK)
    assert sample(logits, temperature=1.0) == (1, OK)
    assert kept(np.array([0.0, 1.0, -INF]), temperature=1e6) == {0, 1}


# ---- penalties and masks ---------------------------------------------------------------------------------------------


def penalized(
    logits: np.ndarray, tokens: list[int], prompt: int, repetition: float, presence: float, frequency: float
) -> np.ndarray:
    """vLLM's: repetition over prompt and output, then frequency and presence over the output."""
    x = logits.astype(np.float32).copy()
    for token in set(tokens):
        x[token] = x[token] / np.float32(repetition) if x[token] > 0 else x[token] * np.float32(repetition)
    for token in set(tokens[prompt:]):
        x[token] -= np.float32(frequency) * np.float32(tokens[prompt:].count(token))
        x[token] -= np.float32(presence)
    return x


def test_penalties_are_those_of_vllm(isa: str) -> None:
    rng = np.random.default_rng(8)
    for _ in range(200):
        logits = rng.normal(size=40) * 3
        tokens = rng.integers(0, 40, size=30).tolist()
        prompt = int(rng.integers(0, 30))
        repetition, presence, frequency = rng.uniform(0.5, 2), rng.uniform(-2, 2), rng.uniform(-2, 2)
        expected = int(np.argmax(penalized(logits, tokens, prompt, repetition, presence, frequency)))
        found = sample(
            logits,
            tokens,
            prompt,
            temperature=0.0,
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
        )
        assert found == (expected, OK)


def test_prompt_tokens_get_no_presence_or_frequency_penalty() -> None:
    logits = np.array([1.0, 0.9, 0.0])
    assert sample(logits, [0, 0, 0], 3, temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0) == (0, OK)
    assert sample(logits, [0, 0, 0], 2, temperature=0.0, presence_penalty=0.2) == (1, OK)
    assert sample(logits, [0, 1, 1], 3, temperature=0.0, repetition_penalty=2.0) == (0, OK)


def test_penalties_leave_nothing_behind_for_the_next_row() -> None:
    sampler = _native.Sampler(50, ONE)
    logits = np.zeros((1, 50), np.float32)
    logits[0, 7] = 1.0
    strict = {"temperature": 0.0, "frequency_penalty": 2.0}
    assert sampler.sample(logits, [0], [history([7, 7, 8], 0, **strict)]).ids == [0]
    assert sampler.sample(logits, [0], [history([8], 0, **strict)]).ids == [7]


def test_bias_is_added_before_the_penalties() -> None:
    # (1 + 2) / 2 = 1.5 is below 1.6; 1 / 2 + 2 would not be.
    logits = np.array([1.0, 1.6])
    assert sample(logits, [0], 1, temperature=0.0, bias_ids=[0], biases=[2.0], repetition_penalty=2.0) == (1, OK)


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 33, 64, 1000])
def test_a_mask_leaves_the_draw_of_a_row_without_the_others(vocabulary: int, isa: str) -> None:
    rng = np.random.default_rng(vocabulary)
    words = -(-vocabulary // 32)
    sampler = _native.Sampler(vocabulary, ONE)
    for seed in range(20):
        row = rng.normal(size=(1, vocabulary)).astype(np.float32)
        kept_ids = np.flatnonzero(rng.random(vocabulary) < rng.choice((0.02, 0.5, 0.98)))
        if not len(kept_ids):
            continue
        bits = np.zeros(32 * words, np.uint8)
        bits[kept_ids] = 1
        mask = np.packbits(bits, bitorder="little").view(np.int32)
        without = np.full_like(row, -np.inf)
        without[0, kept_ids] = row[0, kept_ids]
        settings = {"temperature": 0.9, "seed": seed, "logprobs": 0}
        expected = sampler.sample(without, [0], [history(**settings)])
        masked = sampler.sample(row, [0], [history(**settings)], [mask])
        listed = [int(word) for word in mask.view(np.uint32)]
        allowed = sampler.sample(row, [0], [history(**settings, allowed=listed)], [None])
        assert expected.ids == masked.ids == allowed.ids
        plain = sampler.score(row, [0], masked.ids)
        assert masked.logprobs(0) == plain.logprobs(0), "log-probabilities are those of the whole row"


def test_tokens_beyond_the_allowed_words_are_excluded() -> None:
    row = np.zeros((1, 200), np.float32)
    row[0, 150] = 9.0
    results = _native.Sampler(200, ONE).sample(row, [0], [history([1], temperature=0.0, allowed=[0b1000])])
    assert results.ids == [3]


@pytest.mark.parametrize(
    ("output", "excluded"), [([], {9}), ([5], {9, 6}), ([4, 5], {9, 6, 7}), ([5, 4], {9}), ([5, 4, 5], {9, 6, 7})]
)
def test_a_bad_word_is_not_completed(output: list[int], excluded: set[int]) -> None:
    """The prompt ends as the words begin, which does not count."""
    words = [[9], [5, 6], [4, 5, 7]]
    row = np.zeros((1, 12), np.float32)
    possible = set()
    for best in range(12):
        row[:] = 0.0
        row[0, best] = 1.0
        tokens = history([4, 5, *output], 2, temperature=0.0, bad_words=words)
        results = _native.Sampler(12, ONE).sample(row, [0], [tokens])
        if results.ids == [best]:
            possible.add(best)
    assert possible == set(range(12)) - excluded


def test_masks_of_another_size_are_refused() -> None:
    arguments = (np.zeros((1, 40), np.float32), [0], [history()])
    with pytest.raises(ValueError, match="a mask has 1 words, the vocabulary takes 2"):
        _native.Sampler(40, ONE).sample(*arguments, [np.zeros(1, np.int32)])
    with pytest.raises(ValueError, match="as long as rows"):
        _native.Sampler(40, ONE).sample(*arguments, [None, None])
    with pytest.raises(ValueError, match="bad_words"):
        _native.SamplerSettings(bad_words=[[]])


def test_end_tokens_are_masked_until_min_tokens_are_there() -> None:
    logits = np.array([5.0, 1.0, 0.0])
    assert sample(logits, [2, 2, 1], 2, temperature=0.0, min_tokens=2, end_ids=[0]) == (1, OK)
    assert sample(logits, [2, 2, 1, 1], 2, temperature=0.0, min_tokens=2, end_ids=[0]) == (0, OK)


# ---- random numbers --------------------------------------------------------------------------------------------------


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as its paper writes it."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        low, high = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (high >> 32) ^ b ^ k0, high & 0xFFFFFFFF, (low >> 32) ^ d ^ k1, low & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [a, b, c, d]


def test_philox_gives_the_published_words() -> None:
    assert _native.draw_words(0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_each_draw_has_words_of_its_own() -> None:
    seed = 0x0123456789ABCDEF
    for sample_index, position, purpose in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (7, 99999, 3)):
        expected = philox([position, sample_index, purpose, 0], [seed & 0xFFFFFFFF, seed >> 32])
        assert _native.draw_words(seed, sample_index, position, purpose) == expected


# ---- the same bits everywhere ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [5003, 60_001])
def test_every_instruction_set_path_thread_count_and_batch_gives_the_same_bits(vocabulary: int) -> None:
    rng = np.random.default_rng(11)
    rows = 40
    logits = np.ascontiguousarray(
        (rng.normal(size=(rows, vocabulary)) * rng.uniform(0.1, 6, size=(rows, 1))), np.float32
    )
    logits[::7, ::3] = np.round(logits[::7, ::3])  # ties
    outputs = [
        history(
            rng.integers(0, vocabulary, size=50).tolist(),
            20,
            temperature=float(rng.choice([0.0, 0.6, 1.0, 2.0])),
            top_k=int(rng.choice([0, 3, 300, vocabulary // 9, vocabulary // 2])),
            top_p=float(rng.choice([1.0, 0.9, 0.4])),
            min_p=float(rng.choice([0.0, 0.02])),
            typical_p=float(rng.choice([1.0, 0.8])),
            frequency_penalty=float(rng.choice([0.0, 0.7])),
            repetition_penalty=float(rng.choice([1.0, 1.2])),
            seed=row,
            logprobs=7,
        )
        for row in range(rows)
    ]

    def run(threads: int, order: np.ndarray) -> list[tuple[object, ...]]:
        result = _native.Sampler(vocabulary, _native.ThreadPool(threads)).sample(
            logits, order.tolist(), [outputs[row] for row in order]
        )
        back = np.argsort(order).tolist()
        return [(result.ids[place], result.status[place], result.logprobs(place)) for place in back]

    before = _native.active_isa()
    try:
        _native.set_active_isa("portable")
        expected = run(1, np.arange(rows))
        for name in _native.available_isas():
            _native.set_active_isa(name)
            for threads in (1, 2, 3, 7):
                assert run(threads, rng.permutation(rows)) == expected
    finally:
        _native.set_active_isa(before)


# ---- log-probabilities -----------------------------------------------------------------------------------------------


def test_logprobs_ranks_and_best_tokens_are_those_of_the_raw_row(isa: str) -> None:
    rng = np.random.default_rng(13)
    logits = np.ascontiguousarray(rng.normal(size=(5, 3001)) * 4, np.float32)
    logits[:, 10] = logits[:, 20]
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    targets = [0, 10, 20, 2999, 3000]
    found = _native.Sampler(3001, _native.ThreadPool(2)).score(logits, range(5), targets, 9)
    assert not any(found.status)
    for row in range(5):
        logprob, rank, best = found.logprobs(row)
        assert logprob == pytest.approx(exact[row, targets[row]], abs=2e-6)
        assert rank == 1 + (logits[row] > logits[row, targets[row]]).sum()
        order = np.lexsort((np.arange(3001), -logits[row]))[:9]
        assert [token for token, _ in best] == order.tolist()
        assert [value for _, value in best] == pytest.approx(exact[row, order], abs=2e-6)


def test_logprobs_do_not_see_penalties_and_temperature() -> None:
    logits = np.log(np.array([[0.7, 0.2, 0.1]], np.float32))
    output = history(temperature=0.0, bias_ids=[2], biases=[10.0], logprobs=3)
    found = _native.Sampler(3, ONE).sample(logits, [0], [output])
    logprob, rank, best = found.logprobs(0)
    assert (found.ids, rank) == ([2], 3)
    assert logprob == pytest.approx(np.log(0.1), abs=1e-6)
    assert [token for token, _ in best] == [0, 1, 2]


def test_more_best_tokens_than_the_vocabulary_has() -> None:
    found = _native.Sampler(2, ONE).score(np.zeros((1, 2), np.float32), [0], [0], 4)
    half = pytest.approx(np.log(0.5))
    assert found.logprobs(0)[2] == [(0, half), (1, half)]


def test_a_bad_row_is_reported_by_score_too() -> None:
    assert _native.Sampler(2, ONE).score(np.full((1, 2), np.nan, np.float32), [0], [0]).status == [NOT_FINITE]


def test_a_pick_is_a_sample_without_what_nobody_asked_for() -> None:
    sampler = _native.Sampler(3, ONE)
    logits = np.array([[0.0, 2.0, 1.0], [0.0, np.nan, 1.0]], np.float32)
    plain, told = history(temperature=0.0), history(temperature=0.0, logprobs=1)
    assert sampler.pick(logits, [0, 0], [plain, plain]) == [1, 1]
    with_logprobs = sampler.pick(logits, [0, 0], [plain, told])
    assert isinstance(with_logprobs, _native.Samples)
    assert with_logprobs.logprobs(1) == sampler.sample(logits, [0], [told]).logprobs(0)
    with_a_bad_row = sampler.pick(logits, [0, 1], [plain, plain])
    assert isinstance(with_a_bad_row, _native.Samples)
    assert (with_a_bad_row.ids, with_a_bad_row.status) == ([1, -1], [OK, NOT_FINITE])


def test_a_history_grows_by_what_is_appended() -> None:
    tokens = history([3, 1, 2], 2)
    tokens.append(7)
    copied = tokens.copy(1, 4)
    assert (len(tokens), copied.tolist(), copied.dtype) == (4, [1, 2, 7], np.int32)
    tokens.append(8)
    assert copied.tolist() == [1, 2, 7], "a copy stays as it is"
    with pytest.raises(IndexError):
        tokens.copy(3, 6)


# ---- misuse ----------------------------------------------------------------------------------------------------------


def test_ids_outside_of_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="logit_bias holds token 3"):
        sample(np.zeros(3), bias_ids=[3], biases=[1.0])
    with pytest.raises(ValueError, match="the sequence holds token -1"):
        sample(np.zeros(3), [-1], repetition_penalty=1.1)
    with pytest.raises(ValueError, match="prompt_tokens exceeds"):
        history([1, 2], 3)
    with pytest.raises(ValueError, match="targets holds token 9"):
        _native.Sampler(3, ONE).score(np.zeros((1, 3), np.float32), [0], [9])
    with pytest.raises(ValueError, match="row 1 is not among 1 rows"):
        _native.Sampler(3, ONE).score(np.zeros((1, 3), np.float32), [1], [0])
