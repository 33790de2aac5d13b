from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tokenizer_texts import CODE, SCRIPTS, texts
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from tokenmill.errors import ModelFileError, UnsupportedModelError
from tokenmill.tokenizer import Tokenizer, load_tokenizer

CORPUS = [*CODE, *SCRIPTS] * 3
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "__type": "AddedToken"},
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
}
NAMED = ["<unk>", "<s>", "</s>", "<pad>", "<|im_end|>"]


@dataclass(frozen=True)
class Folder:
    path: Path
    kind: str = "hf"
    metadata: dict[str, Any] = field(default_factory=dict)


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    return backend


def sentencepiece_bpe() -> Backend:
    """As in Llama 2: a space in front, U+2581 for spaces, bytes for what has no piece."""
    trained = Backend(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, limit_alphabet=60))
    state = json.loads(trained.to_str())["model"]
    pieces = [*NAMED, *(f"<0x{byte:02X}>" for byte in range(256)), *state["vocab"]]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(merge) for merge in state["merges"]]
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend


def unigram() -> Backend:
    """As SentencePiece's unigram models are converted."""
    trained = Backend(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=500, unk_token="<unk>", special_tokens=NAMED)
    )
    state = json.loads(trained.to_str())["model"]["vocab"]
    pieces = [(piece, score) for piece, score in state]
    pieces += [(f"<0x{byte:02X}>", -50.0) for byte in range(256)]
    backend = Backend(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    return backend


def write(folder: Path, backend: Backend, bos: bool = True, **config: Any) -> Folder:
    backend.add_special_tokens(NAMED)
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**CONFIG, **config}))
    return Folder(folder)


@pytest.mark.parametrize("build", [byte_level, sentencepiece_bpe, unigram])
def test_ids_and_text_equal_transformers(build: Any, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = load_tokenizer(write(tmp_path, build()))
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in texts(400, ["<s>", "<think>", "<|im_end|>"], seed=31):
        ids = reference.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.encode(text, add_special=False) == ids[1:]
        if build is byte_level:
            assert tokenizer.decode(ids, skip_special=False) == "<s>" + text
        if "�" not in (decoded := reference.decode(ids, skip_special_tokens=True)):
            assert tokenizer.decode(ids) == decoded
    messages = [{"role": "user", "content": "Hallo"}]
    assert tokenizer.apply_chat_template(messages) == reference.apply_chat_template(messages, tokenize=False)


def test_decoding_streams_for_every_decoder(tmp_path: Path) -> None:
    for build in (byte_level, sentencepiece_bpe, unigram):
        tokenizer = load_tokenizer(write(tmp_path, build()))
        for text in texts(100, ["<s>", "<think>"], seed=32):
            ids = tokenizer.encode(text)
            detokenizer = tokenizer.detokenizer()
            assert "".join([*map(detokenizer.push, ids), detokenizer.flush()]) == tokenizer.decode(ids)


def test_named_ids_and_end_tokens(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    folder = write(tmp_path, sentencepiece_bpe())
    tokenizer = load_tokenizer(Folder(folder.path, metadata={"eos_token_id": 11}))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id, tokenizer.eot_id) == (1, 2, 0, 3, 4)
    assert tokenizer.eos_ids == {2, 4, 7, 9, 11}
    assert tokenizer.special_ids == {0, 1, 2, 3, 4}
    think = tokenizer.encode("<think>", add_special=False, parse_special=False)
    assert think == [tokenizer.vocab_size - 1]  # an added token, but no control token


def test_control_tokens_are_text_unless_parsed(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, byte_level()))
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode("a</s>b", False, parse_special=False))
    assert tokenizer.eos_id in tokenizer.encode("a</s>b", False)


def test_the_config_decides_on_bos_and_eos(tmp_path: Path) -> None:
    flags = {"add_bos_token": False, "add_eos_token": True}
    tokenizer = load_tokenizer(write(tmp_path, byte_level(), bos=True, **flags))
    ids = tokenizer.encode("a")
    assert tokenizer.bos_id not in ids
    assert ids[-1] == tokenizer.eos_id


def test_chat_template_files_come_first(tmp_path: Path) -> None:
    folder = write(tmp_path, byte_level())
    (tmp_path / "chat_template.jinja").write_text("from the file{{ pad_token }}")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("for documents")
    tokenizer: Tokenizer = load_tokenizer(folder)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages) == "from the file<pad>"
    assert tokenizer.apply_chat_template(messages, chat_template="rag") == "for documents"


def test_listed_chat_templates(tmp_path: Path) -> None:
    listed = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    tokenizer = load_tokenizer(write(tmp_path, byte_level(), chat_template=listed))
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages) == "D"
    assert tokenizer.apply_chat_template(messages, tools=[{"type": "function"}]) == "T"


def test_truncation_and_padding_of_the_file_do_not_apply(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    tokenizer = load_tokenizer(write(tmp_path, backend))
    assert len(tokenizer.encode("0123456789" * 10, add_special=False)) > 4
    assert len(tokenizer.encode("a", add_special=False)) == 1


def test_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"tokenizer\.json: is missing"):
        load_tokenizer(Folder(tmp_path))
    folder = write(tmp_path, byte_level())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelFileError, match=r"tokenizer_config\.json: is not valid JSON"):
        load_tokenizer(folder)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelFileError, match=r"tokenizer\.json: is no tokenizer"):
        load_tokenizer(folder)


def test_an_unknown_decoder_is_refused_by_name(tmp_path: Path) -> None:
    backend = byte_level()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedModelError, match=r"unknown decoder.*WordPiece.*known: ByteLevel"):
        load_tokenizer(write(tmp_path, backend))
