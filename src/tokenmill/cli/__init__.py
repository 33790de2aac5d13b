"""The command line: ``tokenmill VERB ...``, one file per verb.

Standard output carries results only; progress, notes and errors go to standard error. Exit codes: 0 success, 1 failure,
2 usage, 130 interrupted. Errors are one message without a traceback; ``TOKENMILL_DEBUG=1`` shows the traceback.

The verbs import the engine when they run, so ``tokenmill --help`` does not wait for it.
"""

from __future__ import annotations

import io
import os
import sys

import typer

from tokenmill.cli.bench import bench
from tokenmill.cli.chat import chat
from tokenmill.cli.doctor import doctor
from tokenmill.cli.eval import evaluate
from tokenmill.cli.generate import generate
from tokenmill.cli.list import list_models
from tokenmill.cli.pull import pull_models
from tokenmill.cli.serve import serve
from tokenmill.cli.show import show
from tokenmill.cli.verbs import group
from tokenmill.errors import TokenmillError

app = group(
    "LLM inference on CPUs.",
    {
        "generate": generate,
        "chat": chat,
        "serve": serve,
        "pull": pull_models,
        "list": list_models,
        "show": show,
        "doctor": doctor,
    },
    name="tokenmill",
)
app.add_typer(bench, name="bench")
app.add_typer(evaluate, name="eval")


@app.callback(invoke_without_command=True)
def _version(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
) -> None:
    if version:
        from tokenmill import __version__

        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point of the ``tokenmill`` command."""
    _prepare_streams()
    try:
        app()
    except TokenmillError as error:
        if os.environ.get("TOKENMILL_DEBUG"):
            raise
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if os.environ.get("TOKENMILL_DEBUG"):
            raise
        # Files have errors of their own above; what is left is mostly standard output on a full disk.
        place = "" if error.filename is None else f" {error.filename}"
        _fail(f"reading or writing{place} failed: {error.strerror or error}", 1)
    except Exception as error:
        if os.environ.get("TOKENMILL_DEBUG"):
            raise
        kind = type(error).__name__
        _fail(f"{kind}: {error} (unexpected; TOKENMILL_DEBUG=1 shows where)" if str(error) else kind, 1)


def _prepare_streams() -> None:
    """Makes standard streams that are closed, or that cannot hold every character, usable."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  for the life of the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        _fail("standard output is closed", 1)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII locale shows what it cannot write


def _fail(message: str, exit_code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(exit_code)
