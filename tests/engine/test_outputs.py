"""Stop strings in text that comes in pieces."""

from __future__ import annotations

import random

import pytest

from tokenmill.engine.outputs import StopText


def feed(stops: tuple[str, ...], pieces: list[str], *, include: bool = False) -> tuple[str, str | None, list[str]]:
    """The whole text, the stop string found, and what each piece released."""
    stop = StopText(stops, include=include)
    released = []
    for piece in pieces:
        released.append(stop.push(piece))
        if stop.found is not None:
            return "".join(released), stop.found, released
    return "".join(released) + stop.flush(), stop.found, released


def test_text_is_cut_before_the_stop_string() -> None:
    assert feed(("END",), ["one two END three"])[:2] == ("one two ", "END")


def test_the_stop_string_is_kept_if_it_is_wanted() -> None:
    assert feed(("END",), ["one E", "N", "D two"], include=True)[:2] == ("one END", "END")


def test_a_stop_string_is_found_across_pieces() -> None:
    assert feed(("END",), ["one E", "N", "D two"])[:2] == ("one ", "END")


def test_what_may_begin_a_stop_string_is_held_back_and_released_when_it_does_not() -> None:
    assert feed(("END",), ["one E", "N", "o"]) == ("one ENo", None, ["one ", "", "ENo"])


def test_held_text_is_not_lost_at_the_end() -> None:
    assert feed(("END",), ["one EN"])[:2] == ("one EN", None)


def test_a_beginning_within_a_beginning() -> None:
    assert feed(("aab",), ["a", "a", "a", "b"])[:2] == ("a", "aab")


def test_the_earliest_of_several_stop_strings_cuts() -> None:
    assert feed(("world", "o w"), ["hello ", "world"])[:2] == ("hell", "o w")


def test_nothing_is_held_back_without_stop_strings() -> None:
    assert feed((), ["a", "b"]) == ("ab", None, ["a", "b"])


@pytest.mark.parametrize("seed", range(5))
def test_pieces_give_what_the_whole_text_gives(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(500):
        text = "".join(rng.choice("ab") for _ in range(rng.randint(0, 12)))
        stop = "".join(rng.choice("ab") for _ in range(rng.randint(1, 4)))
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 6)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        at = text.find(stop)
        expected = (text, None) if at < 0 else (text[:at], stop)
        assert feed((stop,), pieces)[:2] == expected
