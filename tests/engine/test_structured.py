"""Outputs that follow a schema, an expression or a grammar, beside neighbours that do not."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import Future

import pytest
from test_core import CONTEXT, FULL, outputs, request, run
from toy_backend import ToyBackend, expected_greedy

from tokenmill.backends.backend import StepLimits
from tokenmill.engine.core import EngineCore
from tokenmill.engine.grammar import Grammar, Grammars
from tokenmill.engine.messages import AbortRequest, Event, Failed, FailureKind, Finished, FinishReason
from tokenmill.engine.scheduler import MAX_SCORED_ROWS, SchedulerLimits
from tokenmill.sampling import SamplingParams
from tokenmill.structured import StructuredOutputs, StructuredOutputsError

VOCABULARY = 101
END = 100


class AsciiTexts:
    """Tokens 1 to 95 are the printable characters, 0 begins a text and 100 ends it; the rest pads."""

    vocab_size = VOCABULARY
    bos_id = 0
    eos_ids = frozenset({END})
    special_ids = frozenset({0, END})

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id + 31]) if 1 <= token_id <= 95 else b"<special>" if token_id in (0, END) else b""

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return [ord(c) - 31 for c in text]


def text_of(tokens: list[int]) -> str:
    return b"".join(AsciiTexts().token_bytes(token) for token in tokens if token != END).decode()


def make_core(pages: int = 200, tokens: int = 64, sequences: int = 8) -> EngineCore:
    rows = max(sequences, MAX_SCORED_ROWS)
    backend = ToyBackend((FULL,), [pages], StepLimits(tokens, sequences, rows, CONTEXT), VOCABULARY)
    return EngineCore(
        backend,
        vocab_size=VOCABULARY,
        kv_pages=[pages],
        limits=SchedulerLimits(tokens, sequences, rows, CONTEXT),
        grammars=Grammars(AsciiTexts(), VOCABULARY),
    )


def run_all(core: EngineCore, *messages: object) -> list[Event]:
    """Like :func:`test_core.run`, but a step may have nothing to do while a grammar is compiled."""
    events = [event for message in messages for event in core.handle(message)]  # type: ignore[arg-type]
    deadline = time.monotonic() + 60
    while core.busy:
        events += core.step()
        core.cache.check()
        assert time.monotonic() < deadline
    assert all(usage.used == 0 for usage in core.usage())
    return events


def sampled(seed: int = 1, tokens: int = 200, **structured: object) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, seed=seed, structured_outputs=StructuredOutputs(**structured))  # type: ignore[arg-type]


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_a_schema_gives_json_that_fits_it(seed: int, compact: bool) -> None:
    params = sampled(seed, json=PERSON, disable_any_whitespace=compact)
    events = run_all(make_core(), request(0, [1, 2, 3], params, eos_ids=frozenset({END})))
    text = text_of(outputs(events)[0, 0])
    value = json.loads(text)
    assert (text == json.dumps(value, separators=(",", ":"), ensure_ascii=False)) == compact
    assert set(value) == {"name", "age"}
    assert isinstance(value["name"], str)
    assert 0 <= value["age"] <= 99
    assert [e.reason for e in events if isinstance(e, Finished)] == [FinishReason.STOP]


def test_white_space_in_json_has_an_end() -> None:
    """A model that wants nothing but blanks gets one where JSON allows any."""
    wanted = StructuredOutputs(json={**PERSON, "properties": {"a": {"enum": [1]}}, "required": ["a"]})
    params = SamplingParams(temperature=0, max_tokens=50, seed=0, logit_bias={1: 100.0}, structured_outputs=wanted)
    events = run_all(make_core(), request(0, [5], params, eos_ids=frozenset({END})))
    assert text_of(outputs(events)[0, 0]) == '{ "a" : 1 }'


@pytest.mark.parametrize(
    ("structured", "expression"),
    [
        ({"regex": "[a-f]{3}-[0-9]{2,4}"}, r"[a-f]{3}-[0-9]{2,4}"),
        ({"choice": ["yes", "no", 'may"be\\']}, r'yes|no|may"be\\'),
        ({"grammar": 'start: "<" word ("," word)~2 ">"\nword: /[xyz]{2}/'}, r"<[xyz]{2}(,[xyz]{2}){2}>"),
    ],
    ids=["regex", "choice", "grammar"],
)
def test_what_comes_matches(structured: dict[str, object], expression: str) -> None:
    for seed in range(6):
        params = sampled(seed, **structured)
        events = run_all(make_core(), request(0, [seed], params, eos_ids=frozenset({END})))
        assert re.fullmatch(expression, text_of(outputs(events)[0, 0]))


def test_any_json_object() -> None:
    params = SamplingParams(
        temperature=0, max_tokens=250, seed=0, structured_outputs=StructuredOutputs(json_object=True)
    )
    found = outputs(run_all(make_core(), request(0, [3], params, eos_ids=frozenset({END}))))[0, 0]
    assert text_of(found).lstrip().startswith("{")


def test_an_output_ends_as_soon_as_it_is_complete() -> None:
    """No step is spent on an end token that alone is possible."""
    events = run_all(make_core(), request(0, [1], sampled(regex="[0-9]{5}"), eos_ids=frozenset({END})))
    assert len(outputs(events)[0, 0]) == 5
    assert [(e.reason, e.stop_token) for e in events if isinstance(e, Finished)] == [(FinishReason.STOP, None)]


def test_where_more_could_come_the_end_token_is_the_models_choice() -> None:
    ends = set()
    for seed in range(40):
        events = run_all(make_core(), request(0, [1], sampled(seed, regex="[0-9]{1,4}"), eos_ids=frozenset({END})))
        tokens = outputs(events)[0, 0]
        assert re.fullmatch("[0-9]{1,4}", text_of(tokens))
        ends.add(tokens[-1] == END)
    assert ends == {True, False}


def test_outputs_do_not_depend_on_neighbours_chunks_or_preemption() -> None:
    messages = [
        request(0, [1] * 60, sampled(0, regex="([a-z]{5} ){20}"), eos_ids=frozenset({END})),
        request(1, [2] * 40, SamplingParams(max_tokens=80, seed=1)),
        request(
            2,
            [1] * 50,
            SamplingParams(max_tokens=90, seed=2, n=3, structured_outputs=StructuredOutputs(regex="[ab]{90}")),
        ),
        request(3, [4] * 70, SamplingParams(max_tokens=80, seed=3, allowed_token_ids=range(5, 15))),
        request(4, [5] * 30, sampled(4, json=PERSON), eos_ids=frozenset({END})),
    ]
    alone = {}
    for message in messages:
        alone.update(outputs(run_all(make_core(), message)))
    core = make_core(pages=11, tokens=23, sequences=6)
    assert outputs(run_all(core, *messages)) == alone
    assert core.statistics.preemptions > 0
    assert len({tuple(alone[2, index]) for index in range(3)}) == 3


def failures(events: list[Event]) -> list[Failed]:
    return [e for e in events if isinstance(e, Failed)]


@pytest.mark.parametrize(
    ("structured", "message"),
    [
        ({"regex": "(["}, "invalid regex"),
        ({"grammar": "start: nowhere"}, "unknown name"),
        ({"json": {"type": "nonsense"}}, "nonsense"),
        ({"json": {"type": "string", "not": {"const": "a"}}}, "Unimplemented keys"),
    ],
)
def test_what_cannot_be_compiled_is_an_error_of_its_request(structured: dict[str, object], message: str) -> None:
    events = run_all(make_core(), request(0, [1], sampled(**structured)), request(1, [1, 2]))
    (failed,) = failures(events)
    assert (failed.request_id, failed.kind) == (0, FailureKind.REQUEST)
    assert message in failed.error
    assert outputs(events) == {(1, 0): expected_greedy([1, 2], 12, (FULL,))}


def _nested(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


HOSTILE = {
    "counted": {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    "determinization": {"regex": "(.*a){40}b|(x|y)*x(x|y){25}"},
    "parentheses": {"regex": "(" * 20000 + "a" + ")" * 20000},
    "deep schema": {"json": json.dumps(_nested(120))},
    "wide schema": {
        "json": {
            "type": "object",
            "properties": {f"k{i}": {"type": "string", "pattern": f"[a-z]{{{i % 50 + 1}}}"} for i in range(500)},
        }
    },
    "product": {
        "json": {
            "allOf": [{"anyOf": [{"type": "string", "pattern": f"x{i}{j}.*"} for i in range(20)]} for j in range(6)]
        }
    },
    "doubling references": {
        "json": {
            "$ref": "#/$defs/a0",
            "$defs": {
                f"a{i}": {"properties": {side: {"$ref": f"#/$defs/a{(i + 1) % 40}"} for side in "lr"}}
                for i in range(40)
            },
        }
    },
    "ambiguity": {"grammar": 'start: start start | "a" | b\nb: "a"* | b b'},
    "empty loops": {"grammar": 'start: (x*)*\nx: ("" | "a"*)*'},
    "large": {"json": {"type": "array", "items": {"type": "string", "minLength": 10**6}, "minItems": 10**6}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_bounded_and_harms_no_neighbour(name: str) -> None:
    neighbours = [request(i, [i] * 30) for i in (1, 2)]
    begin = time.process_time()
    events = run_all(
        make_core(), request(0, [1], sampled(tokens=30, **HOSTILE[name]), eos_ids=frozenset({END})), *neighbours
    )
    assert time.process_time() - begin < 20
    for number in (1, 2):
        assert outputs(events)[number, 0] == expected_greedy([number] * 30, 12, (FULL,))


class SlowGrammars(Grammars):
    """Compiles when told to."""

    def __init__(self) -> None:
        super().__init__(AsciiTexts(), VOCABULARY)
        self.future: Future[Grammar] = Future()

    def compile(self, wanted: StructuredOutputs) -> Future[Grammar]:
        self.real = super().compile(wanted)
        return self.future


def slow_core() -> tuple[EngineCore, SlowGrammars]:
    core, grammars = make_core(), SlowGrammars()
    core._grammars = grammars
    return core, grammars


def test_while_a_grammar_is_compiled_the_prompt_is_computed_and_neighbours_go_on() -> None:
    core, grammars = slow_core()
    core.handle(request(0, [3] * 40, sampled(regex="[0-9]{3}"), eos_ids=frozenset({END})))
    core.handle(request(1, [1, 2]))
    events: list[Event] = []
    for _ in range(15):
        events += core.step()
    assert outputs(events) == {(1, 0): expected_greedy([1, 2], 12, (FULL,))}
    assert [s.computed for s in core.scheduler.running] == [39]
    grammars.future.set_result(grammars.real.result())
    assert re.fullmatch("[0-9]{3}", text_of(outputs(run_all(core))[0, 0]))


def test_a_request_can_be_cancelled_while_its_grammar_is_compiled() -> None:
    core, grammars = slow_core()
    core.handle(request(0, [3] * 40, sampled(regex="[0-9]{3}")))
    core.step()
    (end,) = core.handle(AbortRequest(0))
    assert isinstance(end, Finished)
    assert not core.busy
    assert grammars.future.cancelled()


def test_waiting_for_a_grammar_alone_does_not_spin() -> None:
    core, _ = slow_core()
    core.handle(request(0, [3], sampled(regex="[0-9]{3}")))
    begin, steps = time.monotonic(), 0
    while time.monotonic() - begin < 0.2:
        core.step()
        steps += 1
    assert steps <= 25


def test_without_a_tokenizer_structured_outputs_are_refused_by_name() -> None:
    core = make_core()
    core._grammars = None
    (failed,) = core.handle(request(0, [3], sampled(regex="[0-9]{3}")))
    assert isinstance(failed, Failed)
    assert "structured_outputs" in failed.error


def test_what_excludes_all_tokens_of_a_grammar_fails_that_request() -> None:
    params = SamplingParams(
        seed=0, allowed_token_ids=[ord("a") - 31], structured_outputs=StructuredOutputs(regex="[0-9]+")
    )
    events = run_all(make_core(), request(0, [3], params), request(1, [1, 2]))
    assert "leaves no token to pick" in failures(events)[0].error
    assert len(outputs(events)[1, 0]) == 12


def test_bad_words_and_allowed_tokens_hold_in_the_engine() -> None:
    plain = outputs(run(make_core(), [request(0, [1, 2])]))[0, 0]
    first, second = plain[0], plain[1]
    found = outputs(
        run(
            make_core(),
            [
                request(0, [1, 2], bad_words=((first, second),)),
                request(1, [1, 2], bad_words=((first,),)),
                request(2, [1, 2], SamplingParams(seed=5, max_tokens=40, allowed_token_ids=[3, 64, 95])),
            ],
        )
    )
    assert found[0, 0][0] == first
    assert found[0, 0][1] != second
    assert first not in found[1, 0]
    assert set(found[2, 0]) == {3, 64, 95}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one"),
        ({"regex": "a", "choice": ["b"]}, "regex and choice"),
        ({"regex": ""}, "regex"),
        ({"choice": []}, "choice"),
        ({"choice": "abc"}, "choice"),
        ({"json": "{"}, "no JSON"),
        ({"json": "[1]"}, "an object or a bool"),
        ({"json": {"a": object()}}, "cannot be written"),
        ({"grammar": "x" * 300_000}, "at most 262144"),
        ({"json_object": "yes"}, "json_object"),
    ],
)
def test_bad_descriptions_are_refused_by_name(fields: dict[str, object], message: str) -> None:
    with pytest.raises(StructuredOutputsError, match=message):
        StructuredOutputs(**fields)  # type: ignore[arg-type]
