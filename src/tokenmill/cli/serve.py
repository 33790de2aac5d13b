"""``tokenmill serve MODEL``: an OpenAI-compatible HTTP server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tokenmill.cli import options
from tokenmill.cli.answer import backend_name
from tokenmill.cli.terminal import say
from tokenmill.errors import UsageError

if TYPE_CHECKING:
    from tokenmill.server.served import ServedModel

_SCREENED_HEAD: dict[str, Literal["off", "on", "auto"]] = {"off": "off", "on": "on", "auto": "auto"}


def serve(
    model: Annotated[str, typer.Argument(help="Name, .gguf file, folder, or org/name on the hub.")],
    host: Annotated[str, typer.Option("--host", help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option("--api-key", help="Key that clients must send; repeatable. Also TOKENMILL_API_KEY."),
    ] = None,
    admin_api_key: Annotated[
        list[str] | None,
        typer.Option("--admin-api-key", help="Key for routes that change the server. Also TOKENMILL_ADMIN_API_KEY."),
    ] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option("--served-model-name", help="Name for requests; repeatable. Default: MODEL.")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option("--chat-template", help="File with a Jinja template in place of the model's.")
    ] = None,
    reasoning_parser: Annotated[
        str, typer.Option("--reasoning-parser", help="auto, none, qwen3 or deepseek_r1.")
    ] = "auto",
    pooling: Annotated[str, typer.Option("--pooling", help="What an embedding is made of: last, or mean.")] = "last",
    memory: options.Memory = None,
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: Annotated[int, typer.Option("--max-num-seqs", min=1, help="Most sequences that run at once.")] = 32,
    max_batch_tokens: Annotated[int, typer.Option("--max-batch-tokens", min=1, help="Most tokens of one step.")] = 512,
    prefix_caching: Annotated[
        bool, typer.Option("--prefix-caching/--no-prefix-caching", help="Reuse what prompts have in common.")
    ] = True,
    step_target: Annotated[
        float, typer.Option("--step-target", help="Seconds that a step should take; 0 for no target.")
    ] = 0.05,
    scheduling_policy: Annotated[str, typer.Option("--scheduling-policy", help="fcfs, or priority.")] = "fcfs",
    screened_head: Annotated[
        str, typer.Option("--screened-head", help="off, on or auto: greedy steps read less of the output head.")
    ] = "off",
    swap_space: Annotated[
        str | None, typer.Option("--swap-space", help="Files for requests that make room, e.g. 8GB. Default: none.")
    ] = None,
    threads: options.Threads = 0,
    backend: options.BackendName = "native",
    max_queued_requests: Annotated[
        int, typer.Option("--max-queued-requests", help="More waiting outputs than this get 503.")
    ] = 1024,
    max_body_size: Annotated[str, typer.Option("--max-body-size", help="Largest request body.")] = "16MiB",
    watchdog_timeout: Annotated[
        float, typer.Option("--watchdog-timeout", help="Seconds without a step after which the engine is restarted.")
    ] = 300.0,
    start_timeout: Annotated[
        float, typer.Option("--start-timeout", help="Seconds without progress after which a start is given up.")
    ] = 600.0,
    shutdown_timeout: Annotated[
        float, typer.Option("--shutdown-timeout", help="Seconds for running requests after SIGTERM.")
    ] = 30.0,
    cors_origin: Annotated[
        list[str] | None, typer.Option("--cors-origin", help="Web origin that may call; repeatable. Default: none.")
    ] = None,
    ssl_certfile: Annotated[Path | None, typer.Option("--ssl-certfile", help="Certificate chain, PEM.")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option("--ssl-keyfile", help="Its private key, PEM.")] = None,
    otlp_traces_endpoint: Annotated[
        str | None, typer.Option("--otlp-traces-endpoint", help="OpenTelemetry collector, e.g. http://127.0.0.1:4318.")
    ] = None,
    log_format: Annotated[str, typer.Option("--log-format", help="text or json.")] = "text",
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts and answers to the log.")] = False,
) -> None:
    """Serve a model over HTTP, behind OpenAI's API."""
    try:
        from tokenmill.server.config import LogFormat, ServerConfig
        from tokenmill.server.reasoning import ReasoningParser
        from tokenmill.server.run import serve as run
    except ModuleNotFoundError as error:
        needed = f"serving needs the server extra ({error.name} is missing): pip install 'tokenmill[server]'"
        raise UsageError(needed) from error
    from tokenmill.engine.config import EngineConfig
    from tokenmill.engine.ledger import parse_size
    from tokenmill.engine.messages import Pooling
    from tokenmill.sources import TerminalProgress, resolve

    for option, value, allowed in (
        ("--scheduling-policy", scheduling_policy, ["fcfs", "priority"]),
        ("--screened-head", screened_head, list(_SCREENED_HEAD)),
        ("--reasoning-parser", reasoning_parser, [each.value for each in ReasoningParser]),
        ("--pooling", pooling, [each.value for each in Pooling]),
        ("--log-format", log_format, [each.value for each in LogFormat]),
    ):
        if value not in allowed:
            raise UsageError(f"{option} is {value!r}; it must be one of {', '.join(allowed)}")
    config = ServerConfig(
        names=tuple(served_model_name or [_name_of(model)]),
        host=host,
        port=port,
        api_keys=tuple(api_key or _from_environment("TOKENMILL_API_KEY")),
        admin_api_keys=tuple(admin_api_key or _from_environment("TOKENMILL_ADMIN_API_KEY")),
        chat_template=None if chat_template is None else _read_template(chat_template),
        reasoning_parser=ReasoningParser(reasoning_parser),
        pooling=Pooling(pooling),
        max_queued_requests=max_queued_requests,
        max_body_bytes=parse_size(max_body_size),
        watchdog_seconds=watchdog_timeout,
        start_seconds=start_timeout,
        shutdown_seconds=shutdown_timeout,
        cors_origins=tuple(cors_origin or ()),
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
        otlp_traces_endpoint=otlp_traces_endpoint,
        log_format=LogFormat(log_format),
        log_prompts=log_prompts,
    )
    engine_config = EngineConfig(
        model=model,
        backend=backend_name(backend),
        memory=memory,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_batch_tokens,
        threads=threads,
        step_target=step_target or None,
        scheduling_policy="priority" if scheduling_policy == "priority" else "fcfs",
        screened_head=_SCREENED_HEAD[screened_head],
        swap_space=swap_space,
        enable_prefix_caching=prefix_caching,
    )
    path = resolve(model, TerminalProgress())
    say(f"loading {path}")
    run(config, engine_config, path, _announce)


def _announce(address: str, served: ServedModel) -> None:
    seconds = ", ".join(f"{what} {took:.2f}" for what, took in served.ready.seconds.items() if took >= 0.01)
    say(f"ready ({seconds}); Ctrl-C ends")
    say(str(served.ready.ledger))
    say(f"chat and a live view in the browser: {address}/")
    print(f"{served.name} is served at {address}/v1", flush=True)


def _name_of(model: str) -> str:
    """How requests call the model: a file or folder by its own name, everything else as it was given."""
    path = Path(model)
    return path.resolve().name.removesuffix(".gguf") if path.exists() else model


def _from_environment(name: str) -> list[str]:
    """Keys that a process list must not show."""
    return [key for key in os.environ.get(name, "").split(",") if key]


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--chat-template: {path} cannot be read: {error}") from error
