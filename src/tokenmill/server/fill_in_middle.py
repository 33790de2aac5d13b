"""Fill in the middle: what stands between a prefix and a suffix, for models that were trained on it.

Such models have three control tokens (Bavarian et al. 2022, "Efficient training of language models to fill in the
middle", the PSM order): prefix marker, prefix, suffix marker, suffix, middle marker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenmill.server.errors import ApiError
from tokenmill.server.served import ServedModel
from tokenmill.tokenizer import Tokenizer

_SPELLINGS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)


@dataclass(frozen=True, slots=True)
class MiddleTokens:
    """Ids of the control tokens before prefix, suffix and middle."""

    prefix: int
    suffix: int
    middle: int


def middle_tokens(tokenizer: Tokenizer) -> MiddleTokens | None:
    """The model's tokens; None if it has none."""
    for spelling in _SPELLINGS:
        found = [tokenizer.encode(text, add_special=False) for text in spelling]
        if all(len(ids) == 1 for ids in found):
            return MiddleTokens(*(ids[0] for ids in found))
    return None


async def fill_in_middle(
    served: ServedModel, prefix: str, suffix: str, param: str, before: Sequence[int] = ()
) -> list[int]:
    """Token ids of a prompt that asks for the text between ``prefix`` and ``suffix``, after the ids ``before``.

    Control tokens that are spelled out in either text stay text. Raises ApiError if the model was not trained on it.
    """
    tokens = middle_tokens(served.tokenizer)
    if tokens is None:
        why = f"{param}: {served.name} has no fill-in-the-middle tokens"
        raise ApiError(why, param=param, code="unsupported_model")
    ids = [*before, tokens.prefix]
    ids += await served.encode(prefix, add_special=False, parse_special=False)
    ids.append(tokens.suffix)
    ids += await served.encode(suffix, add_special=False, parse_special=False)
    ids.append(tokens.middle)
    return ids
