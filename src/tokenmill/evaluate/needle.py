"""Needle in a haystack (Kamradt 2023): a fact hidden in a long text, to be found again at any length and depth."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenmill.errors import UsageError
from tokenmill.evaluate.generation import Item, ItemResult, Judgement

if TYPE_CHECKING:
    from tokenmill.tokenizer import Tokenizer

_CITIES = ("Lisbon", "Nairobi", "Quito", "Hanoi", "Tromso", "Adelaide", "Samarkand", "Halifax", "Cusco", "Bergen")
_QUESTION = "\n\nQuestion: What is the secret number of {city}? Answer with the number only.\nAnswer:"
_ROOM_FOR_TEMPLATE = 64


@dataclass(frozen=True, slots=True)
class Needle:
    """Where a fact is hidden, and what it is."""

    id: str
    length: int
    """Tokens of the whole prompt, at most; the chat template adds its own."""
    depth: float
    """0 is the text's beginning, 1 its end."""
    city: str
    number: str


def needles(lengths: Sequence[int], depths: Sequence[float], repeats: int, seed: int = 0) -> list[Needle]:
    """``repeats`` facts for each length and depth."""
    draw = random.Random(seed)
    return [
        Needle(f"{length}/{depth:g}/{n}", length, depth, draw.choice(_CITIES), str(draw.randrange(10**6, 10**7)))
        for length in lengths
        for depth in depths
        for n in range(repeats)
    ]


def items(needles: Sequence[Needle], haystack: str, tokenizer: Tokenizer, *, chat: bool) -> list[Item]:
    """Prompts of at most the needles' lengths. Raises UsageError if the haystack is too short or a length too small."""
    hay = tokenizer.encode(haystack, add_special=False, parse_special=False)
    made = []
    for needle in needles:
        fact = f" The secret number of {needle.city} is {needle.number}. "
        question = _QUESTION.format(city=needle.city)
        room = needle.length - _ROOM_FOR_TEMPLATE
        room -= sum(len(tokenizer.encode(text, add_special=False)) for text in (fact, question))
        if room < 1:
            raise UsageError(f"a length of {needle.length} tokens has no room for a fact and a question")
        if room > len(hay):
            raise UsageError(f"the haystack has {len(hay)} tokens; a length of {needle.length} needs {room}")
        at = round(needle.depth * room)
        before, after = tokenizer.decode(hay[:at]), tokenizer.decode(hay[at:room])
        made.append(Item(needle.id, before + fact + after + question, 24, ("\n",) if not chat else (), chat))
    return made


class Judge:
    """Passes an answer that holds the number."""

    def __init__(self, needles: Sequence[Needle]) -> None:
        self._numbers = {needle.id: needle.number for needle in needles}

    def __call__(self, item: Item, output: str) -> Judgement:
        """Judgement of an answer; thousands separators are forgiven."""
        number = self._numbers[item.id]
        found = number in output.replace(",", "")
        return Judgement(found, "" if found else f"expected {number}")


def heat_map(
    needles: Sequence[Needle], results: Sequence[ItemResult]
) -> tuple[list[float], list[int], list[list[float]]]:
    """Depths, lengths and the share found ``[depths][lengths]``."""
    passed: dict[tuple[float, int], list[bool]] = {}
    places = {needle.id: (needle.depth, needle.length) for needle in needles}
    for result in results:
        passed.setdefault(places[result.id], []).append(result.passed)
    depths, lengths = sorted({d for d, _ in passed}), sorted({n for _, n in passed})
    return depths, lengths, [[sum(passed[d, n]) / len(passed[d, n]) for n in lengths] for d in depths]
