"""``tokenmill eval``: what a model can do, and what an optimization costs, as numbers with intervals."""

from __future__ import annotations

from tokenmill.cli.eval.answers import humaneval, mcq, needle, tasks
from tokenmill.cli.eval.text import corpus, kl, perplexity
from tokenmill.cli.verbs import group

evaluate = group(
    "Measure quality: of a model, or of one against another on the same items.",
    {
        "perplexity": perplexity,
        "kl": kl,
        "humaneval": humaneval,
        "needle": needle,
        "mcq": mcq,
        "tasks": tasks,
        "corpus": corpus,
    },
)
