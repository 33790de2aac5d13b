"""What all requests that generate have in common: OpenAI's sampling parameters and vLLM's additional ones.

Bodies are strict: a wrong type, an unknown name, or a known parameter that this server cannot honour is a 400 that
names it. A parameter given as null counts as not given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from tokenmill.engine.messages import MAX_BEAM_WIDTH, BeamSearch
from tokenmill.sampling import SamplingParams
from tokenmill.server.errors import ApiError, unsupported
from tokenmill.server.structure import from_fields, from_format
from tokenmill.structured import StructuredOutputs

if TYPE_CHECKING:
    from tokenmill.program.step import Int32
    from tokenmill.server.generation import Generation
    from tokenmill.server.request_log import RequestRecord
    from tokenmill.server.served import ServedModel

MAX_STOP_STRINGS = 64
MAX_STOP_CHARACTERS = 1024
MAX_TOKEN_LIST = 1024
"""Entries of logit_bias, stop_token_ids and their like."""
MAX_LOGPROBS = 20
MAX_PROMPTS = 2048


def _stop_strings(value: object) -> object:
    items = [value] if isinstance(value, str) else value
    if items is None:
        return None
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError("must be a string or a list of strings")
    if len(items) > MAX_STOP_STRINGS or any(len(item) > MAX_STOP_CHARACTERS for item in items):
        raise ValueError(f"takes at most {MAX_STOP_STRINGS} strings of at most {MAX_STOP_CHARACTERS} characters")
    return [item for item in items if item] or None  # an empty string stops nothing


def _logit_bias(value: object) -> object:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("must map token ids to numbers")
    if len(value) > MAX_TOKEN_LIST:
        raise ValueError(f"has {len(value)} entries; at most {MAX_TOKEN_LIST} are taken")
    found = {}
    for token, bias in value.items():
        if not (isinstance(token, str) and token.isdecimal() and token.isascii() and len(token) <= 10):
            raise ValueError(f"has the key {token!r:.40}; keys are token ids")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"of token {token} must be a number, -100 to 100")
        found[int(token)] = float(bias)
    return found


def _any_seed(value: int) -> int:
    if not -(2**63) <= value < 2**64:
        raise ValueError("must fit into 64 bits")
    return value % 2**64


def _prompts(value: object) -> object:
    """A list of prompts, each a text or a list of token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError("must be a string, a list of token ids, or a list of either")
    if not value:
        raise ValueError("is an empty list; give at least one prompt")
    if _are_ids(value):
        return [value]
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"has {len(value)} prompts; at most {MAX_PROMPTS} are taken")
    if not all(isinstance(item, str) or (isinstance(item, list) and _are_ids(item)) for item in value):
        raise ValueError("must be a string, a list of token ids, or a list of either")
    return value


def _are_ids(value: list[object]) -> bool:
    return all(isinstance(item, int) and not isinstance(item, bool) and -(2**31) <= item < 2**31 for item in value)


def name_of(param: str, prompts: list[str | list[int]], number: int) -> str:
    """What errors call prompt ``number`` of ``param``."""
    return param if len(prompts) == 1 else f"{param}[{number}]"


_OnePrompt = str | list[int]
Prompts = Annotated[
    list[_OnePrompt], BeforeValidator(_prompts, json_schema_input_type=_OnePrompt | list[str] | list[list[int]])
]
Truncation = Annotated[int, Field(ge=-1)]
"""How many of a prompt's last tokens are kept; -1: as many as the context takes."""
StopStrings = Annotated[list[str], BeforeValidator(_stop_strings)]
LogitBias = Annotated[dict[int, float], BeforeValidator(_logit_bias)]
Seed = Annotated[int, AfterValidator(_any_seed)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=MAX_TOKEN_LIST)]
Name = Annotated[str, Field(max_length=1024)]
RequestId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/+=-]{1,128}$")]


_DEFAULTS = SamplingParams()


class StrictBody(BaseModel):
    """A body without unknown names and without silent conversions."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(StrictBody):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class SamplingBody(StrictBody):
    """Parameters that become SamplingParams, and those that are known and refused."""

    model: Name | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: Seed | None = None
    stop: StopStrings | None = None
    logit_bias: LogitBias | None = None
    user: Name | None = None

    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    bad_words: Annotated[list[Name], Field(max_length=MAX_TOKEN_LIST)] | None = None
    allowed_token_ids: TokenIds | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    truncate_prompt_tokens: Truncation | None = None
    cache_salt: Name | None = None
    priority: int | None = None
    structured_outputs: dict[str, Any] | None = None
    request_id: RequestId | None = None

    _sampling: ClassVar[tuple[str, ...]] = (
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "typical_p",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "seed",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "include_stop_str_in_output",
        "skip_special_tokens",
        "min_tokens",
        "logit_bias",
        "prompt_logprobs",
        "bad_words",
        "allowed_token_ids",
        "cache_salt",
        "priority",
    )
    _neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "spaces_between_special_tokens": (True,),
    }
    """Values that ask for nothing, of the parameters that this server does not have."""

    def refuse_unsupported(self) -> None:
        """Raises ApiError for a parameter that is given and cannot be honoured."""
        for name, neutral in self._neutral.items():
            value = getattr(self, name)
            if value is not None and value not in neutral:
                raise unsupported(name, "is not supported by this server; leave it out")
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options is only allowed with stream", param="stream_options")
        if self.stream_options is not None and self.stream_options.include_obfuscation:
            raise unsupported("stream_options", "cannot ask for include_obfuscation on this server")
        if self.prompt_logprobs is not None and self.stream:
            raise unsupported("prompt_logprobs", "cannot be combined with stream")

    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that were given."""
        given = {name: getattr(self, name) for name in self._sampling}
        given["structured_outputs"] = self.structure()
        return {name: value for name, value in given.items() if value is not None}

    def structure(self) -> StructuredOutputs | None:
        """What the output must look like. Raises ApiError for a description that makes no sense."""
        return from_fields(self.structured_outputs)

    @property
    def include_usage(self) -> bool:
        """True if a stream's last event is to carry usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """True if each event of a stream is to carry usage."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class AnswerBody(SamplingBody):
    """A sampling body that has OpenAI's ``response_format`` too, and vLLM's beam search."""

    response_format: dict[str, Any] | None = None
    use_beam_search: bool | None = None
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = None

    _with_beams: ClassVar[tuple[str, ...]] = (
        "max_tokens",
        "stop_token_ids",
        "ignore_eos",
        "include_stop_str_in_output",
        "skip_special_tokens",
        "logprobs",
        "prompt_logprobs",
        "cache_salt",
        "priority",
        "seed",
    )
    """Sampling parameters that a search can follow; the others change probabilities, or draw."""

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.length_penalty is not None and not self.use_beam_search:
            raise ApiError("length_penalty needs use_beam_search", param="length_penalty")
        if self.use_beam_search and (self.n or 1) > MAX_BEAM_WIDTH:
            raise ApiError(f"n is {self.n}; a beam search keeps at most {MAX_BEAM_WIDTH}", param="n")

    def start(
        self,
        served: ServedModel,
        given: dict[str, Any],
        prompts: list[Int32],
        record: RequestRecord,
        *,
        score_only: bool = False,
    ) -> Generation:
        """Hands prompts to the engine with the sampling parameters ``given``. Raises SamplingError and ApiError."""
        searched = self._beam_search(given)
        if searched is None:
            return served.generate(prompts, served.sampling_params(given), record, score_only=score_only)
        search, params = searched
        served.check_params(params)
        return served.generate(prompts, params, record, beam=search)

    def _beam_search(self, given: dict[str, Any]) -> tuple[BeamSearch, SamplingParams] | None:
        """The search that is asked for, as wide as ``n``, and its parameters of those ``given``. Raises ApiError."""
        if not self.use_beam_search:
            return None
        search = BeamSearch(self.n or 1, 1.0 if self.length_penalty is None else self.length_penalty)
        for name, value in given.items():
            neutral = (0, 1) if name == "temperature" else (getattr(_DEFAULTS, name),)
            if name not in (*self._with_beams, "n") and value not in neutral:
                raise unsupported(name, "cannot be combined with use_beam_search")
        return search, search.params(**{name: given[name] for name in self._with_beams if name in given})

    def structure(self) -> StructuredOutputs | None:
        wanted = [each for each in (super().structure(), from_format(self.response_format)) if each is not None]
        if len(wanted) > 1:
            raise ApiError("response_format and structured_outputs cannot be combined", param="response_format")
        return wanted[0] if wanted else None
