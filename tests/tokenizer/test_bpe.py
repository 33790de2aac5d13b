"""The native model against the `tokenizers` library's on random vocabularies."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from tokenmill.tokenizer.encoder import BpeEncoder, LibraryEncoder
from tokenmill.tokenizer.vocabulary import Vocabulary

ALPHABET = ["a", "b", "c", "é", "日", "🙂", "▁"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def random_merges(source: random.Random) -> tuple[list[str], list[tuple[str, str]]]:
    """A vocabulary without the last two letters of the alphabet, and merges in an order that is not that of length."""
    tokens, merges = list(ALPHABET[:-2]), []
    for _ in range(40):
        left, right = source.choices(tokens, k=2)
        if left + right not in tokens and len(left + right) < 9:
            tokens.append(left + right)
            merges.append((left, right))
    source.shuffle(merges)
    return tokens, merges


def vocabulary_of(tokens: list[str], merges: list[tuple[str, str]]) -> Vocabulary:
    pairs = np.array([[tokens.index(left), tokens.index(right)] for left, right in merges], np.int32).reshape(-1, 2)
    return Vocabulary.build(tokens, [1] * len(tokens), [True] * len(tokens), pairs)


@pytest.mark.parametrize("mode", ["drop", "unknown", "bytes", "ignore_merges"])
def test_ids_equal_the_library(mode: str) -> None:
    source = random.Random(11)
    differing = 0
    for _ in range(30):
        tokens, merges = random_merges(source)
        tokens += ["<unk>", *(BYTES if mode == "bytes" else [])]
        unknown = tokens.index("<unk>") if mode in ("unknown", "bytes") else None
        library = Library(
            models.BPE(
                {token: i for i, token in enumerate(tokens)},
                merges,
                unk_token=None if unknown is None else "<unk>",
                fuse_unk=True,
                byte_fallback=mode == "bytes",
                ignore_merges=mode == "ignore_merges",
            )
        )
        bpe = vocabulary_of(tokens, merges).bpe(
            ignore_merges=mode == "ignore_merges", byte_fallback=mode == "bytes", unknown=unknown
        )
        for _ in range(100):
            text = "".join(source.choices(ALPHABET, k=source.randint(1, 24)))
            if source.random() < 0.2:
                text = source.choice(tokens[:20])
            expected = library.encode(text).ids
            assert bpe.encode([text]) == expected, (text, merges)
            differing += len(expected) < len(text)
    assert differing > 100  # merges did apply


def test_added_tokens_normalizing_and_cutting_equal_the_library() -> None:
    source = random.Random(5)
    tokens, merges = random_merges(source)
    tokens += ["<s>", "<s>a", "ab b"]
    added = {
        AddedToken("<s>", normalized=False, special=True, rstrip=True): len(tokens) - 3,
        AddedToken("<s>a", normalized=False, special=True): len(tokens) - 2,
        AddedToken("ab b", normalized=False, special=False): len(tokens) - 1,
    }
    library = Library(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    library.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Prepend("a")])
    library.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    library.add_tokens(list(added))
    reference = LibraryEncoder(library)
    encoder = BpeEncoder(vocabulary_of(tokens, merges).bpe(), library.normalizer, library.pre_tokenizer, added)
    for _ in range(500):
        text = "".join(source.choices(["a", "b", " ", "e\u0301", "<s>", "ab b", "日", "  "], k=source.randint(0, 12)))
        for parse_special in (True, False):
            assert encoder.encode(text, parse_special) == reference.encode(text, parse_special), text


def test_merges_of_a_long_text_take_time_in_proportion_to_it() -> None:
    tokens = ["a" * (1 << i) for i in range(12)]
    bpe = vocabulary_of(tokens, [(a, a) for a in tokens[:-1]]).bpe()
    assert bpe.encode(["a" * 1_000_000]) == [11] * 488 + [9, 6]


def test_tables_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="merge 0 joins to a text that is no token"):
        vocabulary_of(["a", "b"], [("a", "b")])
    tables = [np.array(values, np.uint32) for values in ([0, 1, 9], [1, 2], [])]
    text = np.frombuffer(b"ab", np.uint8)
    with pytest.raises(ValueError, match="sizes that do not fit"):
        Vocabulary(np.zeros(7, np.uint8), tables[0], text, tables[1], tables[2])
    damaged = Vocabulary(np.ones(2, np.uint8), tables[0], text, tables[1], tables[2])
    with pytest.raises(IndexError, match="no token 1"):
        damaged.find("b")
