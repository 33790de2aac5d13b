"""Load on a server that speaks OpenAI's API: what a user waits, and what comes out, at a given load.

A client of its own, for one need: exact prompts, token ids as they are, for models whose only tokenizer lies in a GGUF
file, offline and beside the core install. aiperf, for one, makes and counts prompts with a tokenizer in Hugging Face's
format, or with an encoding that it downloads, and brings a large environment along. This one needs httpx.

Arrivals are *closed loop* (so many users, each sending when the last answer is there) or *Poisson* (requests per
second, whether the server keeps up or not). Times are of the client, from sending the request; the time between tokens
is a stream's from its first to its last chunk over the tokens in between (vLLM's ``benchmark_serving`` calls it TPOT).
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmill.errors import TokenmillError, UsageError

if TYPE_CHECKING:
    import httpx


_KIND_CHARACTERS = 80
"""Errors that begin alike are counted together; each exchange keeps its own in full."""


class TraceError(TokenmillError):
    """A trace that cannot be read; names the line."""


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One request. ``arrival`` is in seconds from the run's begin, None where the load decides."""

    prompt: str | tuple[int, ...] | tuple[dict[str, Any], ...]
    """Text or token ids for /v1/completions, messages for /v1/chat/completions."""
    max_tokens: int
    arrival: float | None = None

    @property
    def chat(self) -> bool:
        return not isinstance(self.prompt, str) and bool(self.prompt) and isinstance(self.prompt[0], dict)


@dataclass(slots=True)
class Exchange:
    """What came of one request. Seconds from sending it; ``error`` if it did not end as it should."""

    sent: float
    """From the run's begin."""
    late: float = 0.0
    """How long after its due time the client got to send it."""
    ttft: float | None = None
    last: float | None = None
    chunks: int = 0
    output_tokens: int = 0
    prompt_tokens: int | None = None
    asked_tokens: int = 0
    error: str | None = None

    @property
    def itl(self) -> float | None:
        """Mean seconds between tokens."""
        if self.error is not None or self.ttft is None or self.last is None or self.output_tokens < 2:
            return None
        return (self.last - self.ttft) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Seconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quantiles | None:
        """None without a value. Quantiles are values that occurred (nearest rank)."""
        if not values:
            return None
        ordered = sorted(values)

        def rank(q: float) -> float:
            return ordered[min(len(ordered) - 1, max(0, -(-int(1000 * q) * len(ordered) // 1000) - 1))]

        return cls(sum(ordered) / len(ordered), rank(0.5), rank(0.9), rank(0.99))


@dataclass(frozen=True, slots=True)
class LoadReport:
    """One load. Rates are over the whole run, from the first request sent to the last answer."""

    load: float
    """Users (closed loop) or requests per second (Poisson); 0 for a replayed trace."""
    requests: int
    failed: int
    errors: dict[str, int]
    seconds: float
    prompt_tokens: int | None
    """Of the requests that ended well, as the server counts them; None if it does not say."""
    output_tokens: int
    """As the server counts them, or one for each chunk where it does not say."""
    asked_tokens: int
    """Most that these requests could have produced; fewer came if the server stops at end tokens."""
    output_tokens_per_second: float
    requests_per_second: float
    goodput_requests_per_second: float
    """Of requests within both bounds."""
    ttft_seconds: Quantiles | None
    itl_seconds: Quantiles | None
    request_seconds: Quantiles | None
    client_cpu_seconds: float
    """Processor time that this client took: on the server's machine it is the server's loss."""
    exchanges: tuple[Exchange, ...] = field(repr=False)


def random_requests(
    count: int, input_tokens: int, output_tokens: int, vocabulary: int, seed: int = 0
) -> list[LoadRequest]:
    """Prompts of random token ids: no two share a prefix."""
    draw = random.Random(seed)
    return [
        LoadRequest(tuple(draw.randrange(vocabulary) for _ in range(input_tokens)), output_tokens) for _ in range(count)
    ]


def text_requests(count: int, text: str, characters: int, output_tokens: int, seed: int = 0) -> list[LoadRequest]:
    """Prompts cut from random places of a text, for servers that take no token ids."""
    draw = random.Random(seed)
    last = max(1, len(text) - characters)
    return [
        LoadRequest(text[at : at + characters], output_tokens) for at in (draw.randrange(last) for _ in range(count))
    ]


def read_trace(path: Path) -> list[LoadRequest]:
    """A JSONL trace: ``prompt`` (text or ids) or ``messages``, ``max_tokens``, and optionally ``arrival`` in seconds.

    Raises TraceError naming the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path} cannot be read: {error}") from error
    requests = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            prompt = entry["messages"] if "messages" in entry else entry["prompt"]
            arrival = entry.get("arrival")
            requests.append(
                LoadRequest(
                    prompt if isinstance(prompt, str) else tuple(prompt),
                    int(entry["max_tokens"]),
                    None if arrival is None else float(arrival),
                )
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TraceError(f"{path}, line {number}: {type(error).__name__}: {error}") from error
    if not requests:
        raise TraceError(f"{path} holds no request")
    return requests


def poisson_arrivals(requests: Sequence[LoadRequest], rate: float, seed: int = 0) -> list[LoadRequest]:
    """The requests with exponential gaps between them, ``rate`` a second on average."""
    draw, at, made = random.Random(seed), 0.0, []
    for request in requests:
        at += draw.expovariate(rate)
        made.append(LoadRequest(request.prompt, request.max_tokens, at))
    return made


def run_load(
    url: str,
    model: str,
    requests: Sequence[LoadRequest],
    *,
    users: int | None = None,
    load: float | None = None,
    ttft_bound: float = float("inf"),
    itl_bound: float = float("inf"),
    timeout: float = 300.0,
    api_key: str | None = None,
    stream: bool = True,
    on_exchange: Callable[[Exchange], None] = lambda _: None,
) -> LoadReport:
    """Sends ``requests`` to the server at ``url`` (its root, without /v1).

    With ``users`` in a closed loop, else each at its ``arrival``; ``load`` is what the report calls it. ``timeout``
    bounds the wait for any next byte, in seconds. Without ``stream`` answers come whole, and only their end is timed. A
    request that fails is counted with its reason and the run goes on;
    if the server is gone, so are the rest. Raises UsageError if httpx is missing or a request has no arrival.
    """
    try:
        import httpx
    except ImportError as error:
        raise UsageError("bench serve needs httpx: pip install 'tokenmill[bench]'") from error
    if users is None and any(request.arrival is None for request in requests):
        raise UsageError("a request has no arrival: give users for a closed loop, or a rate")

    async def run() -> tuple[list[Exchange], float, float]:
        limits = httpx.Limits(max_connections=None)
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        async with httpx.AsyncClient(
            base_url=url, timeout=httpx.Timeout(timeout), limits=limits, headers=headers, trust_env=False
        ) as client:
            start, cpu = time.perf_counter(), time.process_time()

            async def one(request: LoadRequest, due: float | None) -> Exchange:
                exchange = await _exchange(client, model, request, start, due, stream)
                on_exchange(exchange)
                return exchange

            if users is None:
                exchanges = await asyncio.gather(*(_at(start, request, one) for request in requests))
            else:
                queue = iter(requests)

                async def user() -> list[Exchange]:
                    return [await one(request, None) for request in queue]

                exchanges = [done for each in await asyncio.gather(*(user() for _ in range(users))) for done in each]
            return list(exchanges), time.perf_counter() - start, time.process_time() - cpu

    exchanges, seconds, cpu = asyncio.run(run())
    return _report(exchanges, seconds, cpu, float(users or 0) if load is None else load, ttft_bound, itl_bound)


async def _at(start: float, request: LoadRequest, one: Callable[[LoadRequest, float | None], Any]) -> Exchange:
    assert request.arrival is not None
    await asyncio.sleep(max(0.0, start + request.arrival - time.perf_counter()))
    exchange: Exchange = await one(request, request.arrival)
    return exchange


async def _exchange(
    client: httpx.AsyncClient, model: str, request: LoadRequest, start: float, due: float | None, stream: bool
) -> Exchange:
    import httpx

    body: dict[str, Any] = {
        "model": model,
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if request.chat:
        path, body["messages"] = "/v1/chat/completions", list(request.prompt)
    else:
        path = "/v1/completions"
        body["prompt"] = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
    sent = time.perf_counter()
    exchange = Exchange(sent - start, 0.0 if due is None else sent - start - due, asked_tokens=request.max_tokens)
    try:
        async with client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                detail = (await response.aread()).decode(errors="replace")[:200]
                exchange.error = f"HTTP {response.status_code}: {detail}"
                return exchange
            if stream:
                await _follow(exchange, response.aiter_lines(), sent)
            else:
                usage = json.loads(await response.aread())["usage"]
                exchange.output_tokens, exchange.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
                exchange.last = time.perf_counter() - sent
    except (httpx.HTTPError, ValueError, KeyError) as error:
        exchange.error = f"{type(error).__name__}: {error}".rstrip(": ")
    return exchange


async def _follow(exchange: Exchange, lines: AsyncIterator[str], sent: float) -> None:
    """Reads a stream to its end; one that breaks off, holds an error or no token is no success."""
    ended = False
    async for line in lines:
        if not line.startswith("data:"):
            continue
        payload = line.removeprefix("data:").strip()
        if payload == "[DONE]":
            ended = True
            break
        try:
            event = json.loads(payload)
        except ValueError:
            exchange.error = f"a chunk is no JSON: {payload[:100]}"
            return
        if "error" in event:
            exchange.error = f"error in the stream: {str(event['error'])[:200]}"
            return
        if usage := event.get("usage"):
            exchange.output_tokens, exchange.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
        for choice in event.get("choices", ()):
            # A token may come without text: part of a character, or an end token.
            if "text" in choice or choice.get("delta", {}).get("content") is not None:
                exchange.last = time.perf_counter() - sent
                exchange.ttft = exchange.last if exchange.ttft is None else exchange.ttft
                exchange.chunks += 1
    if not ended:
        exchange.error = "the stream broke off"
    elif exchange.ttft is None:
        exchange.error = "the answer held no token"
    elif exchange.prompt_tokens is None:
        exchange.output_tokens = exchange.chunks  # a server without usage: one chunk is one token


def _report(
    exchanges: list[Exchange], seconds: float, cpu: float, load: float, ttft_bound: float, itl_bound: float
) -> LoadReport:
    good = [exchange for exchange in exchanges if exchange.error is None]
    errors: dict[str, int] = {}
    for exchange in exchanges:
        if exchange.error is not None:
            kind = exchange.error[:_KIND_CHARACTERS]
            errors[kind] = errors.get(kind, 0) + 1
    ttft = [exchange.ttft for exchange in good if exchange.ttft is not None]
    itl = [exchange.itl for exchange in good if exchange.itl is not None]
    whole = [exchange.last for exchange in good if exchange.last is not None]
    within = [e for e in good if (e.ttft or 0.0) <= ttft_bound and (e.itl or 0.0) <= itl_bound]
    output = sum(exchange.output_tokens for exchange in good)
    told = [exchange.prompt_tokens for exchange in good]
    return LoadReport(
        load=load,
        requests=len(exchanges),
        failed=len(exchanges) - len(good),
        errors=errors,
        seconds=seconds,
        prompt_tokens=None if None in told else sum(filter(None, told)),
        output_tokens=output,
        asked_tokens=sum(exchange.asked_tokens for exchange in good),
        output_tokens_per_second=output / seconds,
        requests_per_second=len(good) / seconds,
        goodput_requests_per_second=len(within) / seconds,
        ttft_seconds=Quantiles.of(ttft),
        itl_seconds=Quantiles.of(itl),
        request_seconds=Quantiles.of(whole),
        client_cpu_seconds=cpu,
        exchanges=tuple(exchanges),
    )
