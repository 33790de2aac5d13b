"""``tokenmill eval`` humaneval, needle, mcq and tasks: answers that pass or fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenmill.cli.bench.options import JsonFile, Model, Plot, Threads, numbers, write
from tokenmill.cli.options import Memory
from tokenmill.cli.terminal import print_table, say

if TYPE_CHECKING:
    from tokenmill.evaluate.generation import Item, ItemResult, Judge
    from tokenmill.llm import LLM

Vs = Annotated[str | None, typer.Option("--vs", help="Another model, on the same items.")]
Log = Annotated[
    Path | None,
    typer.Option("--log", help="Keep prompts and outputs here (JSONL); the same command goes on where it was."),
]
Backend = Annotated[str, typer.Option("--backend", help="native or torch.")]
KvDtype = Annotated[str, typer.Option("--kv-cache-dtype", help="f16, bf16 or f32.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Items that run at once.")]
Seed = Annotated[int, typer.Option("--seed", min=0)]
Chat = Annotated[
    bool | None,
    typer.Option("--chat/--completion", help="Ask through the chat template. Default: if the model has one."),
]
TaskFile = Annotated[Path, typer.Argument(help="A JSONL file of tasks.")]


def humaneval(
    model: Model,
    vs: Vs = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Answers a problem; more than 1 are sampled.")] = 1,
    k: Annotated[str, typer.Option("--k", help="pass@k to report: 1,10.")] = "1",
    temperature: Annotated[float, typer.Option("--temperature", help="Of sampled answers.")] = 0.8,
    problems: Annotated[int, typer.Option("--problems", min=1, help="The first so many of the 164.")] = 164,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1)] = 512,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="What a program may take.")] = 3.0,
    chat: Chat = None,
    backend: Backend = "native",
    kv_cache_dtype: KvDtype = "f16",
    batch: Batch = 16,
    seed: Seed = 0,
    log: Log = None,
    threads: Threads = 0,
    memory: Memory = None,
    json_file: JsonFile = None,
) -> None:
    """Complete HumanEval's functions and run their tests, each in a sandbox; pass@1 greedy, or pass@k sampled."""
    from tokenmill.errors import UsageError
    from tokenmill.evaluate.humaneval import Grader, items, mean_pass_at_k, read_problems

    wanted = numbers("--k", k, 1)
    if max(wanted) > samples:
        raise UsageError(f"--k {k} needs --samples {max(wanted)} or more")
    chosen = read_problems()[:problems]
    results = []
    for name in _names(model, vs):
        with _open(name, backend, kv_cache_dtype, batch, threads, memory) as llm:
            style = _chat(llm, chat)
            results.append(
                _run(
                    llm,
                    items(chosen, chat=style, max_tokens=max_tokens),
                    Grader(chosen, seconds),
                    _log(
                        log,
                        name,
                        vs,
                        llm,
                        "humaneval",
                        f"{samples} {temperature} {seed} {max_tokens} {style} {problems}",
                    ),
                    samples=samples,
                    temperature=0.0 if samples == 1 else temperature,
                    seed=seed,
                )
            )
        for number in wanted:
            print(f"{name}: pass@{number} {100 * mean_pass_at_k(results[-1], number):.1f} %, {len(chosen)} problems")
    _conclude("humaneval", _names(model, vs), results, json_file, {"k": wanted, "samples": samples})


def needle(
    model: Model,
    vs: Vs = None,
    lengths: Annotated[str, typer.Option("--lengths", help="Tokens of the prompt: 512,1024,2048.")] = "512,1024,2048",
    depths: Annotated[
        str, typer.Option("--depths", help="Per cent of the text before the fact: 0,50,100.")
    ] = "0,25,50,75,100",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Facts for each length and depth.")] = 2,
    text: Annotated[str, typer.Option("--text", help="The haystack: a file or corpus:KIND.")] = "corpus:prose",
    chat: Chat = None,
    backend: Backend = "native",
    kv_cache_dtype: KvDtype = "f16",
    batch: Batch = 1,
    seed: Seed = 0,
    log: Log = None,
    threads: Threads = 0,
    memory: Memory = None,
    json_file: JsonFile = None,
    plot: Plot = None,
) -> None:
    """Hide a fact in a long text and ask for it, at several lengths and depths: a heat map."""
    from tokenmill.bench.plot import check_ending, draw_heat_map
    from tokenmill.evaluate.needle import Judge, heat_map, items, needles
    from tokenmill.evaluate.text import read_texts, text_digest

    check_ending(plot)
    sizes = numbers("--lengths", lengths, 1)
    hidden = needles(sizes, [d / 100 for d in numbers("--depths", depths, 0)], repeats, seed)
    haystack = read_texts([text], 8 * max(sizes) + 20_000)
    results, maps = [], []
    for name in _names(model, vs):
        with _open(name, backend, kv_cache_dtype, batch, threads, memory, max(sizes) + 96) as llm:
            settings = f"{lengths} {depths} {repeats} {seed} {text_digest(haystack)} {_chat(llm, chat)}"
            questions = items(hidden, haystack, llm.tokenizer, chat=_chat(llm, chat))
            results.append(_run(llm, questions, Judge(hidden), _log(log, name, vs, llm, "needle", settings)))
        deep, long, shares = heat_map(hidden, results[-1])
        maps.append({"model": name, "depths": deep, "lengths": long, "found": shares})
        print(f"\n{name}: share found")
        head = ("depth", *(str(length) for length in long))
        rows = [(f"{100 * d:g} %", *(f"{x:.2f}" for x in line)) for d, line in zip(deep, shares, strict=True)]
        print_table(head, rows, right=range(len(head)))
        if plot is not None:
            place = plot if vs is None else plot.with_stem(f"{plot.stem}-{len(maps)}")
            labels = [f"{100 * d:g} %" for d in deep]
            draw_heat_map(place, f"{name}: needles found", labels, [str(n) for n in long], shares, "depth|tokens")
    _conclude("needle", _names(model, vs), results, json_file, {"maps": maps})


def tasks(
    model: Model,
    file: TaskFile,
    vs: Vs = None,
    backend: Backend = "native",
    kv_cache_dtype: KvDtype = "f16",
    batch: Batch = 16,
    seed: Seed = 0,
    log: Log = None,
    threads: Threads = 0,
    memory: Memory = None,
    json_file: JsonFile = None,
) -> None:
    """Answer the questions of a JSONL file: "prompt", "expected", "match", "chat", "max_tokens", "stop"."""
    from tokenmill.evaluate.tasks import Matcher, read_text_tasks
    from tokenmill.weights.checkpoint import file_digest

    read = read_text_tasks(file)
    results = []
    for name in _names(model, vs):
        with _open(name, backend, kv_cache_dtype, batch, threads, memory) as llm:
            own_log = _log(log, name, vs, llm, "tasks", f"{file_digest(file)} {seed}")
            results.append(_run(llm, [task.item for task in read], Matcher(read), own_log, seed=seed))
    _conclude("tasks", _names(model, vs), results, json_file, {"file": str(file)})


def mcq(
    model: Model,
    file: TaskFile,
    vs: Vs = None,
    backend: Backend = "native",
    kv_cache_dtype: KvDtype = "f16",
    log: Log = None,
    threads: Threads = 0,
    memory: Memory = None,
    json_file: JsonFile = None,
) -> None:
    """Pick answers by likelihood, for a JSONL file of "question", "choices" and "answer" (an index)."""
    from tokenmill.evaluate.paired import wilson_interval
    from tokenmill.evaluate.tasks import read_choices, run_choices
    from tokenmill.weights.checkpoint import file_digest

    read = read_choices(file)
    results = []
    for name in _names(model, vs):
        with _open(name, backend, kv_cache_dtype, 1, threads, memory) as llm:
            own_log = _log(log, name, vs, llm, "mcq", file_digest(file))
            results.append(
                run_choices(llm, read, own_log, lambda r: say(f"{r.id}: {'right' if r.passed else 'wrong'}"))
            )
        by_length = wilson_interval(sum(r.passed_by_length for r in results[-1]), len(read))
        print(f"{name}: right by likelihood per character {by_length}")
    _conclude("mcq", _names(model, vs), results, json_file, {"file": str(file)})


def _names(model: str, vs: str | None) -> list[str]:
    return [model] if vs is None else [model, vs]


@contextmanager
def _open(
    name: str, backend: str, kv: str, batch: int, threads: int, memory: str | None, context: int | None = None
) -> Iterator[LLM]:
    from tokenmill.llm import LLM

    with LLM(
        name,
        backend=backend,  # type: ignore[arg-type]  # the configuration checks it
        kv_cache_dtype=kv,
        threads=threads,
        memory=memory,
        max_num_seqs=batch,
        max_model_len=context,
    ) as llm:
        yield llm


def _chat(llm: LLM, asked: bool | None) -> bool:
    return llm.tokenizer.chat_template is not None if asked is None else asked


def _log(path: Path | None, name: str, vs: str | None, llm: LLM, kind: str, settings: str) -> Any:
    from tokenmill.evaluate.result_log import ResultLog
    from tokenmill.weights.checkpoint import open_checkpoint

    if path is None:
        return ResultLog(None, {})
    if vs is not None:
        path = path.with_name(f"{path.stem}-{'b' if name == vs else 'a'}{path.suffix}")
    with open_checkpoint(llm.path) as checkpoint:
        digest = checkpoint.content_digest()
    backend, kv = llm.config.backend, llm.config.kv_cache_dtype
    return ResultLog(path, {"kind": kind, "model": digest, "settings": settings, "backend": backend, "kv": kv})


def _run(llm: LLM, items: Sequence[Item], judge: Judge, log: Any, **sampling: Any) -> list[ItemResult]:
    from tokenmill.evaluate.generation import run_items

    total = len(items) * sampling.get("samples", 1)
    done = len(log.done)

    def tell(result: ItemResult) -> None:
        nonlocal done
        done += 1
        say(f"{done}/{total} {result.key}: {'passed' if result.passed else 'failed'} {result.detail}"[:150])

    return run_items(llm, items, judge, log, on_result=tell, **sampling)


def _conclude(
    kind: str, names: Sequence[str], results: Sequence[Sequence[Any]], json_file: Path | None, more: dict[str, object]
) -> None:
    """Shares with their intervals; with two models the paired difference too."""
    from tokenmill.evaluate.paired import difference_interval, mcnemar, wilson_interval
    from tokenmill.sources import resolve

    passed = [[bool(result.passed) for result in each] for each in results]
    shares = [wilson_interval(sum(each), len(each)) for each in passed]
    print_table(
        ("model", "passed", "of", "share (95 %)"),
        [
            (name, str(sum(own)), str(len(own)), str(share))
            for name, own, share in zip(names, passed, shares, strict=True)
        ],
        right=(1, 2),
    )
    figures: dict[str, object] = {
        "model": names[0],
        **more,
        "runs": [
            {"model": name, "passed": sum(own), "items": len(own), "share": asdict(share), "results": _records(each)}
            for name, own, share, each in zip(names, passed, shares, results, strict=True)
        ],
    }
    if len(names) > 1:
        difference, split = difference_interval(*passed), mcnemar(*passed)
        print(
            f"first minus second: {difference}; only the first passed {split.only_a}, only the second {split.only_b}, "
            f"McNemar p = {split.p_value:.3g}"
        )
        figures |= {"difference": asdict(difference), "mcnemar": asdict(split)}
    write(json_file, kind, figures, resolve(names[0]))


def _records(results: Sequence[Any]) -> list[dict[str, Any]]:
    convert: Callable[[Any], dict[str, Any]] = asdict
    return [convert(result) for result in results]
