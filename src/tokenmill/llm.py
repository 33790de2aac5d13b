"""The front door: load a model, generate, stream, chat, score.

>>> with LLM("smollm2-135m") as llm:
...     output = llm.generate("The capital of France is", SamplingParams(max_tokens=8, temperature=0))[0]
...     print(output.text)
"""

from __future__ import annotations

import secrets
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from tokenmill.backends.backend import Float32
from tokenmill.engine.assemble import load_model
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import EventStream
from tokenmill.engine.ledger import MemoryLedger
from tokenmill.engine.messages import (
    AddRequest,
    BeamSearch,
    Embedded,
    EngineError,
    EngineOverloadedError,
    Failed,
    FailureKind,
    Finished,
    Pooling,
    PromptScored,
    TokenLogprobs,
    TokenOutput,
)
from tokenmill.engine.outputs import CompletionOutput, OutputBuilder, RequestOutput, StreamChunk
from tokenmill.errors import UsageError
from tokenmill.models import ModelConfig
from tokenmill.sampling import SamplingParams, bad_word_ids
from tokenmill.sources import resolve
from tokenmill.tokenizer import Tokenizer

__all__ = ["LLM", "CompletionOutput", "OutputStream", "PromptError", "RequestOutput", "SamplingParams", "StreamChunk"]

Prompt = str | Sequence[int] | np.ndarray[Any, np.dtype[np.integer[Any]]]
Message = Mapping[str, Any]


class PromptError(UsageError):
    """A prompt that cannot be run: empty, longer than the context, or with ids outside of the vocabulary."""


class LLM:
    """One loaded model. All methods may be called from many threads; their requests run together.

    ``model`` is a catalogue name, a ``.gguf`` file, a folder with ``config.json`` and safetensors, or ``org/name`` on
    the Hugging Face hub. The other parameters are those of :class:`tokenmill.engine.config.EngineConfig`.

    Raises UsageError for a parameter out of range, SourceError if the model cannot be found or fetched, ModelFileError
    and UnsupportedModelError for a file that cannot be run, MemoryLimitError if it does not fit.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        backend: Literal["native", "torch"] = "native",
        memory: int | str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_batch_tokens: int = 512,
        kv_cache_dtype: str = "f16",
        threads: int = 0,
        cache_dir: str | Path | None = None,
        enable_prefix_caching: bool = True,
        swap_space: int | str | None = None,
        swap_dir: str | Path | None = None,
        step_target: float | None = None,
        scheduling_policy: Literal["fcfs", "priority"] = "fcfs",
        screened_head: Literal["off", "on", "auto"] = "off",
        max_waiting: int | None = None,
    ) -> None:
        self.config = EngineConfig(
            model=model,
            backend=backend,
            memory=memory,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_batch_tokens,
            kv_cache_dtype=kv_cache_dtype,
            threads=threads,
            cache_dir=cache_dir,
            enable_prefix_caching=enable_prefix_caching,
            swap_space=swap_space,
            swap_dir=swap_dir,
            step_target=step_target,
            scheduling_policy=scheduling_policy,
            screened_head=screened_head,
            max_waiting=max_waiting,
        )
        loaded = load_model(self.config, resolve(model))
        self.path: Path = loaded.path
        """The model file or folder."""
        self.tokenizer: Tokenizer = loaded.tokenizer
        self.generation_defaults: Mapping[str, Any] = loaded.generation_defaults
        """Sampling parameters that the model's authors recommend."""
        self.architecture: str = loaded.bound.architecture
        self.model_config: ModelConfig = loaded.bound.config
        self.memory: MemoryLedger = loaded.ledger
        """What the engine's memory is spent on; ``print(llm.memory)`` shows a table."""
        self.start_seconds: Mapping[str, float] = loaded.seconds
        """Where the time of the start went."""
        self.engine = loaded.engine
        # Whoever drops the last reference without close() gets the memory back too; the engine closes itself at exit.
        weakref.finalize(self, self.engine.stop).atexit = False
        self._vocab_size = loaded.bound.program.vocab_size

    @property
    def max_model_len(self) -> int:
        """Most tokens of a sequence, prompt and output."""
        return self.memory.max_model_len

    # ---- generating ------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """One output per prompt, in their order.

        ``prompts`` is a text, a list of token ids, or a list of either; ``params`` one for all, one for each, or None
        for the model's defaults. Text gets the special tokens that the model wants at its beginning. Raises PromptError
        and SamplingError before anything runs, EngineError if a prompt fails (the others are cancelled).
        """
        batch = _as_batch(prompts)
        return self._run_all(batch, self._requests(batch, params))

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        beam_width: int = 4,
        max_tokens: int | None = 64,
        length_penalty: float = 1.0,
        ignore_eos: bool = False,
        stop_token_ids: Sequence[int] = (),
    ) -> list[RequestOutput]:
        """The ``beam_width`` (1 to 64) likeliest outputs of each prompt, best first.

        Outputs are compared by ``cumulative_logprob`` over the number of their tokens to the power of
        ``length_penalty``: above 0 it favours longer ones. Raises as :meth:`generate` does.
        """
        search = BeamSearch(beam_width, length_penalty)
        params = search.params(max_tokens=max_tokens, ignore_eos=ignore_eos, stop_token_ids=stop_token_ids)
        batch = _as_batch(prompts)
        return self._run_all(batch, [replace(one, beam=search) for one in self._requests(batch, params)])

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> OutputStream:
        """The output of one prompt, piece by piece as it comes. Closing the iterator cancels the request.

        Raises as :meth:`generate` does, at the call and not at the first piece.
        """
        return OutputStream(_Run(self, self._requests([prompt], params)))

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **template_arguments: Any,
    ) -> RequestOutput:
        """The model's answer to a conversation, through its chat template.

        ``messages`` are mappings with ``role`` and ``content``. Without ``params`` the model's defaults hold and the
        answer may be as long as the context allows. ``chat_template`` names one of several templates that the model
        has. Raises ChatTemplateError if the model has no template or it
        refuses the conversation, else as :meth:`generate`.
        """
        prompt = self.tokenizer.encode_chat(
            messages, tools, documents, add_generation_prompt, chat_template, **template_arguments
        )
        return self.generate(prompt, params or self.default_params(max_tokens=None))[0]

    def score(self, tokens: Prompt) -> Float32:
        """Log-probability of each token given those before it: ``[len(tokens) - 1]``, from the second token on.

        Logits exist for at most 64 tokens at a time. Raises PromptError and EngineError.
        """
        (ids,) = self._prompt_ids([tokens], room=0)
        params = SamplingParams(seed=0, prompt_logprobs=0)
        request = AddRequest(self.engine.new_request_id(), ids, params, score_only=True, arrival=time.monotonic())
        run = _Run(self, [request], together=True)
        run.finish()
        return np.array([item.logprob for item in run.scores[request.request_id]], dtype=np.float32)

    def embed(self, prompts: Prompt | Sequence[Prompt], *, pooling: Literal["last", "mean"] = "last") -> Float32:
        """Each prompt's embedding: ``[prompts, hidden]``, rows of Euclidean length 1.

        They are the model's hidden states after its final norm, of the last token or their mean over the prompt. What
        is served here was trained to generate, so measure whether they suit a task. Raises as :meth:`generate` does.
        """
        if pooling not in ("last", "mean"):
            raise UsageError(f'pooling is {pooling!r}; it must be "last" or "mean"')
        requests = [
            AddRequest(
                self.engine.new_request_id(),
                ids,
                SamplingParams(seed=0),
                pooling=Pooling(pooling),
                arrival=time.monotonic(),
            )
            for ids in self._prompt_ids(_as_batch(prompts), room=0)
        ]
        run = _Run(self, requests, together=True)
        run.finish()
        return np.stack([run.embeddings[request.request_id] for request in requests])

    def default_params(self, **overrides: Any) -> SamplingParams:
        """The model's recommended sampling parameters with some replaced."""
        return SamplingParams.from_defaults(self.generation_defaults, **overrides)

    # ---- text ------------------------------------------------------------------------------------------------------

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of ``text``, with the special tokens that the model wants at its beginning."""
        return self.tokenizer.encode(text, add_special=add_special)

    def detokenize(self, token_ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of ``token_ids``."""
        return self.tokenizer.decode(token_ids, skip_special=skip_special)

    # ---- lifetime --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stops the engine and frees its memory; open requests end with EngineDeadError. Safe to call twice."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- requests --------------------------------------------------------------------------------------------------

    def _requests(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[AddRequest]:
        if params is None:
            params = self.default_params()
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise UsageError(f"{len(prompts)} prompts came with {len(each)} SamplingParams; give one, or one for each")
        for own in each:
            if not isinstance(own, SamplingParams):
                raise UsageError(f"params holds {type(own).__name__}; it must be SamplingParams")
            own.check_vocabulary(self._vocab_size)
        arrival = time.monotonic()
        return [
            AddRequest(
                self.engine.new_request_id(),
                ids,
                own.with_seed(secrets.randbits(64)),
                self.tokenizer.eos_ids,
                arrival=arrival,
                bad_words=bad_word_ids(own.bad_words, self._encode_plain),
            )
            for ids, own in zip(self._prompt_ids(prompts, room=1), each, strict=True)
        ]

    def _run_all(self, batch: Sequence[Prompt], requests: Sequence[AddRequest]) -> list[RequestOutput]:
        run = _Run(self, requests, together=True)
        outputs = [
            RequestOutput(prompt if isinstance(prompt, str) else None, request.prompt.tolist(), run.outputs(request))
            for prompt, request in zip(batch, requests, strict=True)
        ]
        run.finish()
        for output, request in zip(outputs, requests, strict=True):
            if request.params.prompt_logprobs is not None:
                output.prompt_logprobs = [None, *run.scores[request.request_id]]
        return outputs

    def _encode_plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special=False)

    def _prompt_ids(self, prompts: Sequence[Prompt], room: int) -> list[np.ndarray[Any, np.dtype[np.int32]]]:
        """Token ids of each prompt, checked; ``room`` is how many tokens must fit after them."""
        checked = []
        for number, prompt in enumerate(prompts):
            name = "the prompt" if len(prompts) == 1 else f"prompt {number}"
            ids = self.tokenize(prompt) if isinstance(prompt, str) else _token_list(prompt, name)
            if not ids or not len(prompt):
                raise PromptError(f"{name} is empty: it needs at least one token")
            for token in ids:
                if isinstance(token, bool) or not isinstance(token, int | np.integer):
                    raise PromptError(f"{name} holds {token!r}; a prompt is a text or a list of token ids")
                if not 0 <= token < self._vocab_size:
                    raise PromptError(
                        f"{name} holds token {token}, outside of the vocabulary 0..{self._vocab_size - 1}"
                    )
            if len(ids) + room > self.max_model_len:
                rest = f" with room for {room} more" if room else ""
                longest = self.model_config.max_position
                remedy = f" or raise max_model_len (at most {longest})" if self.max_model_len < longest else ""
                raise PromptError(
                    f"{name} has {len(ids)} tokens, the context takes {self.max_model_len}{rest}; shorten it{remedy}"
                )
            checked.append(np.array(ids, dtype=np.int32))
        return checked


class OutputStream(Iterator[StreamChunk]):
    """The pieces of one request's output. Closing it, or dropping it before its end, cancels the request."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._chunks = run.chunks()

    def __next__(self) -> StreamChunk:
        return next(self._chunks)

    def close(self) -> None:
        """Cancels the request if it has not ended."""
        self._run.cancel()

    def __enter__(self) -> OutputStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class _Run:
    """Requests on their way, and what has come of them."""

    def __init__(self, llm: LLM, requests: Sequence[AddRequest], *, together: bool = False) -> None:
        """``together``: nobody looks at the outputs before all have ended."""
        self._llm = llm
        self._builders = {
            (request.request_id, index): OutputBuilder(index, request.params, llm.tokenizer)
            for request in requests
            for index in range(request.outputs)
        }
        self._open = set(self._builders)
        self._numbers = {request.request_id: number for number, request in enumerate(requests)}
        self.scores: dict[int, list[TokenLogprobs]] = {request.request_id: [] for request in requests}
        self.embeddings: dict[int, Float32] = {}
        # Stop strings are found on this side, as tokens come.
        together = together and not any(request.params.stop for request in requests)
        self._events: EventStream = llm.engine.submit(list(requests), together=together)

    def outputs(self, request: AddRequest) -> list[CompletionOutput]:
        """The outputs of a request, growing while :meth:`chunks` runs."""
        return [self._builders[request.request_id, index].output for index in range(request.params.n)]

    def finish(self) -> None:
        """Follows the requests to their end."""
        for _ in self.chunks():
            pass

    def cancel(self) -> None:
        """Stops what has not ended."""
        for request_id in {request_id for request_id, _ in self._open}:
            self._llm.engine.cancel(request_id)
        self._open.clear()

    def chunks(self) -> Iterator[StreamChunk]:
        """Follows the requests to their end. Whatever ends this early (an error, Ctrl-C, closing) cancels them."""
        try:
            while self._open:
                event = self._events.next_event()
                match event:
                    case TokenOutput():
                        builder = self._builders[event.request_id, event.index]
                        if not builder.done:
                            yield builder.token(event)
                            if builder.done:  # a stop string: the engine does not know of it
                                self._llm.engine.cancel(event.request_id, event.index)
                    case Finished():
                        self._open.discard((event.request_id, event.index))
                        builder = self._builders[event.request_id, event.index]
                        told = builder.done
                        chunk = builder.finish(event)
                        if not told:
                            yield chunk
                    case PromptScored():
                        self.scores[event.request_id] += event.logprobs
                    case Embedded():
                        self.embeddings[event.request_id] = event.vector
                    case Failed():
                        self._open = {key for key in self._open if key[0] != event.request_id}
                        which = "" if len(self._numbers) == 1 else f"prompt {self._numbers[event.request_id]}: "
                        if event.kind is FailureKind.OVERLOADED:
                            raise EngineOverloadedError(which + event.error, event.retry_after or 1.0)
                        raise EngineError(which + event.error)
        finally:
            self.cancel()


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, whether one or several were given."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, np.ndarray):
        return [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Sequence):
        raise UsageError(
            f"prompts is {type(prompts).__name__}; it must be a text, a list of token ids, or a list of them"
        )
    batch = list(prompts)
    if not batch:
        raise PromptError("prompts is empty: it needs at least one prompt or token")
    if all(isinstance(item, int | np.integer) for item in batch):
        return [batch]  # type: ignore[list-item]
    return batch  # type: ignore[return-value]


def _token_list(prompt: object, name: str) -> list[Any]:
    """The ids of a prompt that is no text; numpy's integers become Python's."""
    if isinstance(prompt, np.ndarray) and prompt.ndim == 1:
        return prompt.tolist()  # type: ignore[no-any-return]
    if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
        raise UsageError(f"{name} is {type(prompt).__name__}; it must be a text or a list of token ids")
    return list(prompt)
