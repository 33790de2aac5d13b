from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_references import GgufFile, special_tokens
from tokenizer_texts import texts

from tokenmill.tokenizer import Tokenizer
from tokenmill.tokenizer.detokenizer import IncrementalDetokenizer

ANY_ID = st.one_of(st.integers(0, 400), st.integers(0, 49151))
FIXTURES = [HealthCheck.function_scoped_fixture]


def streamed(tokenizer: Tokenizer, ids: list[int], skip_special: bool = True) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip_special)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(ANY_ID, max_size=40), skip_special=st.booleans())
def test_pieces_join_to_the_batch_decode(smollm2: Tokenizer, ids: list[int], skip_special: bool) -> None:
    assert "".join(streamed(smollm2, ids, skip_special)) == smollm2.decode(ids, skip_special)


@settings(max_examples=300, deadline=None, suppress_health_check=FIXTURES)
@given(ids=st.lists(st.integers(0, 283), max_size=40), skip_special=st.booleans())
def test_pieces_join_with_byte_tokens_and_prefix_space(llama: Tokenizer, ids: list[int], skip_special: bool) -> None:
    assert "".join(streamed(llama, ids, skip_special)) == llama.decode(ids, skip_special)


def test_no_piece_ends_in_half_a_character(smollm2_file: GgufFile, smollm2: Tokenizer) -> None:
    """Texts without U+FFFD: a piece with one would have given a character away too early."""
    held_back = 0
    for text in texts(300, special_tokens(smollm2_file.metadata), seed=12, assigned_only=True):
        ids = smollm2.encode(text, parse_special=False)
        pieces = streamed(smollm2, ids)
        whole = smollm2.decode(ids)
        if "�" not in whole:
            assert not any("�" in piece for piece in pieces)
            held_back += pieces.count("")
    assert held_back > 1000  # characters of several tokens did occur


def test_invalid_bytes_become_one_replacement_for_each_part() -> None:
    pieces = [b"\xf0\x9f", b"a", b"\xff", b"\xe2\x82", b"\xac", b"\xe2"]
    detokenizer = IncrementalDetokenizer(pieces.__getitem__, frozenset(), 0)
    assert [detokenizer.push(i) for i in range(len(pieces))] == ["", "�a", "�", "", "€", ""]
    assert detokenizer.flush() == "�"


def test_one_leading_space_is_taken_off_once() -> None:
    pieces = [b"", b"  a", b" b"]
    detokenizer = IncrementalDetokenizer(pieces.__getitem__, frozenset(), 1)
    assert [detokenizer.push(i) for i in (0, 1, 2)] == ["", " a", " b"]


def test_a_continuation_keeps_its_leading_space(llama: Tokenizer) -> None:
    the = llama.encode("the", add_special=False)
    fresh, continued = llama.detokenizer(), llama.detokenizer(continues=True)
    assert [fresh.push(i) for i in the] == ["the"]
    assert [continued.push(i) for i in the] == [" the"]


def test_skipped_tokens_do_not_end_a_character(smollm2: Tokenizer) -> None:
    start, *rest = smollm2.encode("𝔘", add_special=False)
    assert rest
    assert "".join(streamed(smollm2, [start, 2, *rest])) == "𝔘"
    assert "".join(streamed(smollm2, [start, 2, *rest], skip_special=False)).startswith("�<|im_end|>")
