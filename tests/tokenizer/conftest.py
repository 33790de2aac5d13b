from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizer_references import GgufFile, read_gguf

from tokenmill.tokenizer import Tokenizer, load_tokenizer

LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="session")
def smollm2_file(smollm2_path: Path) -> GgufFile:
    return read_gguf(smollm2_path)


@pytest.fixture(scope="session")
def smollm2(smollm2_file: GgufFile) -> Tokenizer:
    return load_tokenizer(smollm2_file)


@pytest.fixture
def llama_metadata() -> dict[str, Any]:
    """A small SentencePiece vocabulary in the way of Llama 2."""
    pieces = ["▁", "e", "t", "a", "o", "h", "s", "/", "<", ">", "é", "日", "▁t", "he", "▁the", "at", "▁a", "▁▁"]
    pieces += ["</", "s>", "</s", "to", "hat", "▁that", "▁▁▁▁"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": LLAMA_TEMPLATE,
    }


@pytest.fixture
def llama(llama_metadata: dict[str, Any]) -> Tokenizer:
    return load_tokenizer(GgufFile(Path("llama.gguf"), llama_metadata))
