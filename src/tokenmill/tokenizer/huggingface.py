"""Tokenizers from model folders in Hugging Face layout.

``tokenizer.json`` is the tokenizer; ``tokenizer_config.json``, ``special_tokens_map.json``, ``generation_config.json``
and the chat template files say what its tokens are for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from tokenmill.errors import ModelFileError, UnsupportedModelError
from tokenmill.tokenizer.chat_template import ChatTemplates
from tokenmill.tokenizer.encoder import LibraryEncoder
from tokenmill.tokenizer.end_tokens import end_tokens_by_text, turn_end_by_text
from tokenmill.tokenizer.pieces import byte_level_bytes, sentencepiece_bytes
from tokenmill.tokenizer.tokenizer import Tokenizer, TokenizerParts

_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def tokenizer_from_folder(folder: Path, config: Mapping[str, Any] | None = None) -> Tokenizer:
    """The tokenizer of the model in ``folder``; ``config`` is its ``config.json``, for its end tokens. Raises
    ``ModelFileError`` for files that are missing or broken, ``UnsupportedModelError`` for an unknown decoder."""
    path = folder / "tokenizer.json"
    backend = _backend(path)
    settings = _json(folder / "tokenizer_config.json")
    special_map = _json(folder / "special_tokens_map.json")
    generation = _json(folder / "generation_config.json")
    decoding = _Decoding(path, backend)

    named = {name: text for name in _TOKEN_NAMES if (text := _text(settings.get(name, special_map.get(name))))}
    ids = {name: backend.token_to_id(text) for name, text in named.items()}
    added = backend.get_added_tokens_decoder()
    special = {i: token.content for i, token in added.items() if token.special}
    special |= {i: named[name] for name, i in ids.items() if i is not None}
    control = {text: i for i, text in special.items()}
    extra = {name: text for name in settings if name.endswith("_token") and (text := _text(settings[name]))}

    ends = end_tokens_by_text(control) | _ids(generation.get("eos_token_id")) | _ids((config or {}).get("eos_token_id"))
    eos_id = ids.get("eos_token")
    if eos_id is not None:
        ends.add(eos_id)
    templates = _chat_templates(folder, settings)
    prefix, suffix = _surrounding(backend, settings, ids)
    return Tokenizer(
        TokenizerParts(
            encoder=LibraryEncoder(backend),
            token_bytes=decoding.token_bytes,
            vocab_size=max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
            special_ids=frozenset(special),
            prefix=prefix,
            suffix=suffix,
            bos_id=ids.get("bos_token"),
            eos_id=eos_id,
            eot_id=turn_end_by_text(control),
            pad_id=ids.get("pad_token"),
            unk_id=ids.get("unk_token"),
            eos_ids=frozenset(ends),
            leading_spaces=decoding.leading_spaces,
            chat_templates=ChatTemplates(templates, {**extra, **named}) if templates else None,
        )
    )


def _backend(path: Path) -> Backend:
    if not path.is_file():
        raise ModelFileError(path, "is missing; a model folder needs its tokenizer in the tokenizers format")
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for a file it cannot read
        raise ModelFileError(path, f"is no tokenizer the tokenizers library can read: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


class _Decoding:
    """The bytes of tokens, by the decoder that ``tokenizer.json`` names."""

    def __init__(self, path: Path, backend: Backend) -> None:
        self._backend = backend
        self._added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
        self.leading_spaces = 0
        self._spelling: Callable[[str], bytes] | None = None
        decoder = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
        for step in _steps(decoder):
            match step:
                case {"type": "ByteLevel"}:
                    self._spelling = byte_level_bytes
                case {"type": "Replace", "pattern": {"String": "▁"}, "content": " "} | {
                    "type": "ByteFallback" | "Fuse"
                }:
                    self._spelling = sentencepiece_bytes
                case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                    self.leading_spaces = start
                case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme}:
                    self._spelling = sentencepiece_bytes
                    self.leading_spaces = int(scheme != "never")
                case _:
                    raise UnsupportedModelError(
                        f"{path}: unknown decoder {step}; known: ByteLevel, Metaspace, Replace of U+2581, "
                        "ByteFallback, Fuse, Strip of leading spaces"
                    )
        if self._spelling is None:
            raise UnsupportedModelError(f"{path}: names no decoder, so the text of its tokens is not known")

    def token_bytes(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            text = added if self._spelling is byte_level_bytes else added.replace("▁", " ")
            return text.encode("utf-8", "replace")
        token = self._backend.id_to_token(token_id)
        if token is None or self._spelling is None:
            return b""
        return self._spelling(token)


def _steps(decoder: Any) -> list[Any]:
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [step for part in decoder["decoders"] for step in _steps(part)]
    return [decoder]


def _surrounding(
    backend: Backend, settings: Mapping[str, Any], ids: Mapping[str, int | None]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids before and after a text: from the flags in ``tokenizer_config.json`` if it has them, as in
    `transformers`, else from the post-processor of ``tokenizer.json``."""
    if settings.get("add_bos_token") is not None or settings.get("add_eos_token") is not None:
        sides = [
            (i,) if settings.get(f"add_{name}") and (i := ids.get(name)) is not None else ()
            for name in ("bos_token", "eos_token")
        ]
        return sides[0], sides[1]
    probe = "a"
    bare = backend.encode(probe, add_special_tokens=False).ids
    full = backend.encode(probe, add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start]), tuple(full[start + len(bare) :])
    return (), ()


def _chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Template text by name. Files of their own come before ``tokenizer_config.json``."""
    listed = settings.get("chat_template")
    if isinstance(listed, str):
        templates = {"default": listed}
    elif isinstance(listed, list):
        templates = {entry["name"]: entry["template"] for entry in listed if {"name", "template"} <= set(entry)}
    else:
        templates = {}
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    for name, path in files.items():
        if path.is_file():
            templates[name] = _read(path)
    return templates


def _text(value: Any) -> str | None:
    """A token's text; files give it bare or as a description of an added token."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _ids(value: Any) -> set[int]:
    entries = value if isinstance(value, list) else [value]
    return {entry for entry in entries if isinstance(entry, int) and not isinstance(entry, bool)}


def _json(path: Path) -> dict[str, Any]:
    """The object in ``path``; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        contents = json.loads(_read(path))
    except ValueError as error:
        raise ModelFileError(path, f"is not valid JSON: {error}") from error
    if not isinstance(contents, dict):
        raise ModelFileError(path, "holds no JSON object")
    return contents


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(path, f"cannot be read: {error}") from error
