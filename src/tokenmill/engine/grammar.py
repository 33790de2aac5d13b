"""Which tokens may come next where an output must follow a grammar, by llguidance.

A grammar is compiled in a thread of its own while the request's prompt is computed, and its masks are computed in
another one beside the forward pass; llguidance gives the interpreter free meanwhile. Compiling, every mask and the
states they keep have fixed limits there, so that a hostile grammar ends with an error of its request.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tokenmill.program.step import Int32
from tokenmill.structured import StructuredOutputs

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_MAX_LEXER_STATES = 50_000
"""Of one or two kilobytes each."""
_WHITE_SPACE = r" |\n {0,16}"
"""What may stand between two tokens of JSON: as models write it, but not without end, as small ones do that have
nothing more to say. docs/serving.md has what forbidding it costs."""
_TOKENS_AT_ONCE = 512
"""Tokens read from the vocabulary before other threads get their turn."""


class TokenTexts(Protocol):
    """What a grammar has to know of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_ids(self) -> frozenset[int]: ...

    @property
    def special_ids(self) -> frozenset[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def encode(self, text: str, add_special: bool = True) -> list[int]: ...


class GrammarError(Exception):
    """A grammar that cannot be compiled or has grown beyond its limits; the message says why."""


class Grammar:
    """One output's place in its grammar. ``mask``: the tokens that may come next, one bit each."""

    def __init__(self, matcher: LLMatcher, words: int) -> None:
        self._matcher = matcher
        self.mask: Int32 = np.full(words, -1, dtype=np.int32)
        self._fresh = False

    def fork(self) -> Grammar:
        """Another output at the same place."""
        twin = Grammar(self._matcher.deep_copy(), len(self.mask))
        twin.mask[:] = self.mask
        twin._fresh = self._fresh
        return twin

    def update_mask(self) -> None:
        """Computes ``mask``, unless it is known. Raises GrammarError."""
        if not self._fresh:
            self._matcher.unsafe_compute_mask_ptr(self.mask.ctypes.data, self.mask.nbytes)
            self._check()
            self._fresh = True

    def advance(self, token: int) -> bool:
        """The output goes on with ``token``. True if it is complete then. Raises GrammarError."""
        self._fresh = False
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(self._matcher.get_error())


class Grammars:
    """Compiles grammars for one model, and computes masks, in two threads that exist while they are needed."""

    def __init__(self, tokenizer: TokenTexts, vocab_size: int) -> None:
        """``vocab_size``: columns of the logits; those beyond the tokenizer's are never allowed."""
        self._texts = tokenizer
        self._vocab_size = vocab_size
        self._tokenizer: LLTokenizer | None = None
        self._compiler = ThreadPoolExecutor(1, "tokenmill-grammar")
        self._masker = ThreadPoolExecutor(1, "tokenmill-masks")

    def compile(self, wanted: StructuredOutputs) -> Future[Grammar]:
        """Starts compiling; the result raises GrammarError if that fails."""
        return self._compiler.submit(self._compile, wanted)

    def start_masks(self, grammars: Iterable[Grammar]) -> Future[dict[Grammar, GrammarError]]:
        """Starts computing masks; the result says which could not be."""
        return self._masker.submit(_update_masks, list(grammars))

    def close(self) -> None:
        """Ends the threads after what they are doing."""
        self._compiler.shutdown(wait=False, cancel_futures=True)
        self._masker.shutdown(wait=False, cancel_futures=True)

    def _compile(self, wanted: StructuredOutputs) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        if self._tokenizer is None:
            self._tokenizer = self._make_tokenizer()
        limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
        try:
            matcher = LLMatcher(self._tokenizer, _llguidance_grammar(wanted), log_level=0, limits=limits)
        except ValueError as error:
            raise GrammarError(str(error)) from error
        if matcher.is_error():
            raise GrammarError(matcher.get_error())
        return Grammar(matcher, -(-self._vocab_size // 32))

    def _make_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        texts = self._texts
        if not texts.eos_ids:
            raise GrammarError("the model has no end token, so that no grammar can end its output")
        tokens: list[bytes] = []
        for token in range(self._vocab_size):
            if token % _TOKENS_AT_ONCE == 0:
                time.sleep(0)
            data = texts.token_bytes(token) if token < texts.vocab_size else b""
            # 0xff marks what no text of the output can spell.
            tokens.append(b"\xff" + data if token in texts.special_ids or token in texts.eos_ids else data)
        eos_ids = sorted(texts.eos_ids)
        wrapper = TokenizerWrapper(_Vocabulary(texts, tokens, eos_ids[0]))
        return LLTokenizer(wrapper, n_vocab=self._vocab_size, eos_token=eos_ids)


class _Vocabulary:
    """The form in which llguidance takes a tokenizer."""

    def __init__(self, texts: TokenTexts, tokens: list[bytes], eos_id: int) -> None:
        self._texts = texts
        self.tokens = tokens
        self.eos_token_id = eos_id
        self.bos_token_id = texts.bos_id
        self.special_token_ids = sorted(texts.special_ids)

    def __call__(self, text: bytes | str) -> list[int]:
        plain = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return self._texts.encode(plain, add_special=False)


def wait_for_any(compiling: Iterable[Future[Grammar]], seconds: float) -> None:
    """Returns when one is compiled, or after ``seconds``."""
    wait(compiling, timeout=seconds, return_when="FIRST_COMPLETED")


def compiled(future: Future[Grammar]) -> Grammar:
    """The result of a compilation that is done. Raises GrammarError, whatever went wrong."""
    try:
        return future.result(timeout=0)
    except GrammarError:
        raise
    except Exception as error:
        raise GrammarError(f"{type(error).__name__}: {error}") from error


def _update_masks(grammars: list[Grammar]) -> dict[Grammar, GrammarError]:
    errors: dict[Grammar, GrammarError] = {}
    for grammar in grammars:
        try:
            grammar.update_mask()
        except GrammarError as error:
            errors[grammar] = error
    return errors


def _llguidance_grammar(wanted: StructuredOutputs) -> str:
    from llguidance import LLMatcher

    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    if wanted.grammar is not None:
        return LLMatcher.grammar_from_lark(wanted.grammar)
    if wanted.choice is not None:
        # Lark's string literals are JSON's.
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in wanted.choice))
    white_space = None if wanted.disable_any_whitespace else _WHITE_SPACE
    return LLMatcher.grammar_from_json_schema(
        wanted.source, overrides={"whitespace_flexible": white_space is not None, "whitespace_pattern": white_space}
    )
