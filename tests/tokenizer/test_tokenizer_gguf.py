from __future__ import annotations

import itertools
import json
import logging
import os
import random
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from make_tokenizer_golden import GOLDEN
from tokenizer_references import GgufFile, special_tokens
from tokenizer_texts import texts

from tokenmill.errors import ModelFileError, UnsupportedModelError
from tokenmill.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from tokenmill.tokenizer.vocabulary import Vocabulary


def load(metadata: dict[str, Any], cache_dir: Path | None = None) -> Tokenizer:
    return load_tokenizer(GgufFile(Path("model.gguf"), metadata), cache_dir)


def test_ids_equal_llama_cpp_on_random_texts(smollm2: Tokenizer) -> None:
    golden = [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]
    assert len(golden) == 500
    differences = [
        (text, parse_special)
        for text, parse_special, ids in golden
        if smollm2.encode(text, add_special=False, parse_special=parse_special) != ids
    ]
    assert differences == []


def test_decoding_every_token_keeps_few_of_them(smollm2_file: GgufFile) -> None:
    """Or a server grows for days: each text brings tokens that none had before."""
    tokenizer = load(smollm2_file.metadata)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for token_id in range(tokenizer.vocab_size):
        tokenizer.decode([token_id])
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 1_500_000  # all 49,152 take four times that


def test_the_pre_tokenizer_decides_the_ids(smollm2_file: GgufFile, smollm2: Tokenizer) -> None:
    """The negative control of the golden test: another pre-tokenizer on the same merges gives other ids."""
    other = load({**smollm2_file.metadata, "tokenizer.ggml.pre": "gpt-2"})
    golden = [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]
    assert any(other.encode(text, False, parse_special) != ids for text, parse_special, ids in golden)


def test_text_survives_a_round_trip(smollm2_file: GgufFile, smollm2: Tokenizer) -> None:
    special = special_tokens(smollm2_file.metadata)
    missing = {data for data in range(256) if not smollm2.encode(chr(data), False) and data < 128}
    for text in texts(500, special, seed=5, assigned_only=True):
        clean = "".join(c for c in text if ord(c) not in missing and ord(c) < 0x40000)
        assert smollm2.decode(smollm2.encode(clean), skip_special=False) == clean


def test_special_token_ids(smollm2: Tokenizer) -> None:
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.eot_id, smollm2.pad_id) == (1, 2, 2, 2)
    assert smollm2.eos_ids == {0, 2}  # <|endoftext|> of the base model as well as <|im_end|>
    assert smollm2.vocab_size == 49152
    assert smollm2.encode("") == []


def test_control_tokens_are_text_unless_parsed(smollm2: Tokenizer) -> None:
    text = "a<|im_end|>b"
    assert 2 in smollm2.encode(text)
    plain = smollm2.encode(text, parse_special=False)
    assert smollm2.special_ids.isdisjoint(plain)
    assert smollm2.decode(plain) == text
    assert smollm2.decode(smollm2.encode(text)) == "ab"


def test_unpaired_surrogates_are_refused_by_place(smollm2: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"U\+D83D at character 3"):
        smollm2.encode("abc\ud83d!")


def test_threads_share_one_tokenizer(smollm2_file: GgufFile, smollm2: Tokenizer) -> None:
    """Half of the threads parse control tokens and half do not; a shared switch would mix them up."""
    samples = list(texts(150, special_tokens(smollm2_file.metadata), seed=9))
    expected = {flag: [smollm2.encode(text, False, flag) for text in samples] for flag in (True, False)}
    results: dict[int, list[list[int]]] = {}

    def work(number: int) -> None:
        results[number] = [smollm2.encode(text, False, number % 2 == 0) for text in samples]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[number] == expected[number % 2 == 0] for number in range(8))


def sentencepiece(text: str, pieces: dict[str, float]) -> list[str]:
    """SentencePiece's BPE, word for word: join the best-scored pair, the leftmost of equals, until there is none."""
    symbols = list(text)
    while True:
        pairs = [(-pieces[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in pieces]
        if not pairs:
            return symbols
        i = min(pairs)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


def test_merges_from_scores_are_sentencepiece(llama: Tokenizer, llama_metadata: dict[str, Any]) -> None:
    tokens, scores = llama_metadata["tokenizer.ggml.tokens"], llama_metadata["tokenizer.ggml.scores"]
    pieces = dict(zip(tokens[259:], scores[259:], strict=True))
    source = random.Random(3)
    for _ in range(2000):
        text = "".join(
            source.choices(["t", "h", "e", "a", "s", "o", " ", "<", "/", ">", "é", "日"], k=source.randint(1, 20))
        )
        ids = llama.encode(text, add_special=False, parse_special=False)
        assert [tokens[i] for i in ids] == sentencepiece("▁" + text.replace(" ", "▁"), pieces), text


def test_text_of_a_control_token_does_not_merge_into_it(llama: Tokenizer) -> None:
    """The vocabulary has "</" and "s>", so a merge on text alone would arrive at the end-of-sequence token."""
    ids = llama.encode("</s>", add_special=False, parse_special=False)
    assert 2 not in ids
    assert llama.decode(ids) == "</s>"
    assert llama.encode("</s>", add_special=False) == [2]


def test_text_of_a_byte_token_is_text(llama: Tokenizer) -> None:
    ids = llama.encode("<0x41>", add_special=False)
    assert llama.decode(ids) == "<0x41>"


def test_bytes_stand_in_for_unknown_characters(llama: Tokenizer) -> None:
    ids = llama.encode("🙂", add_special=False)
    assert [llama.token_bytes(i) for i in ids] == [b" ", b"\xf0", b"\x9f", b"\x99", b"\x82"]
    assert llama.decode(ids) == "🙂"


def test_the_prefix_space_comes_and_goes(llama: Tokenizer, llama_metadata: dict[str, Any]) -> None:
    assert llama.encode("the") == [1, llama_metadata["tokenizer.ggml.tokens"].index("▁the")]
    for text in ("the", " the", "  the", "", " "):
        assert llama.decode(llama.encode(text)) == text
    bare = load({**llama_metadata, "tokenizer.ggml.add_space_prefix": False})
    assert bare.decode(bare.encode("the")) == "the"
    assert bare.encode("the") != llama.encode("the")


def test_bos_and_eos_are_added_as_the_file_says(llama: Tokenizer, llama_metadata: dict[str, Any]) -> None:
    assert llama.encode("a")[0] == 1  # SentencePiece vocabularies default to it
    flags = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    ids = load({**llama_metadata, **flags}).encode("a")
    assert ids[0] != 1
    assert ids[-1] == 2


def test_phi3_swallows_white_space_after_control_tokens(llama_metadata: dict[str, Any]) -> None:
    phi3, text = load({**llama_metadata, "general.architecture": "phi3"}), "</s> \n the<s> the"
    assert phi3.encode(text, False) == load(llama_metadata).encode("</s>the<s> the", False)


def test_padding_of_the_vocabulary_is_no_text(llama_metadata: dict[str, Any]) -> None:
    metadata = {
        **llama_metadata,
        "tokenizer.ggml.tokens": [*llama_metadata["tokenizer.ggml.tokens"], "to</s"],
        "tokenizer.ggml.scores": [*llama_metadata["tokenizer.ggml.scores"], 9.0],
        "tokenizer.ggml.token_type": [*llama_metadata["tokenizer.ggml.token_type"], 5],
    }
    tokenizer = load(metadata)
    padding = tokenizer.vocab_size - 1
    assert tokenizer.token_bytes(padding) == b""
    assert tokenizer.token_bytes(padding + 1000) == b""
    assert padding not in tokenizer.encode("to</s", parse_special=False)
    with pytest.raises(TokenizerError, match="-1 is negative"):
        tokenizer.token_bytes(-1)


def test_end_tokens_come_from_metadata_and_text(llama_metadata: dict[str, Any]) -> None:
    tokens = [*llama_metadata["tokenizer.ggml.tokens"], "<end_of_turn>", "<custom>", "<|im_end|>"]
    metadata = {
        **llama_metadata,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [*llama_metadata["tokenizer.ggml.scores"], 0.0, 0.0, 0.0],
        "tokenizer.ggml.token_type": [*llama_metadata["tokenizer.ggml.token_type"], 3, 3, 1],  # the last is plain text
        "tokenizer.ggml.eom_token_id": len(tokens) - 2,
    }
    assert load(metadata).eos_ids == {2, len(tokens) - 3, len(tokens) - 2}


def test_the_tables_are_kept_whole(llama_metadata: dict[str, Any], tmp_path: Path) -> None:
    text = "that </s> the  toast 日🙂"
    expected = load(llama_metadata).encode(text)
    assert load(llama_metadata, tmp_path).encode(text) == expected
    (kept,) = tmp_path.iterdir()  # and no temporary file
    written = kept.read_bytes()
    assert load(llama_metadata, tmp_path).encode(text) == expected
    flipped = bytes([*written[:200], written[200] ^ 1, *written[201:]])
    for broken in (b"", written[:-8], b"\x00" * len(written), flipped):
        kept.write_bytes(broken)
        os.utime(kept, ns=(1, 1))
        assert load(llama_metadata, tmp_path).encode(text) == expected
        assert Vocabulary.read(tmp_path) is not None  # made again
        assert kept.read_bytes()[128:] == written[128:]


def test_kept_tables_spare_reading_the_arrays(llama_metadata: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = load(llama_metadata, tmp_path)
    arrays = {f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type")}
    again = load({key: value for key, value in llama_metadata.items() if key not in arrays}, tmp_path)
    ids = again.encode("that </s> the  toast")
    assert ids == tokenizer.encode("that </s> the  toast")
    assert again.decode(ids) == tokenizer.decode(ids)
    assert [again.token_bytes(i) for i in range(again.vocab_size)] == [
        tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)
    ]
    assert (again.eos_ids, again.special_ids, again.bos_id) == (
        tokenizer.eos_ids,
        tokenizer.special_ids,
        tokenizer.bos_id,
    )


def test_a_cache_that_cannot_be_written_is_a_warning(
    llama_metadata: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with caplog.at_level(logging.WARNING):
        assert load(llama_metadata, blocked / "cache").encode("the") == load(llama_metadata).encode("the")
    assert "cannot be kept" in caplog.text


def test_unknown_kinds_are_refused_by_name(llama_metadata: dict[str, Any], smollm2_file: GgufFile) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'t5'.*known tokenizer models: gpt2, llama"):
        load({**llama_metadata, "tokenizer.ggml.model": "t5"})
    with pytest.raises(UnsupportedModelError, match=r"'viking'.*known pre-tokenizers: default, gpt-2"):
        load({**smollm2_file.metadata, "tokenizer.ggml.pre": "viking"})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", None, "model is missing"),
        ("tokens", None, "tokens is missing"),
        ("tokens", [], "tokens is empty"),
        ("tokens", 7, "tokens is no array but int"),
        ("tokens", [1, 2], "tokens has entries of another type"),
        ("scores", None, "scores is missing"),
        ("scores", [0.0], "scores has 1 entries for"),
        ("token_type", [1], "token_type has 1 entries for"),
        ("token_type", [9] * 284, "token_type has types outside 1..6"),
        ("model", ["llama"], "model is no string but list"),
        ("bos_token_id", 99999, "bos_token_id is 99999, outside the vocabulary"),
        ("eos_token_id", -1, "eos_token_id is -1, outside the vocabulary"),
    ],
)
def test_broken_metadata_is_named(llama_metadata: dict[str, Any], key: str, value: Any, message: str) -> None:
    broken = {**llama_metadata, f"tokenizer.ggml.{key}": value}
    if value is None:
        del broken[f"tokenizer.ggml.{key}"]
    with pytest.raises(ModelFileError, match=message) as caught:
        load(broken)
    assert "model.gguf" in str(caught.value)


@pytest.mark.parametrize(
    ("merges", "message"),
    [(["ab"], "entry without a space: 'ab'"), (["a zzzzqqq"], "does not fit the vocabulary"), (None, "is missing")],
)
def test_broken_merges_are_named(smollm2_file: GgufFile, merges: list[str] | None, message: str) -> None:
    broken = {**smollm2_file.metadata, "tokenizer.ggml.merges": merges}
    with pytest.raises(ModelFileError, match=message):
        load(broken)
