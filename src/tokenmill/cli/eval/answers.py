"""``tokenmill eval`` humaneval, needle, mcq and tasks: answers that pass or fail."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenmill.cli.measuring import JsonFile, Plot, numbers, write
from tokenmill.cli.options import BackendName, Memory, Model, Threads
from tokenmill.cli.terminal import print_table, say

if TYPE_CHECKING:
    from tokenmill.evaluate.generation import Item, ItemResult, Judge
    from tokenmill.evaluate.result_log import ResultLog
    from tokenmill.llm import LLM

Batch = Annotated[int, typer.Option("--batch", min=1, help="Items that run at once.")]
Seed = Annotated[int, typer.Option("--seed", min=0)]
Chat = Annotated[
    bool | None,
    typer.Option("--chat/--completion", help="Ask through the chat template. Default: if the model has one."),
]
TaskFile = Annotated[Path, typer.Argument(help="A JSONL file of tasks.")]


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """Which models answer, how they are run, and where results go."""

    vs: Annotated[str | None, typer.Option("--vs", help="Another model, on the same items.")] = None
    log: Annotated[
        Path | None,
        typer.Option("--log", help="Keep prompts and outputs here (JSONL); the same command goes on where it was."),
    ] = None
    backend: BackendName = "native"
    kv_cache_dtype: Annotated[str, typer.Option("--kv-cache-dtype", help="f16, bf16 or f32.")] = "f16"
    threads: Threads = 0
    memory: Memory = None
    json_file: JsonFile = None

    def names(self, model: str) -> list[str]:
        """The one model, or both."""
        return [model] if self.vs is None else [model, self.vs]

    def opened(self, model: str, batch: int = 1, context: int | None = None) -> Iterator[tuple[str, LLM]]:
        """Each model by name, open until the next."""
        from tokenmill.cli.answer import backend_name
        from tokenmill.llm import LLM

        for name in self.names(model):
            with LLM(
                name,
                backend=backend_name(self.backend),
                kv_cache_dtype=self.kv_cache_dtype,
                threads=self.threads,
                memory=self.memory,
                max_num_seqs=batch,
                max_model_len=context,
            ) as llm:
                yield name, llm

    def result_log(self, name: str, llm: LLM, kind: str, *settings: object) -> ResultLog:
        """What was done before with the same weights, kind of items and ``settings``; two models have a log each."""
        from tokenmill.evaluate.result_log import ResultLog
        from tokenmill.weights.checkpoint import open_checkpoint

        if self.log is None:
            return ResultLog(None, {})
        path = self.log
        if self.vs is not None:
            path = path.with_stem(f"{path.stem}-{'b' if name == self.vs else 'a'}")
        with open_checkpoint(llm.path) as checkpoint:
            digest = checkpoint.content_digest()
        identity = {"kind": kind, "model": digest, "settings": " ".join(map(str, settings))}
        return ResultLog(path, identity | {"backend": llm.config.backend, "kv": llm.config.kv_cache_dtype})


def humaneval(
    model: Model,
    *,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Answers a problem; more than 1 are sampled.")] = 1,
    k: Annotated[str, typer.Option("--k", help="pass@k to report: 1,10.")] = "1",
    temperature: Annotated[float, typer.Option("--temperature", help="Of sampled answers.")] = 0.8,
    problems: Annotated[int, typer.Option("--problems", min=1, help="The first so many of the 164.")] = 164,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1)] = 512,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="What a program may take.")] = 3.0,
    chat: Chat = None,
    batch: Batch = 16,
    seed: Seed = 0,
    how: AnswerOptions,
) -> None:
    """Complete HumanEval's functions and run their tests, each in a sandbox; pass@1 greedy, or pass@k sampled."""
    from tokenmill.errors import UsageError
    from tokenmill.evaluate.humaneval import Grader, items, mean_pass_at_k, read_problems

    wanted = numbers("--k", k, 1)
    if max(wanted) > samples:
        raise UsageError(f"--k {k} needs --samples {max(wanted)} or more")
    chosen = read_problems()[:problems]
    used = 0.0 if samples == 1 else temperature
    results = []
    for name, llm in how.opened(model, batch):
        style = _chat(llm, chat)
        log = how.result_log(name, llm, "humaneval", samples, used, seed, max_tokens, style, problems, seconds)
        asked = items(chosen, chat=style, max_tokens=max_tokens)
        grader = Grader(chosen, seconds)
        results.append(_run(llm, asked, grader, log, samples=samples, temperature=used, seed=seed))
        for number in wanted:
            print(f"{name}: pass@{number} {100 * mean_pass_at_k(results[-1], number):.1f} %, {len(chosen)} problems")
    _conclude("humaneval", how.names(model), results, how.json_file, {"k": wanted, "samples": samples})


def needle(
    model: Model,
    *,
    lengths: Annotated[str, typer.Option("--lengths", help="Tokens of the prompt: 512,1024,2048.")] = "512,1024,2048",
    depths: Annotated[
        str, typer.Option("--depths", help="Per cent of the text before the fact: 0,50,100.")
    ] = "0,25,50,75,100",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Facts for each length and depth.")] = 2,
    text: Annotated[str, typer.Option("--text", help="The haystack: a file or corpus:KIND.")] = "corpus:prose",
    chat: Chat = None,
    batch: Batch = 1,
    seed: Seed = 0,
    how: AnswerOptions,
    plot: Plot = None,
) -> None:
    """Hide a fact in a long text and ask for it, at several lengths and depths: a heat map."""
    from tokenmill.bench.plot import check_ending, draw_needles
    from tokenmill.evaluate.needle import Judge, heat_map, items, needles
    from tokenmill.evaluate.text import read_texts, text_digest

    check_ending(plot)
    sizes = numbers("--lengths", lengths, 1)
    hidden = needles(sizes, [d / 100 for d in numbers("--depths", depths, 0)], repeats, seed)
    haystack = read_texts([text], 8 * max(sizes) + 20_000)
    results, maps = [], []
    for name, llm in how.opened(model, batch, max(sizes) + 96):
        style = _chat(llm, chat)
        log = how.result_log(name, llm, "needle", lengths, depths, repeats, seed, text_digest(haystack), style)
        results.append(_run(llm, items(hidden, haystack, llm.tokenizer, chat=style), Judge(hidden), log))
        deep, long, shares = heat_map(hidden, results[-1])
        maps.append({"model": name, "depths": deep, "lengths": long, "found": shares})
        print(f"\n{name}: share found")
        head = ("depth", *(str(length) for length in long))
        rows = [(f"{100 * d:g} %", *(f"{x:.2f}" for x in line)) for d, line in zip(deep, shares, strict=True)]
        print_table(head, rows, right=range(len(head)))
    figures: dict[str, object] = {"repeats": repeats, "maps": maps}
    _conclude("needle", how.names(model), results, how.json_file, figures)
    if plot is not None:
        draw_needles(plot, figures)


def tasks(model: Model, file: TaskFile, *, batch: Batch = 16, seed: Seed = 0, how: AnswerOptions) -> None:
    """Answer the questions of a JSONL file: "prompt", "expected", "match", "chat", "max_tokens", "stop"."""
    from tokenmill.evaluate.tasks import Matcher, read_text_tasks
    from tokenmill.weights.checkpoint import file_digest

    read = read_text_tasks(file)
    results = []
    for name, llm in how.opened(model, batch):
        log = how.result_log(name, llm, "tasks", file_digest(file), seed)
        results.append(_run(llm, [task.item for task in read], Matcher(read), log, seed=seed))
    _conclude("tasks", how.names(model), results, how.json_file, {"file": str(file)})


def mcq(model: Model, file: TaskFile, *, how: AnswerOptions) -> None:
    """Pick answers by likelihood, for a JSONL file of "question", "choices" and "answer" (an index)."""
    from tokenmill.evaluate.paired import wilson_interval
    from tokenmill.evaluate.tasks import read_choices, run_choices
    from tokenmill.weights.checkpoint import file_digest

    read = read_choices(file)
    results = []
    for name, llm in how.opened(model):
        log = how.result_log(name, llm, "mcq", file_digest(file))
        results.append(run_choices(llm, read, log, lambda r: say(f"{r.id}: {'right' if r.passed else 'wrong'}")))
        by_length = wilson_interval(sum(r.passed_by_length for r in results[-1]), len(read))
        print(f"{name}: right by likelihood per character {by_length}")
    _conclude("mcq", how.names(model), results, how.json_file, {"file": str(file)})


def _chat(llm: LLM, asked: bool | None) -> bool:
    return llm.tokenizer.chat_template is not None if asked is None else asked


def _run(llm: LLM, items: Sequence[Item], judge: Judge, log: ResultLog, **sampling: Any) -> list[ItemResult]:
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
            {
                "model": name,
                "passed": sum(own),
                "items": len(own),
                "share": asdict(share),
                "results": [asdict(result) for result in each],
            }
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
