"""20,000 random texts a model against llama.cpp and `transformers`: no difference is allowed.

    TOKENMILL_MODELS=FOLDER TOKENMILL_LLAMA_CPP_PYTHON=PYTHON pytest -m slow tests/tokenizer

``TOKENMILL_MODELS`` holds NAME.gguf files; without it the models are pulled. The references are described in
``tokenizer_references.py``.

Where the two differ, the authority is the model's own tokenizer as `transformers` runs it, because the model was
trained on its ids; ``llama_cpp_reading`` lists the three differences, and ``texts(assigned_only=True)`` keeps out
characters that the Unicode tables of one of them do not have yet. Which tokens are control tokens, though, is what the
GGUF file says: files mark more tokens so (fill-in-the-middle, unused ones) than ``tokenizer.json`` does, and
`transformers` recognises those in text even where control tokens are text. So the comparison of plain text is
llama.cpp's.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tokenizer_references import llama_cpp_reading, llama_cpp_ids, read_gguf, special_tokens, transformers_backend
from tokenizer_texts import texts

from tokenmill.tokenizer import load_tokenizer

MODELS = ["smollm2-135m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "gemma-3-270m"]
COUNT = 20_000

pytestmark = pytest.mark.slow


def model_path(name: str) -> Path:
    folder = os.environ.get("TOKENMILL_MODELS")
    if folder:
        return Path(folder, f"{name}.gguf")
    from tokenmill.sources import resolve

    return Path(resolve(name))


@pytest.mark.skipif("TOKENMILL_LLAMA_CPP_PYTHON" not in os.environ, reason="no Python with llama-cpp-python is named")
@pytest.mark.parametrize("name", MODELS)
def test_ids_equal_llama_cpp(name: str) -> None:
    file = read_gguf(model_path(name))
    tokenizer = load_tokenizer(file)
    generated = texts(COUNT, special_tokens(file.metadata), seed=MODELS.index(name), assigned_only=True)
    pairs = [(text, number % 2 == 0) for number, text in enumerate(map(llama_cpp_reading(file.metadata), generated))]
    differences = [
        (text, parse_special, ids)
        for (text, parse_special), ids in zip(pairs, llama_cpp_ids(file.path, pairs), strict=True)
        if tokenizer.encode(text, add_special=False, parse_special=parse_special) != ids
    ]
    assert differences == []


@pytest.mark.parametrize("name", MODELS)
def test_ids_and_text_equal_transformers(name: str) -> None:
    file = read_gguf(model_path(name))
    tokenizer = load_tokenizer(file)
    reference = transformers_backend(name, file.path)
    differences = []
    for text in texts(COUNT, special_tokens(file.metadata), seed=100 + MODELS.index(name)):
        ids = reference.encode(text, add_special_tokens=False).ids
        decoded = reference.decode(ids, skip_special_tokens=False)
        if (tokenizer.encode(text, add_special=False), tokenizer.decode(ids, skip_special=False)) != (ids, decoded):
            differences.append(text)
    assert differences == []
