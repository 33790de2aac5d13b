"""``tokenmill eval``: what a model can do, and what an optimization costs, as numbers with intervals."""

from __future__ import annotations

import typer

from tokenmill.cli.eval.answers import humaneval, mcq, needle, tasks
from tokenmill.cli.eval.text import corpus, kl, perplexity

evaluate = typer.Typer(
    help="Measure quality: of a model, or of one against another on the same items.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
evaluate.command("perplexity")(perplexity)
evaluate.command("kl")(kl)
evaluate.command("humaneval")(humaneval)
evaluate.command("needle")(needle)
evaluate.command("mcq")(mcq)
evaluate.command("tasks")(tasks)
evaluate.command("corpus")(corpus)
