"""The front door over the toy engine: text, streams, stop strings, errors, threads. The last tests run a real model."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from toy_backend import ToyBackend

import tokenmill.llm
from tokenmill.backends.backend import StepLimits
from tokenmill.engine.assemble import LoadedModel
from tokenmill.engine.core import EngineCore
from tokenmill.engine.engine import Engine
from tokenmill.engine.ledger import MemoryBudget, MemoryLedger
from tokenmill.engine.messages import EngineDeadError, EngineError
from tokenmill.engine.scheduler import MAX_SCORED_ROWS, SchedulerLimits
from tokenmill.errors import MemoryLimitError, UsageError
from tokenmill.llm import LLM, PromptError, SamplingParams
from tokenmill.program.kv import KvGroupSpec
from tokenmill.sampling import SamplingError
from tokenmill.structured import StructuredOutputs
from tokenmill.tokenizer import IncrementalDetokenizer

GROUP = KvGroupSpec(layers=1, kv_heads=1, head_dim=16)
CONTEXT = 320
GREEDY = SamplingParams(temperature=0, max_tokens=12)


class ToyTokenizer:
    """One token per printable character; token 0 begins a text, token 100 ends one, 96 to 99 are bytes of "€"."""

    eos_ids = frozenset({100})
    chat_template = "toy"

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return [0] * add_special + [ord(c) - 31 for c in text]

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in (96, 97, 98):
            return "€".encode()[token_id - 96 : token_id - 95]
        return bytes([token_id + 31])

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return b"".join(self.token_bytes(i) for i in ids if i not in (0, 100)).decode("utf-8", "replace")

    def detokenizer(self, skip_special: bool = True, continues: bool = False) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(self.token_bytes, {0, 100}, 0)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *_: object) -> list[int]:
        return self.encode("".join(f"{m['role']}:{m['content']};" for m in messages))


def toy_model() -> tuple[LoadedModel, ToyBackend]:
    rows = MAX_SCORED_ROWS
    backend = ToyBackend((GROUP,), [100], StepLimits(64, 8, rows, CONTEXT))
    core = EngineCore(backend, vocab_size=101, kv_pages=[100], limits=SchedulerLimits(64, 8, rows, CONTEXT))
    ledger = MemoryLedger(MemoryBudget(10**9, "test", True), 0, backend.kv_bytes(), 0, (100,), (GROUP,), CONTEXT, 8)
    bound: Any = SimpleNamespace(
        architecture="toy", config=SimpleNamespace(max_position=4096), program=SimpleNamespace(vocab_size=101)
    )
    tokenizer: Any = ToyTokenizer()
    return LoadedModel(Path("toy"), bound, tokenizer, {"temperature": 0.5}, ledger, Engine(core), {}), backend


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[LLM, ToyBackend]]:
    loaded, backend = toy_model()
    monkeypatch.setattr(tokenmill.llm, "resolve", Path)
    monkeypatch.setattr(tokenmill.llm, "load_model", lambda config, path: loaded)
    with LLM("toy") as llm:
        yield llm, backend


@pytest.fixture
def llm(toy: tuple[LLM, ToyBackend]) -> LLM:
    return toy[0]


def test_texts_and_token_ids_are_prompts_alone_or_in_lists(llm: LLM) -> None:
    ids = llm.tokenize("hello")
    outputs = llm.generate(["hello", ids], GREEDY)
    assert outputs[0].token_ids == outputs[1].token_ids
    assert [llm.generate("hello", GREEDY)[0].text, llm.generate(ids, GREEDY)[0].text] == [outputs[0].text] * 2
    assert (outputs[0].prompt, outputs[1].prompt) == ("hello", None)
    assert outputs[1].prompt_token_ids == ids


def test_outputs_come_in_the_order_of_their_prompts(llm: LLM) -> None:
    prompts = [f"prompt {i}" for i in range(20)]
    alone = [llm.generate(prompt, GREEDY)[0].text for prompt in prompts]
    assert [output.text for output in llm.generate(prompts, GREEDY)] == alone


def test_each_prompt_may_have_parameters_of_its_own(llm: LLM) -> None:
    short, long = llm.generate(["a", "a"], [SamplingParams(max_tokens=n, ignore_eos=True) for n in (3, 5)])
    assert (len(short.token_ids), len(long.token_ids)) == (3, 5)
    with pytest.raises(UsageError, match="2 prompts came with 1 SamplingParams"):
        llm.generate(["a", "b"], [GREEDY])


def test_streamed_pieces_are_the_text(llm: LLM) -> None:
    whole = llm.generate("stream me", GREEDY)[0]
    chunks = list(llm.stream("stream me", GREEDY))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [i for chunk in chunks for i in chunk.token_ids] == whole.token_ids
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [whole.finish_reason]


def test_a_stop_string_across_tokens_ends_and_is_cut(llm: LLM) -> None:
    plain = llm.generate("stop", SamplingParams(temperature=0, max_tokens=30))[0].text
    stop = plain[7:10]
    assert plain.find(stop) == 7
    params = SamplingParams(temperature=0, max_tokens=30, stop=["never there", stop])
    output = llm.generate("stop", params)[0]
    assert output.text == plain[:7]
    assert (output.finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
    assert len(output.token_ids) == 10
    chunks = list(llm.stream("stop", params))
    assert "".join(chunk.text for chunk in chunks) == plain[:7]
    assert chunks[-1].finish_reason == "stop"


def test_stop_strings_do_not_count_before_min_tokens(llm: LLM) -> None:
    plain = llm.generate("stop", SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))[0].text
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=plain[2], min_tokens=12)
    assert llm.generate("stop", params)[0].text == plain


def test_a_stop_token_is_an_output_token_without_text(llm: LLM) -> None:
    plain = llm.generate("x", GREEDY)[0]
    token = plain.token_ids[4]
    first = plain.token_ids.index(token)
    output = llm.generate("x", SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[token]))[0]
    assert output.token_ids == plain.token_ids[: first + 1]
    assert output.text == llm.detokenize(plain.token_ids[:first])
    assert (output.finish_reason, output.outputs[0].stop_reason) == ("stop", token)


def test_half_a_character_is_held_back_until_its_end(llm: LLM) -> None:
    bias = {96 + i: 0.0 for i in range(3)}
    forced = [
        llm.generate("e", SamplingParams(temperature=0, max_tokens=1, logit_bias={**bias, 96: 1e6}))[0].text,
        "".join(c.text for c in llm.stream("e", SamplingParams(temperature=0, max_tokens=3, logit_bias={96: 1e6}))),
    ]
    # A character that never ends becomes U+FFFD, once per piece, at the end.
    assert forced == ["\ufffd", "\ufffd" * 3]


def test_logprobs_and_prompt_logprobs(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=1)
    output = llm.generate("logs", params)[0]
    assert output.logprobs is not None
    assert [item.best[0][0] for item in output.logprobs] == output.token_ids
    assert output.outputs[0].cumulative_logprob == pytest.approx(sum(item.logprob for item in output.logprobs))
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    scores = llm.score(output.prompt_token_ids)
    assert [item.logprob for item in output.prompt_logprobs[1:] if item] == scores.tolist()


def test_score_is_the_log_probability_of_what_generate_gives(llm: LLM) -> None:
    output = llm.generate("score", SamplingParams(temperature=0, max_tokens=8, logprobs=0))[0]
    scores = llm.score(output.prompt_token_ids + output.token_ids)
    assert output.logprobs is not None
    assert scores[-8:].tolist() == [item.logprob for item in output.logprobs]
    assert llm.score([5]).shape == (0,)


def test_n_outputs_differ_and_a_seed_repeats_them(llm: LLM) -> None:
    params = SamplingParams(n=4, seed=3, max_tokens=10)
    first, second = llm.generate("n", params)[0], llm.generate("n", params)[0]
    assert [o.text for o in first.outputs] == [o.text for o in second.outputs]
    assert len({o.text for o in first.outputs}) == 4
    assert [o.index for o in first.outputs] == [0, 1, 2, 3]


def test_without_a_seed_each_request_draws_its_own(llm: LLM) -> None:
    assert len({o.text for o in llm.generate(["s"] * 6, SamplingParams(max_tokens=10))}) == 6


def test_a_stop_string_in_one_of_n_outputs_ends_that_one_only(llm: LLM) -> None:
    plain = llm.generate("n", SamplingParams(n=3, seed=3, max_tokens=20, ignore_eos=True))[0]
    stop = plain.outputs[1].text[5:8]
    assert not any(stop in plain.outputs[i].text for i in (0, 2))
    stopped = llm.generate("n", SamplingParams(n=3, seed=3, max_tokens=20, ignore_eos=True, stop=stop))[0]
    assert [o.finish_reason for o in stopped.outputs] == ["length", "stop", "length"]
    assert [stopped.outputs[i].text for i in (0, 2)] == [plain.outputs[i].text for i in (0, 2)]


def test_chat_goes_through_the_template_with_the_models_defaults(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    output = llm.chat(messages, GREEDY)
    assert output.prompt_token_ids == llm.tokenize("user:hi;")
    assert llm.default_params().temperature == 0.5


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([], "prompts is empty"),
        ([1, 101], r"holds token 101, outside of the vocabulary 0\.\.100"),
        (["a", 2.5], "prompt 1 is float"),
        ([[1, 2.5]], r"holds 2\.5"),
        ("x" * 320, "has 321 tokens, the context takes 320 with room for 1 more"),
        (["fine", ""], "prompt 1 is empty"),
        (7, "prompts is int"),
    ],
)
def test_a_bad_prompt_is_refused_before_anything_runs(toy: tuple[LLM, ToyBackend], prompt: Any, message: str) -> None:
    llm, backend = toy
    with pytest.raises(UsageError, match=message):
        llm.generate(prompt, GREEDY)
    assert not backend.steps


def test_a_bad_text_to_score_is_refused(llm: LLM) -> None:
    with pytest.raises(PromptError, match="the prompt is empty"):
        llm.score("")
    with pytest.raises(PromptError, match="has 321 tokens, the context takes 320;"):
        llm.score("x" * 320)
    assert len(llm.score("x" * 319)) == 319


def test_parameters_that_name_unknown_tokens_are_refused(llm: LLM) -> None:
    with pytest.raises(SamplingError, match="logit_bias names token 101"):
        llm.generate("a", SamplingParams(logit_bias={101: 1.0}))


def test_nan_logits_raise_for_that_prompt_and_spare_other_callers(toy: tuple[LLM, ToyBackend]) -> None:
    llm, backend = toy
    poison = llm.tokenize("~")[-1]
    expected = llm.generate("fine", GREEDY)[0].text
    backend.poisoned = {poison}
    other = llm.stream("fine", GREEDY)
    with pytest.raises(EngineError, match=f"prompt 1: .*NaN or infinity.*toy.row of token {poison}"):
        llm.generate(["fine", "~"], GREEDY)
    assert "".join(chunk.text for chunk in other) == expected
    assert llm.engine.usage()[0].used == 0


def test_closing_or_dropping_a_stream_returns_its_pages(llm: LLM) -> None:
    endless = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    stream = llm.stream("a", endless)
    next(stream)
    stream.close()
    assert llm.engine.usage()[0].used == 0
    never_started = llm.stream("b", endless)
    del never_started
    assert llm.engine.usage()[0].used == 0


def test_an_interrupt_cancels_what_was_asked_for(toy: tuple[LLM, ToyBackend], monkeypatch: pytest.MonkeyPatch) -> None:
    llm, _ = toy
    calls = iter([None, KeyboardInterrupt()])

    def interrupted(self: Any, event: Any) -> Any:
        error = next(calls)
        if error is not None:
            raise error
        return plain(self, event)

    plain = tokenmill.llm.OutputBuilder.token
    monkeypatch.setattr(tokenmill.llm.OutputBuilder, "token", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("a", SamplingParams(max_tokens=None, ignore_eos=True))
    assert llm.engine.usage()[0].used == 0


def test_many_threads_generate_at_once_and_get_what_each_gets_alone(llm: LLM) -> None:
    params = SamplingParams(seed=9, max_tokens=20)
    prompts = [f"thread {i}" for i in range(6)]
    alone = [llm.generate(prompt, params)[0].text for prompt in prompts]
    found: dict[int, list[str]] = {}

    def work(number: int) -> None:
        found[number] = [llm.generate(prompts[number], params)[0].text for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {i: [text] * 3 for i, text in enumerate(alone)}


def test_a_closed_model_says_so(llm: LLM) -> None:
    llm.close()
    llm.close()
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate("a", GREEDY)


def test_a_dead_engine_says_why(toy: tuple[LLM, ToyBackend]) -> None:
    llm, backend = toy
    backend.fails = RuntimeError("a kernel failed")
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="RuntimeError: a kernel failed"):
            llm.generate("a", GREEDY)


def test_timings_are_in_order(llm: LLM) -> None:
    before = time.monotonic()
    timings = llm.generate("when", GREEDY)[0].timings
    assert timings is not None
    moments = [before, timings.arrival, timings.started, timings.first_token, timings.finished, time.monotonic()]
    assert moments == sorted(moments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("backend", "cuda"),
        ("memory", "lots"),
        ("max_model_len", 0),
        ("max_num_seqs", 0),
        ("max_batch_tokens", 8),
        ("kv_cache_dtype", "int3"),
        ("kv_cache_dtype", []),
        ("cache_dir", 5),
        ("cache_dir", ""),
        ("threads", -1),
        ("enable_prefix_caching", "yes"),
    ],
)
def test_a_bad_configuration_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name):
        LLM("smollm2-135m", **{name: value})


@pytest.mark.parametrize("model", ["", 5])
def test_a_model_must_have_a_name(model: Any) -> None:
    with pytest.raises(UsageError, match="model is "):
        LLM(model)


@pytest.mark.parametrize("prompt", [5, None, b"bytes", {1, 2}, {"a": 1}, [1, "a"], np.zeros((2, 2), int)])
def test_what_is_no_prompt_is_refused(llm: LLM, prompt: Any) -> None:
    for use in (llm.generate, llm.stream, llm.score):
        with pytest.raises(UsageError, match="prompt"):
            use(prompt)


def test_an_array_of_token_ids_is_a_prompt(llm: LLM) -> None:
    ids = llm.tokenize("array")
    expected = llm.generate(ids, GREEDY)[0].token_ids
    assert llm.generate(np.array(ids), GREEDY)[0].token_ids == expected
    assert llm.generate([np.array(ids)], GREEDY)[0].token_ids == expected
    assert llm.score(np.array(ids)).tobytes() == llm.score(ids).tobytes()
    with pytest.raises(PromptError, match="empty"):
        llm.score(np.array([], int))


def test_a_dropped_llm_ends_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, _ = toy_model()
    monkeypatch.setattr(tokenmill.llm, "resolve", Path)
    monkeypatch.setattr(tokenmill.llm, "load_model", lambda config, path: loaded)
    llm = LLM("toy")
    llm.generate("hello", GREEDY)
    del llm
    gc.collect()
    with pytest.raises(EngineDeadError, match="closed"):
        loaded.engine.submit([])


# ---- a real model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(smollm2_path, max_model_len=512, cache_dir=tmp_path_factory.mktemp("cache")) as llm:
        yield llm


def test_the_real_model_knows_a_capital(real: LLM) -> None:
    assert "Paris" in real.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=8))[0].text


def test_the_real_model_gives_the_same_tokens_alone_together_and_from_the_cache(real: LLM) -> None:
    story = "Once upon a time, in a village by the sea, there lived a clockmaker who repaired only broken hours. " * 3
    prompts = [story + tail for tail in ("One day", "Nobody", "The sea")] + ["def fibonacci(n):"]
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=4, max_tokens=12, logprobs=3)
    alone = [real.generate(prompt, params)[0] for prompt in prompts]
    together = real.generate(prompts, params)
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs
    assert together[1].timings is not None
    assert together[1].timings.cached_tokens > 0
    assert real.score(prompts[0]).tobytes() == real.score(prompts[0]).tobytes()


def test_the_real_model_answers_in_the_form_that_is_asked_for(real: LLM) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer", "maximum": 9999999}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    asked = "The capital of France as JSON: "
    shapes = (
        StructuredOutputs(json=schema, disable_any_whitespace=True),
        StructuredOutputs(regex="Paris|London, [0-9]{4}"),
        StructuredOutputs(choice=["Berlin", "Paris"]),
    )
    params = [SamplingParams(temperature=0, max_tokens=60, structured_outputs=shape) for shape in shapes]
    answers = [output.text for output in real.generate([asked] * 3, params)]
    assert set(json.loads(answers[0])) == {"city", "people"}
    assert re.fullmatch("Paris|London, [0-9]{4}", answers[1])
    assert answers[2] == "Paris"


def test_the_real_models_best_beam_is_at_least_as_likely_as_its_greedy_answer(real: LLM) -> None:
    asked = "The capital of France is"
    (found,) = real.beam_search(asked, beam_width=4, max_tokens=12, length_penalty=0.0, ignore_eos=True)
    totals = [output.cumulative_logprob for output in found.outputs]
    greedy = real.generate(asked, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0))[0]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] >= greedy.outputs[0].cumulative_logprob
    assert len({output.text for output in found.outputs}) == 4


def test_the_real_model_does_without_bad_words(real: LLM) -> None:
    asked = "The capital of France is"
    params = SamplingParams(temperature=0, max_tokens=12, bad_words=["Paris"])
    assert "Paris" not in real.generate(asked, params)[0].text


def test_the_real_models_ledger_is_within_its_budget(real: LLM, smollm2_path: Path) -> None:
    assert real.memory.total <= real.memory.budget.limit
    assert real.memory.weights >= 50_000_000
    with pytest.raises(MemoryLimitError, match="raise memory"):
        LLM(smollm2_path, memory="60MB")


def test_what_was_planned_too_small_is_taken_from_the_kv_cache(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenmill.engine.assemble, "plan_buffers", lambda *_: SimpleNamespace(arena_bytes=0))
    with LLM(smollm2_path, memory="300MB", cache_dir=tmp_path) as llm:
        assert 250_000_000 < llm.memory.total <= 300_000_000
        assert len(llm.generate("Hi", SamplingParams(max_tokens=2))[0].token_ids) == 2


def test_leaving_in_the_middle_of_an_answer_is_quiet(smollm2_path: Path) -> None:
    script = (
        "import sys; from tokenmill import LLM, SamplingParams\n"
        "llm = LLM(sys.argv[1], max_model_len=512)\n"
        "stream = llm.stream('Once', SamplingParams(max_tokens=400, ignore_eos=True)); next(stream)"
    )
    left = subprocess.run(
        [sys.executable, "-c", script, str(smollm2_path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert (left.returncode, left.stdout, left.stderr) == (0, "", "")
