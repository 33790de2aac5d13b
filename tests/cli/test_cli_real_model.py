"""The command line with the real default model, as a user runs it."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "tokenmill"]


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], input=stdin, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def model(smollm2_path: Path) -> str:
    return str(smollm2_path)


def test_the_default_model_answers_a_question(model):
    result = run("generate", model, "What is gravity?", "--temperature", "0", "--max-tokens", "40")
    assert result.returncode == 0, result.stderr
    assert "mass" in result.stdout
    assert "tokens/s" in result.stderr


def test_the_same_seed_gives_the_same_text(model):
    arguments = ("generate", model, "Tell me a story.", "--seed", "7", "--temperature", "1", "--max-tokens", "12")
    first, second = run(*arguments), run(*arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout


def test_a_stop_text_ends_the_answer(model):
    result = run("generate", model, "1 2 3 4", "--raw", "--temperature", "0", "--max-tokens", "40", "--stop", " 8")
    assert result.returncode == 0, result.stderr
    assert " 7" in result.stdout
    assert "8" not in result.stdout


def test_a_prompt_longer_than_the_context_is_usage(model):
    result = run("generate", model, "word " * 200, "--max-model-len", "64")
    assert result.returncode == 2
    assert "context" in result.stderr
    assert result.stdout == ""


def test_too_little_memory_is_refused_before_loading(model):
    result = run("generate", model, "Hi", "--memory", "50MB")
    assert result.returncode == 1
    assert "50MB" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_readme_example_runs(model):
    example = re.search(r"```python\n(from tokenmill.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert example is not None
    code = example[1].replace('"smollm2-135m"', repr(model))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout


def test_ctrl_c_ends_generate_with_130(model):
    process = subprocess.Popen(
        [*COMMAND, "generate", model, "Write a very long story.", "--max-tokens", "2000", "--temperature", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.read(1)  # the answer has begun
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in messages
    assert "Traceback" not in messages


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, command: list[str]) -> None:
        self.seen = ""
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            os.execvp(command[0], command)

    def wait_for(self, pattern: str, seconds: float = 60) -> None:
        """Reads until ``pattern`` shows up in what was not yet waited for."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < deadline, f"{pattern!r} did not appear in {self.seen!r}"
            if select.select([self._fd], [], [], 0.1)[0]:
                self.seen += os.read(self._fd, 4096).decode(errors="replace")
        self.seen = self.seen[match.end() :]

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def exit_code(self) -> int:
        _, status = os.waitpid(self._pid, 0)
        os.close(self._fd)
        return os.waitstatus_to_exitcode(status)


def test_a_chat_in_a_terminal(model):
    terminal = Terminal([*COMMAND, "chat", model, "--temperature", "0", "--max-tokens", "2000"])
    terminal.wait_for(">>> ")
    terminal.type("Write a very long story about a lighthouse.\n")
    terminal.wait_for(r"\n\w+ \w+ \w+")  # the answer has begun
    terminal.type("\x03")
    terminal.wait_for(r"\[interrupted\]")
    terminal.wait_for(">>> ")
    terminal.type("/stats\n")
    terminal.wait_for(r"all 1 answers: \d+ tokens")
    terminal.wait_for(">>> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0
