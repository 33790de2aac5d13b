"""Items that a model answers with text, and a judge that passes or fails each answer.

Prompts and outputs are kept in the log for reading. An item that cannot be run (too long for the context, say) fails
with its reason, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tokenmill.errors import TokenmillError
from tokenmill.evaluate.result_log import ResultLog
from tokenmill.sampling import SamplingParams

if TYPE_CHECKING:
    from tokenmill.llm import LLM

SHOWN_CHARACTERS = 4000


@dataclass(frozen=True, slots=True)
class Item:
    """One question. A ``chat`` item's prompt is the user's message, put through the model's template."""

    id: str
    prompt: str
    max_tokens: int
    stop: tuple[str, ...] = ()
    chat: bool = False


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whether an answer passes, and why not."""

    passed: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ItemResult:
    """One answer, judged. ``prompt`` is cut in the middle if it is very long."""

    id: str
    sample: int
    prompt: str
    output: str
    passed: bool
    detail: str

    @property
    def key(self) -> str:
        return f"{self.id}#{self.sample}"


Judge = Callable[[Item, str], Judgement]


def run_items(
    llm: LLM,
    items: Sequence[Item],
    judge: Judge,
    log: ResultLog,
    *,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_result: Callable[[ItemResult], None] = lambda _: None,
) -> list[ItemResult]:
    """Answers and judges every item ``samples`` times, those in ``log`` excepted; results in the items' order.

    Samples of an item differ by their seeds, which follow from ``seed``: the same call gives the same answers.
    """
    wanted = [(item, sample) for item in items for sample in range(samples)]
    todo = [pair for pair in wanted if f"{pair[0].id}#{pair[1]}" not in log.done]
    for batch in _batches(todo, llm.config.max_num_seqs):
        prompts = [_prompt(llm, item) for item, _ in batch]
        params = [
            SamplingParams(
                max_tokens=item.max_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed + sample,
                stop=item.stop,
            )
            for item, sample in batch
        ]
        for (item, sample), output in zip(batch, _answers(llm, prompts, params), strict=True):
            if isinstance(output, TokenmillError):
                judgement, text = Judgement(False, f"was not run: {output}"), ""
            else:
                judgement, text = judge(item, output), output
            result = ItemResult(item.id, sample, _shown(item.prompt), text, judgement.passed, judgement.detail)
            log.add(result.key, asdict(result))
            on_result(result)
    return [ItemResult(**log.done[f"{item.id}#{sample}"]) for item, sample in wanted]


def _answers(llm: LLM, prompts: list[Any], params: list[SamplingParams]) -> list[str | TokenmillError]:
    """All together; if one of them makes the batch fail, each by itself."""
    try:
        return [output.text for output in llm.generate(prompts, params)]
    except TokenmillError as error:
        if len(prompts) == 1:
            return [error]
    return [_answers(llm, [prompt], [own])[0] for prompt, own in zip(prompts, params, strict=True)]


def _prompt(llm: LLM, item: Item) -> list[int]:
    if item.chat:
        return llm.tokenizer.encode_chat([{"role": "user", "content": item.prompt}], add_generation_prompt=True)
    return llm.tokenize(item.prompt)


def _batches(pairs: Sequence[tuple[Item, int]], size: int) -> Iterator[Sequence[tuple[Item, int]]]:
    for begin in range(0, len(pairs), size):
        yield pairs[begin : begin + size]


def _shown(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}"
