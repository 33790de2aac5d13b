"""Tasks from a local JSONL file: questions that are answered with text, and multiple choice.

A line of a *text* task: ``{"prompt": ..., "expected": ...}`` and optionally ``id``, ``match`` (``exact``, ``contains``,
``regex`` or ``number``; default ``exact``), ``chat`` (true or false), ``max_tokens`` (default 64), ``stop``.
``expected`` may be a list: any of them will do.

A line of a *choice* task: ``{"question": ..., "choices": [...], "answer": INDEX}`` and optionally ``id``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmill.errors import TokenmillError
from tokenmill.evaluate.generation import Item, Judgement
from tokenmill.evaluate.result_log import ResultLog

if TYPE_CHECKING:
    from tokenmill.llm import LLM


class TaskFileError(TokenmillError):
    """A task file that cannot be read; names the line."""


class Match(Enum):
    EXACT = "exact"
    CONTAINS = "contains"
    REGEX = "regex"
    NUMBER = "number"
    """The last number of the answer."""


@dataclass(frozen=True, slots=True)
class TextTask:
    """One question with the answers that count."""

    item: Item
    expected: tuple[str, ...]
    match: Match


@dataclass(frozen=True, slots=True)
class Choice:
    """One multiple-choice question; ``answer`` is an index into ``choices``."""

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class ChoiceResult:
    """``picked`` is the choice with the highest log-likelihood, ``picked_by_length`` that per character (acc_norm)."""

    id: str
    question: str
    answer: int
    picked: int
    picked_by_length: int
    log_likelihoods: tuple[float, ...]

    @property
    def passed(self) -> bool:
        return self.picked == self.answer

    @property
    def passed_by_length(self) -> bool:
        return self.picked_by_length == self.answer


def read_text_tasks(path: Path) -> list[TextTask]:
    """Raises TaskFileError naming the first line that is no text task."""
    return _read(path, _text_task)


def read_choices(path: Path) -> list[Choice]:
    """Raises TaskFileError naming the first line that is no multiple-choice task."""
    return _read(path, _choice)


class Matcher:
    """Judges answers by each task's own rule."""

    def __init__(self, tasks: Sequence[TextTask]) -> None:
        self._tasks = {task.item.id: task for task in tasks}

    def __call__(self, item: Item, output: str) -> Judgement:
        """Judgement of one answer."""
        task = self._tasks[item.id]
        passed = any(_matches(task.match, expected, output) for expected in task.expected)
        return Judgement(passed, "" if passed else f"expected {' or '.join(task.expected)!r} ({task.match.value})")


def run_choices(
    llm: LLM, choices: Sequence[Choice], log: ResultLog, on_result: Callable[[ChoiceResult], None] = lambda _: None
) -> list[ChoiceResult]:
    """Log-likelihood of each choice after its question, those in ``log`` excepted. Raises as ``LLM.score`` does."""
    for choice in choices:
        if choice.id in log.done:
            continue
        scores = tuple(log_likelihood(llm, choice.question, f" {text}") for text in choice.choices)
        by_length = [score / len(text) for score, text in zip(scores, choice.choices, strict=True)]
        result = ChoiceResult(
            choice.id,
            choice.question,
            choice.answer,
            max(range(len(scores)), key=scores.__getitem__),
            max(range(len(scores)), key=by_length.__getitem__),
            scores,
        )
        log.add(choice.id, asdict(result))
        on_result(result)
    return [
        ChoiceResult(**{**log.done[c.id], "log_likelihoods": tuple(log.done[c.id]["log_likelihoods"])}) for c in choices
    ]


def log_likelihood(llm: LLM, context: str, continuation: str) -> float:
    """Sum of the continuation's token log-probabilities after the context, in nats.

    Both are tokenized together, as they would be read; tokens count from the first one that is not the context's own.
    """
    whole = llm.tokenize(context + continuation)
    before = llm.tokenize(context)
    shared = next(
        (i for i, (a, b) in enumerate(zip(whole, before, strict=False)) if a != b), min(len(whole), len(before))
    )
    first = max(shared, 1)
    return float(llm.score(whole)[first - 1 :].sum())


def _matches(match: Match, expected: str, output: str) -> bool:
    match match:
        case Match.EXACT:
            return output.strip() == expected.strip()
        case Match.CONTAINS:
            return expected in output
        case Match.REGEX:
            return re.search(expected, output) is not None
        case Match.NUMBER:
            numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", output)
            return bool(numbers) and float(numbers[-1].replace(",", "")) == float(expected)


def _read(path: Path, make: Callable[[dict[str, Any], str], Any]) -> list[Any]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise TaskFileError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TaskFileError(f"{path} is no UTF-8 text") from error
    tasks, seen = [], set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict):
                raise ValueError("it is no JSON object")
            item_id = str(fields.get("id", f"line-{number}"))
            if item_id in seen:
                raise ValueError(f"the id {item_id!r} was used before")
            seen.add(item_id)
            tasks.append(make(fields, item_id))
        except KeyError as error:
            raise TaskFileError(f"{path}, line {number}: {error.args[0]!r} is missing") from error
        except (ValueError, TypeError, re.error) as error:
            raise TaskFileError(f"{path}, line {number}: {error}") from error
    if not tasks:
        raise TaskFileError(f"{path} holds no task")
    return tasks


def _text_task(fields: dict[str, Any], item_id: str) -> TextTask:
    expected = fields["expected"]
    answers = tuple(str(each) for each in expected) if isinstance(expected, list) else (str(expected),)
    match = Match(fields.get("match", "exact"))
    for answer in answers:
        if match is Match.REGEX:
            re.compile(answer)
        elif match is Match.NUMBER:
            float(answer)
    stop = fields.get("stop", ())
    item = Item(
        item_id,
        str(fields["prompt"]),
        int(fields.get("max_tokens", 64)),
        (stop,) if isinstance(stop, str) else tuple(stop),
        bool(fields.get("chat", False)),
    )
    return TextTask(item, answers, match)


def _choice(fields: dict[str, Any], item_id: str) -> Choice:
    choices = tuple(str(each) for each in fields["choices"])
    answer = int(fields["answer"])
    if len(choices) < 2 or not all(choices):
        raise ValueError("choices must be at least two texts, none of them empty")
    if not 0 <= answer < len(choices):
        raise ValueError(f"answer is {answer}; it must be an index into the {len(choices)} choices")
    return Choice(item_id, str(fields["question"]), choices, answer)
