"""``tokenmill chat [MODEL]``: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from tokenmill.cli import options
from tokenmill.cli.answer import Answer, open_model, stream_answer
from tokenmill.cli.conversation import Conversation
from tokenmill.cli.terminal import say
from tokenmill.errors import TokenmillError, UsageError

if TYPE_CHECKING:
    from tokenmill.llm import LLM
    from tokenmill.sampling import SamplingParams

_QUOTES = '"""'

_HELP = """\
  /help               this list
  /reset              forget the conversation; the system message stays
  /system [TEXT]      show the system message, or set it (from the next answer on)
  /regenerate         answer the last message again
  /save FILE          write the conversation as JSON
  /load FILE          go on with a saved conversation
  /stats              tokens and times of the last answer and of all
  /quit               leave; so does Ctrl-D
Several lines: end a line with \\, or put them between lines of \"\"\".
Ctrl-C stops an answer."""


def chat(
    model: Annotated[str | None, typer.Argument(help="Name, file, folder or org/name. Default: smollm2-135m.")] = None,
    *,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    max_tokens: options.MaxTokens = 1024,
    sampling: options.SamplingOptions,
    loading: options.LoadOptions,
) -> None:
    """Chat with a model. /help lists what else can be typed."""
    from tokenmill.sources import DEFAULT_MODEL

    model = model or DEFAULT_MODEL
    overrides = sampling.overrides(max_tokens=max_tokens)
    with open_model(model, loading) as llm:
        if llm.tokenizer.chat_template is None:
            raise UsageError(f"{model} has no chat template; use: tokenmill generate {model} PROMPT")
        params = llm.default_params(**overrides)
        Chat(llm, params, Conversation(system)).run()


class Chat:
    """The loop: read a message or a command, act, repeat."""

    def __init__(self, llm: LLM, params: SamplingParams, conversation: Conversation) -> None:
        self.conversation = conversation
        self._llm = llm
        self._params = params
        self._answers: list[Answer] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: say(_HELP),
            "reset": self._reset,
            "system": self._system,
            "regenerate": self._regenerate,
            "save": self._save,
            "load": self._load,
            "stats": self._stats,
        }

    def run(self) -> None:
        """Until /quit or the end of the input."""
        say("/help lists the commands, Ctrl-D leaves.")
        for entry in read_entries():
            if entry.split()[0] in ("/quit", "/exit"):
                return
            try:
                if entry.startswith("/"):
                    self._command(entry)
                else:
                    self._message(entry)
            except TokenmillError as error:
                say(f"error: {error}")

    def _message(self, text: str) -> None:
        self.conversation.say(text)
        try:
            self._answer()
        except TokenmillError:
            self.conversation.messages.pop()  # the next message must not meet the one that failed
            raise

    def _command(self, entry: str) -> None:
        name, _, argument = entry[1:].partition(" ")
        if command := self._commands.get(name):
            command(argument.strip())
        else:
            say(f"unknown command /{name}; /help lists them")

    def _answer(self) -> None:
        """Answers the last message."""
        prompt = self._llm.tokenizer.encode_chat(self.conversation.prompt())
        answer = stream_answer(self._llm, prompt, self._params)
        print(flush=True)
        self.conversation.answered(answer.text)
        self._answers.append(answer)
        if answer.finish_reason in ("length", "interrupted"):
            say("[interrupted]" if answer.finish_reason == "interrupted" else "[cut at --max-tokens]")

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        say("forgotten")

    def _system(self, text: str) -> None:
        if text:
            self.conversation.system = text
        say(f"system message: {self.conversation.system or '(none)'}")

    def _regenerate(self, _: str) -> None:
        if self.conversation.take_back_answer():
            self._answer()
        else:
            say("there is nothing to answer yet")

    def _save(self, file: str) -> None:
        if not file:
            raise UsageError("/save needs a file name")
        say(f"saved to {self.conversation.save(file)}")

    def _load(self, file: str) -> None:
        if not file:
            raise UsageError("/load needs a file name")
        self.conversation = Conversation.load(file)
        say(f"loaded {len(self.conversation.messages)} messages")

    def _stats(self, _: str) -> None:
        if not self._answers:
            say("no answers yet")
            return
        say(f"last: {self._answers[-1].summary()}")
        tokens, seconds = sum(a.tokens for a in self._answers), sum(a.total for a in self._answers)
        say(f"all {len(self._answers)} answers: {tokens} tokens in {seconds:.2f} s")


def read_entries() -> Iterator[str]:
    """Messages and commands from standard input, several lines joined, until its end.

    A line that ends in a backslash goes on in the next; lines between two lines of three double quotes belong together.
    Ctrl-C drops what was typed so far. Empty messages are skipped.
    """
    if sys.stdin.isatty():
        import readline  # noqa: F401  line editing and history for input()
    lines: list[str] = []
    quoted = False
    while True:
        try:
            line = _read_line("... " if lines or quoted else ">>> ")
        except EOFError:
            if sys.stdin.isatty():
                say("")
            break
        except KeyboardInterrupt:
            say("\n(Ctrl-D leaves)" if not (lines or quoted) else "\n(dropped)")
            lines, quoted = [], False
            continue
        if line.strip() == _QUOTES:
            quoted = not quoted
            if quoted:
                continue
        elif quoted:
            lines.append(line)
            continue
        elif line.endswith("\\"):
            lines.append(line[:-1])
            continue
        else:
            lines.append(line)
        entry, lines = "\n".join(lines).strip(), []
        if entry:
            yield entry
    if entry := "\n".join(lines).strip():
        yield entry


def _read_line(prompt: str) -> str:
    """A line without its end. The prompt is shown only to a person, and never among answers that go to a file."""
    if not sys.stdin.isatty():
        return input()
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()
