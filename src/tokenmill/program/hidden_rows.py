"""The hidden rows pass: the final norm of every token, not only of those whose logits are wanted.

Embeddings are made of these rows. The norm comes last in the program: a step that asks for logits ends before it, and
one that asks for hidden rows and samples nothing makes no logits on the way, since a Linear without rows reads nothing.
"""

from __future__ import annotations

from dataclasses import replace

from tokenmill.program.check import ProgramError, check
from tokenmill.program.ops import GatherSampled, RmsNorm, Value
from tokenmill.program.program import Program

HIDDEN_ROWS = "hidden.rows"
"""The value that the pass adds: ``[tokens, hidden]``."""


def with_hidden_rows(program: Program) -> Program:
    """``program``, as it was recorded, with the value ``HIDDEN_ROWS``. Raises ProgramError if it has no final norm."""
    gathered = {op.out: op.x for op in program.ops if isinstance(op, GatherSampled)}
    norms = [op for op in program.ops if isinstance(op, RmsNorm) and op.x in gathered]
    if len(norms) != 1:
        raise ProgramError(f"{len(norms)} norms read sampled rows; hidden rows need one, the final norm")
    (norm,) = norms
    x = gathered[norm.x]
    rows = replace(norm, x=x, out=Value(HIDDEN_ROWS, x.rows, x.width))
    found = program.with_ops([*program.ops, rows])
    check(found)
    return found
