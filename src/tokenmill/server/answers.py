"""Parts that the bodies of several routes share: usage, log-probabilities, token texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenmill.engine.messages import TokenLogprobs
from tokenmill.server.generation import Generation
from tokenmill.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0
"""JSON has no infinity: what OpenAI's clients expect in its place."""


def usage(generation: Generation) -> dict[str, Any]:
    """Token counts of a request so far."""
    prompt, output = generation.prompt_tokens, generation.output_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": generation.record.cached_tokens},
    }


def token_text(tokenizer: Tokenizer, token_id: int, as_id: bool = False) -> str:
    """A token as log-probabilities show it; bytes that are no whole character as U+FFFD."""
    return f"token_id:{token_id}" if as_id else tokenizer.token_bytes(token_id).decode("utf-8", "replace")


def completion_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs | None],
    best: int,
    *,
    first_offset: int = 0,
    as_ids: bool = False,
) -> dict[str, Any]:
    """The ``logprobs`` of /v1/completions: lists over tokens. ``first_offset`` in characters of the text."""
    texts = [token_text(tokenizer, token_id, as_ids) for token_id in token_ids]
    offsets, offset = [], first_offset
    for token_id in token_ids:
        offsets.append(offset)
        offset += len(tokenizer.token_bytes(token_id).decode("utf-8", "replace"))
    tops: list[dict[str, float] | None] = []
    for token_id, entry in zip(token_ids, logprobs, strict=True):
        if entry is None or not best:
            tops.append(None)
            continue
        pairs = dict(reversed([(token_text(tokenizer, i, as_ids), number(p)) for i, p in entry.best[:best]]))
        top = dict(reversed(pairs.items()))  # of two tokens with one text the likelier one stays
        top.setdefault(token_text(tokenizer, token_id, as_ids), number(entry.logprob))
        tops.append(top)
    return {
        "text_offset": offsets,
        "token_logprobs": [None if entry is None else number(entry.logprob) for entry in logprobs],
        "tokens": texts,
        "top_logprobs": tops if best else None,
    }


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], best: int, as_ids: bool = False
) -> dict[str, Any]:
    """The ``logprobs`` of /v1/chat/completions: an entry per token."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": token_text(tokenizer, token_id, as_ids), "logprob": number(logprob), "bytes": list(data)}

    return {
        "content": [
            {**entry(token_id, each.logprob), "top_logprobs": [entry(i, p) for i, p in each.best[:best]]}
            for token_id, each in zip(token_ids, logprobs, strict=True)
        ],
        "refusal": None,
    }


def prompt_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], scores: Sequence[TokenLogprobs], best: int
) -> list[dict[str, Any] | None]:
    """vLLM's ``prompt_logprobs``: for each prompt token but the first, the likeliest tokens and itself, by id."""
    found: list[dict[str, Any] | None] = [None]
    for token_id, score in zip(token_ids[1:], scores, strict=True):
        entries = [(i, p, rank) for rank, (i, p) in enumerate(score.best[:best], start=1)]
        if all(i != token_id for i, _, _ in entries):
            entries.append((token_id, score.logprob, score.rank))
        found.append(
            {
                str(i): {"logprob": number(p), "rank": rank, "decoded_token": token_text(tokenizer, i)}
                for i, p, rank in entries
            }
        )
    return found


def number(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
