"""The model that a server serves: its names, its text side, its engine, and who may come in."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenmill.engine.assemble import ModelText, load_text
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.messages import AddRequest, BeamSearch, Pooling
from tokenmill.engine.process import EngineProcess, EngineState
from tokenmill.engine.statistics import StepStatistics
from tokenmill.engine.wire import EngineReady, EngineReport
from tokenmill.program.step import Int32
from tokenmill.sampling import SamplingParams, bad_word_ids
from tokenmill.server.config import ServerConfig
from tokenmill.server.errors import AbortedError, ApiError, ShutdownError, unsupported
from tokenmill.server.generation import Generation, prompt_array
from tokenmill.server.metrics import Metrics
from tokenmill.server.reasoning import ReasoningReader
from tokenmill.server.request_log import RequestRecord, log
from tokenmill.server.tracing import Tracing, otlp_exporter
from tokenmill.tokenizer import Tokenizer

LONG_TEXT = 20_000
"""Characters from which on text is tokenized in a thread: the others' streams must not wait for it."""

_SEATS_OF_A_LIST = 2
"""A list of prompts has at most so many times the engine's seats: as many run, and as many are there when these end."""


class ServedModel:
    """What routes work with. Belongs to one event loop."""

    def __init__(self, config: ServerConfig, engine_config: EngineConfig, path: Path) -> None:
        self.config = config
        self.engine_config = engine_config
        self.path = path
        self.created = int(time.time())
        self.draining = False
        self.active_requests = 0
        """HTTP requests that are being answered."""
        self.engine = EngineProcess(
            engine_config,
            path,
            patience=config.watchdog_seconds or math.inf,
            start_patience=config.start_seconds or math.inf,
            on_report=self._report_came,
            on_death=self._engine_died,
            on_restart=self._engine_came,
        )
        endpoint = config.otlp_traces_endpoint
        self.tracing = None if endpoint is None else Tracing(otlp_exporter(endpoint), config.names[0])
        self.ready: EngineReady
        self.text: ModelText
        self.tokenizer: Tokenizer
        self.metrics: Metrics
        self.steps = StepStatistics()
        """The engine's steps since the server started, whichever process ran them."""
        self.generations: dict[Generation, None] = {}
        """Those that run, oldest first."""
        self._recent_ends: list[float] = []

    async def start(self) -> None:
        """Loads the model. Raises EngineStartError and what :func:`load_text` raises."""
        loading = asyncio.create_task(asyncio.to_thread(load_text, self.engine_config, self.path))
        try:
            self.ready = await self.engine.start()
            self.text = await loading
            self.tokenizer = self.text.tokenizer
            if self.config.chat_template is not None:
                self.tokenizer = self.tokenizer.with_chat_template(self.config.chat_template)
        except BaseException:
            loading.cancel()
            await self.engine.close()
            raise
        self.metrics = Metrics(self.name, self.max_model_len)
        self.metrics.engine_started(self.ready.ledger, self.engine_config.enable_prefix_caching)

    async def close(self) -> None:
        await self.engine.close()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)

    # ---- what it is ------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.config.names[0]

    @property
    def max_model_len(self) -> int:
        """Most tokens of a sequence, prompt and output."""
        return self.ready.ledger.max_model_len

    def check_name(self, name: str | None) -> str:
        """The name that an answer carries. Raises ApiError for a model that is not here."""
        if name is None:
            return self.name
        if name in self.config.names:
            return name
        known = ", ".join(self.config.names)
        raise ApiError(
            f"there is no model {name!r} here; this server has {known}", 404, param="model", code="model_not_found"
        )

    # ---- prompts ---------------------------------------------------------------------------------------------------

    async def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of ``text``. Raises TokenizerError."""
        if len(text) < LONG_TEXT:
            return self.tokenizer.encode(text, add_special, parse_special)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special, parse_special)

    async def prompt_ids(self, prompt: str | list[int], *, add_special: bool = True) -> list[int]:
        """Token ids of a prompt in either form. Raises TokenizerError."""
        if isinstance(prompt, list):
            return prompt
        return await self.encode(prompt, add_special=add_special) if prompt else []

    def check_prompt(
        self, token_ids: Sequence[int], *, room: int = 1, param: str = "prompt", truncate: int | None = None
    ) -> Int32:
        """The prompt for the engine, with ``room`` for so many more tokens. Raises ApiError.

        With ``truncate`` only its last tokens: so many, or for -1 as many as the context takes.
        """
        if truncate is not None:
            token_ids = token_ids[max(len(token_ids) - (self.max_model_len - room if truncate < 0 else truncate), 0) :]
        if not token_ids:
            raise ApiError(f"{param} is empty: it needs at least one token", param=param)
        if len(token_ids) + room > self.max_model_len:
            raise ApiError(
                f"{param} has {len(token_ids)} tokens; the context takes {self.max_model_len}"
                + (f" with room for {room} more" if room else ""),
                param=param,
                code="context_length_exceeded",
            )
        most = self.ready.vocab_size - 1
        if min(token_ids) < 0 or max(token_ids) > most:
            wrong = next(token for token in token_ids if not 0 <= token <= most)
            raise ApiError(f"{param} holds token {wrong}, outside of the vocabulary 0..{most}", param=param)
        return prompt_array(token_ids)

    def sampling_params(self, given: Mapping[str, Any]) -> SamplingParams:
        """The model's defaults with what a request gave. Raises SamplingError and ApiError."""
        params = SamplingParams.from_defaults(self.text.generation_defaults, **given)
        self.check_params(params)
        return params

    def check_params(self, params: SamplingParams) -> None:
        """Raises SamplingError and ApiError for parameters that this model or this server cannot honour."""
        params.check_vocabulary(self.ready.vocab_size)
        if params.priority and self.engine_config.scheduling_policy != "priority":
            raise unsupported("priority", "needs a server with --scheduling-policy priority")

    def reasoning_reader(self, prompt: str, params: SamplingParams) -> ReasoningReader | None:
        """Finds the reasoning in an answer to the rendered ``prompt``. An answer of a given form has none."""
        if params.structured_outputs is not None:
            return None
        return self.config.reasoning_parser.reader(self.tokenizer.chat_template, prompt)

    # ---- generating ------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Int32],
        params: SamplingParams,
        record: RequestRecord,
        *,
        score_only: bool = False,
        beam: BeamSearch | None = None,
        pooling: Pooling | None = None,
    ) -> Generation:
        """Hands prompts to the engine, what is wanted of them as in AddRequest. Raises ApiError (503) if they cannot be
        taken now."""
        bad_words = bad_word_ids(params.bad_words, lambda text: self.tokenizer.encode(text, add_special=False))
        requests = [
            AddRequest(
                self.engine.new_request_id(),
                prompt,
                params.with_seed(secrets.randbits(64)),
                self.tokenizer.eos_ids,
                score_only=score_only,
                pooling=pooling,
                arrival=record.arrival,
                bad_words=bad_words,
                beam=beam,
            )
            for prompt in prompts
        ]
        places = self._admit(requests)
        if self.config.log_prompts:
            record.prompts = [self.tokenizer.decode(prompt.tolist(), skip_special=False) for prompt in prompts]
        generation = Generation(
            self.engine, self.tokenizer, self.metrics, record, requests, places, on_end=self._generation_ended
        )
        self.generations[generation] = None
        return generation

    def abort(self, request_ids: Sequence[str]) -> int:
        """Stops requests by the ids that their answers carry. The number of those that ran."""
        wanted = set(request_ids)
        found = [generation for generation in self.generations if generation.record.request_id in wanted]
        for generation in found:
            self.metrics.cancelled("aborted")
            generation.stop(AbortedError("the request was aborted"))
        return len(found)

    def stop_all(self) -> None:
        """Ends every request that runs: the server cannot wait any longer."""
        for generation in list(self.generations):
            self.metrics.cancelled("shutdown")
            generation.stop(ShutdownError("the server is shutting down"))

    @property
    def places(self) -> int:
        """Outputs that may wait or run in the engine now, at most."""
        return sum(generation.places for generation in self.generations)

    def unready(self) -> str | None:
        """Why requests are not taken now; None if they are."""
        if self.draining:
            return "the server is shutting down"
        if self.engine.state is not EngineState.RUNNING:
            return f"{self.engine.reason}; it is being started again"
        return None

    def _admit(self, requests: Sequence[AddRequest]) -> int:
        """How many outputs of ``requests`` may be in the engine at once. Raises ApiError if they cannot be taken."""
        reason = self.unready()
        if reason is not None:
            self.metrics.rejected("draining" if self.draining else "engine_dead")
            raise ApiError(reason, 503, code="unavailable", retry_after=1)
        seats = self.ready.ledger.max_num_seqs
        room, each = seats + self.config.max_queued_requests, requests[0].outputs
        if each > room:
            raise ApiError(
                f"n is {each}; at most {room} outputs may run and wait (--max-num-seqs and --max-queued-requests)",
                param="n",
            )
        places = min(each * len(requests), max(_SEATS_OF_A_LIST * seats, each), room)
        if self.places + places > room:
            self.metrics.rejected("queue_full")
            raise ApiError(
                f"the queue is full: {self.places} outputs run or wait, {room} may (--max-queued-requests)",
                503,
                code="overloaded",
                retry_after=self._retry_after(),
            )
        return places

    def _retry_after(self) -> int:
        """Seconds in which, at the pace of the last requests, a tenth of the queue will be done."""
        ends = self._recent_ends
        if len(ends) < 2 or ends[-1] <= ends[0]:
            return 1
        pace = (len(ends) - 1) / (ends[-1] - ends[0])
        return min(max(math.ceil(self.places / 10 / pace), 1), 60)

    # ---- what happens ----------------------------------------------------------------------------------------------

    def _generation_ended(self, generation: Generation) -> None:
        self.generations.pop(generation, None)
        self._recent_ends = [*self._recent_ends[-31:], time.monotonic()]
        if self.config.log_prompts:
            generation.record.outputs = [
                output.text for number in range(len(generation.prompts)) for output in generation.outputs(number)
            ]

    def _report_came(self, report: EngineReport) -> None:
        self.metrics.engine_report(report)
        if report.step is not None:
            self.steps.add(report.step)

    def _engine_died(self, cause: str) -> None:
        log.error("%s; starting it again", cause)
        self.metrics.engine_up(False)

    def _engine_came(self, ready: EngineReady) -> None:
        log.info("the engine is back")
        self.ready = ready
        self.metrics.engine_up(True)
