"""Sampling parameters, in vLLM's names, and their conversion for the native sampler."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from tokenmill import _native
from tokenmill.errors import UsageError
from tokenmill.structured import StructuredOutputs

MAX_BEST_LOGPROBS = 128
MAX_SAMPLES = 128
MAX_PRIORITY = 1000
MAX_BAD_WORDS = 1024


class SamplingError(UsageError):
    """A sampling parameter has a value that it cannot have. Names parameter, value and allowed range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to pick tokens. Raises :class:`SamplingError` on construction if a value is out of range.

    They act in this order: ``allowed_token_ids``, ``structured_outputs``, ``bad_words``, ``logit_bias``,
    ``min_tokens``, penalties, ``temperature``, ``min_p``, ``top_k``, ``top_p``, ``typical_p``. The same logits with the
    same ``seed`` give the same tokens on every processor, whatever else runs beside the request.
    """

    max_tokens: int | None = 16
    """Most tokens to generate; None: as many as the context holds."""
    min_tokens: int = 0
    """Tokens before which no end token and no stop string ends the output."""
    temperature: float = 1.0
    """0 is greedy (lowest id on ties), otherwise 0.001 to 1,000,000."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1 keeps all."""
    min_p: float = 0.0
    typical_p: float = 1.0
    """Locally typical sampling (Meister et al. 2022); 1 switches it off."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    """0.01 to 100 (logits divided by less may be infinite); 1 switches it off."""
    seed: int | None = None
    """None draws one for each request."""
    stop: str | Sequence[str] = ()
    """Strings that end the output and are cut from it."""
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    """Keeps the text of the stop string, or of the stop token, that ended the output."""
    skip_special_tokens: bool = True
    """Leaves special tokens out of the text."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: Sequence[str] = ()
    """Texts that the output must not get, as the tokenizer writes them at a text's beginning and after a space."""
    allowed_token_ids: Sequence[int] | None = None
    """If given, only these can be picked."""
    structured_outputs: StructuredOutputs | None = None
    """What the output must look like. It ends as soon as it can have no more."""
    logprobs: int | None = None
    """Log-probability of each generated token and of this many best ones, before penalties and temperature."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens from the second on."""
    n: int = 1
    """Outputs per prompt."""
    priority: int = 0
    """Smaller goes first, -1000 to 1000, where the engine's scheduling policy is "priority"."""
    cache_salt: str | None = None
    """Only requests of the same salt share cached prefixes: what is cached for one tenant tells another nothing."""

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _items("stop", self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", _items("stop_token_ids", self.stop_token_ids))
        object.__setattr__(self, "bad_words", _items("bad_words", self.bad_words))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", _items("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise SamplingError("allowed_token_ids is empty; name at least one token, or give None to allow all")
        if not isinstance(self.logit_bias, Mapping):
            raise SamplingError(f"logit_bias is {self.logit_bias!r}; it must map token ids to numbers")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        _check_whole("max_tokens", self.max_tokens, 1, None, optional=True)
        _check_whole("min_tokens", self.min_tokens, 0, None)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingError(f"min_tokens is {self.min_tokens}, more than max_tokens = {self.max_tokens}")
        _check_real("temperature", self.temperature, 0.0, 1e6)
        if 0.0 < self.temperature < 1e-3:
            raise SamplingError(f"temperature is {self.temperature}; it must be 0 (greedy) or at least 0.001")
        for name in ("top_p", "min_p", "typical_p"):
            _check_real(name, getattr(self, name), 0.0, 1.0)
        _check_whole("top_k", self.top_k, -1, None)
        _check_real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_real("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check_whole("seed", self.seed, 0, 2**64 - 1, optional=True)
        for text in stop:
            if not isinstance(text, str) or not text:
                raise SamplingError(f"stop holds {text!r}; every stop string must be a text of at least one character")
        for token in self.stop_token_ids:
            _check_whole("stop_token_ids", token, 0, None)
        for token, bias in self.logit_bias.items():
            _check_whole("logit_bias", token, 0, None)
            _check_real(f"logit_bias of token {token}", bias, -1e6, 1e6)
        for token in self.allowed_token_ids or ():
            _check_whole("allowed_token_ids", token, 0, None)
        for word in self.bad_words:
            if not isinstance(word, str) or not word.strip():
                raise SamplingError(f"bad_words holds {word!r}; every one must be a text that is not just spaces")
        if len(self.bad_words) > MAX_BAD_WORDS:
            raise SamplingError(f"bad_words holds {len(self.bad_words)} texts; at most {MAX_BAD_WORDS} are accepted")
        if self.structured_outputs is not None and not isinstance(self.structured_outputs, StructuredOutputs):
            raise SamplingError(
                f"structured_outputs is {self.structured_outputs!r}; it must be StructuredOutputs or None"
            )
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise SamplingError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        _check_whole("logprobs", self.logprobs, 0, MAX_BEST_LOGPROBS, optional=True)
        _check_whole("prompt_logprobs", self.prompt_logprobs, 0, MAX_BEST_LOGPROBS, optional=True)
        _check_whole("n", self.n, 1, MAX_SAMPLES)
        if self.cache_salt is not None and (not isinstance(self.cache_salt, str) or not self.cache_salt):
            raise SamplingError(
                f"cache_salt is {self.cache_salt!r}; it must be a text of at least one character or None"
            )
        _check_whole("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        return tuple(self.stop)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises :class:`SamplingError` if a token id lies outside of the vocabulary."""
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            for token in getattr(self, name) or ():
                if token >= vocab_size:
                    raise SamplingError(f"{name} names token {token}, outside of the vocabulary 0..{vocab_size - 1}")

    @classmethod
    def from_defaults(cls, defaults: Mapping[str, object], **overrides: object) -> SamplingParams:
        """Parameters from a model's generation defaults (``generation_config.json``), then ``overrides``.

        Only names of this class are taken; ``do_sample: false`` means temperature 0.
        """
        taken = {"temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty"}
        values: dict[str, object] = {k: v for k, v in defaults.items() if k in taken and v is not None}
        if defaults.get("do_sample") is False:
            values["temperature"] = 0.0
        known = {f.name for f in fields(cls)}
        for name in overrides:
            if name not in known:
                raise SamplingError(f"{name!r} is not a sampling parameter; known are {', '.join(sorted(known))}")
        return cls(**{**values, **overrides})  # type: ignore[arg-type]

    def with_seed(self, seed: int) -> SamplingParams:
        """These parameters with ``seed`` where they have none."""
        return self if self.seed is not None else replace(self, seed=seed)


def bad_word_ids(words: Iterable[str], encode: Callable[[str], list[int]]) -> tuple[tuple[int, ...], ...]:
    """The token sequences that spell ``words``, at the beginning of a text and, where a token holds the space before
    it, in the middle. ``encode`` adds no special tokens. A word can also be spelled by other tokens, which nothing
    hinders."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        plain = tuple(encode(word.lstrip()))
        spaced = tuple(encode(" " + word.lstrip()))
        found[plain] = None
        if len(spaced) == len(plain) and spaced[:1] != plain[:1]:
            found[spaced] = None
    return tuple(ids for ids in found if ids)


def takes_best(params: SamplingParams) -> bool:
    """Whether each token is that of the largest logit, of the row as the model gives it, and nothing else is told."""
    return (
        params.temperature == 0.0
        and params.repetition_penalty == 1.0
        and params.presence_penalty == params.frequency_penalty == 0.0
        and params.min_tokens == 0
        and params.allowed_token_ids is None
        and params.structured_outputs is None
        and params.logprobs is None
        and not params.logit_bias
        and not params.bad_words
    )


def sampler_settings(
    params: SamplingParams,
    *,
    sample_index: int,
    end_ids: Collection[int],
    bad_words: Iterable[Sequence[int]] = (),
) -> _native.SamplerSettings:
    """The native sampler's form of ``params`` for output ``sample_index``; ``params.seed`` must be set.

    ``bad_words`` are the token sequences of ``params.bad_words``.
    """
    if params.seed is None:
        raise ValueError("a request's seed must be chosen before its settings are made")
    return _native.SamplerSettings(
        temperature=params.temperature,
        top_k=max(params.top_k, 0) if params.top_k < 2**31 else 0,
        top_p=params.top_p,
        min_p=params.min_p,
        typical_p=params.typical_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=params.seed,
        sample_index=sample_index,
        min_tokens=min(params.min_tokens, 2**31 - 1),
        end_ids=sorted(end_ids),
        bias_ids=list(params.logit_bias),
        biases=list(params.logit_bias.values()),
        allowed=[] if params.allowed_token_ids is None else _bits(params.allowed_token_ids),
        bad_words=[list(word) for word in bad_words],
        logprobs=-1 if params.logprobs is None else params.logprobs,
    )


def _bits(ids: Sequence[int]) -> list[int]:
    """Words of 32 bits, of which those of ``ids`` are set."""
    words = [0] * (max(ids) // 32 + 1)
    for token in ids:
        words[token // 32] |= 1 << (token % 32)
    return words


def _items(name: str, value: object) -> tuple[Any, ...]:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise SamplingError(f"{name} is {value!r}; it must be a list")
    return tuple(value)


def _check_whole(name: str, value: object, low: int, high: int | None, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        limits = f"{low} to {high}" if high is not None else f"at least {low}"
        raise SamplingError(f"{name} is {value!r}; it must be a whole number, {limits}{' or None' if optional else ''}")


def _check_real(name: str, value: object, low: float, high: float) -> None:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")
    if not low <= number <= high:  # false for NaN
        raise SamplingError(f"{name} is {value!r}; it must be a number, {low:g} to {high:g}")
