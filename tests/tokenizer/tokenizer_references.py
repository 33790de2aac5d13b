"""The tokenizers that ours is compared with, run where they are.

* llama.cpp, through llama-cpp-python in the Python that ``TOKENMILL_LLAMA_CPP_PYTHON`` names;
* `transformers`: on ``$TOKENMILL_TEST_TOKENIZERS/NAME/tokenizer.json`` if the model's own file is there, else on its
  conversion of the GGUF file.
"""

from __future__ import annotations

import json
import os
import subprocess
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers

from tokenmill.tokenizer.pieces import byte_level_alphabet
from tokenmill.weights.checkpoint import open_checkpoint

WORKER = Path(__file__).with_name("llama_cpp_worker.py")


@dataclass(frozen=True)
class GgufFile:
    """What ``load_tokenizer`` reads of a checkpoint, without the rest."""

    path: Path
    metadata: Mapping[str, Any]
    kind: str = "gguf"


def read_gguf(path: Path) -> GgufFile:
    with open_checkpoint(path) as checkpoint:
        return GgufFile(path, dict(checkpoint.metadata))


def special_tokens(metadata: Mapping[str, Any]) -> list[str]:
    """Control and user-defined tokens, the first forty."""
    types = metadata["tokenizer.ggml.token_type"]
    return [token for token, kind in zip(metadata["tokenizer.ggml.tokens"], types, strict=True) if kind in (3, 4)][:40]


def llama_cpp_ids(path: Path, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
    """llama.cpp's ids, without BOS, for pairs of a text and whether control tokens in it are parsed."""
    lines = "\n".join(json.dumps(pair) for pair in texts)
    command = [os.environ["TOKENMILL_LLAMA_CPP_PYTHON"], str(WORKER), str(path)]
    output = subprocess.run(command, input=lines, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in output.splitlines()]


def llama_cpp_reading(metadata: Mapping[str, Any]) -> Callable[[str], str]:
    """Takes from a text what llama.cpp does otherwise than the model's own tokenizer, which is the authority:

    * it does not normalize: Qwen's tokenizer brings text to NFC first;
    * it takes runs of U+2581 in a text for single marks: to Gemma's tokenizer they are runs of spaces;
    * it keeps characters apart that the vocabulary cannot spell (SmolLM2's lacks 21 of the 256 bytes) before it drops
      them: the `tokenizers` library drops them first and merges across.
    """
    if metadata["tokenizer.ggml.model"] == "llama":
        return lambda text: text.replace("▁", "_")
    if metadata["tokenizer.ggml.pre"] == "qwen2":
        return partial(unicodedata.normalize, "NFC")
    known = set(metadata["tokenizer.ggml.tokens"])
    missing = {byte for character, byte in byte_level_alphabet().items() if character not in known}
    return lambda text: "".join(character for character in text if missing.isdisjoint(character.encode()))


def transformers_backend(name: str, path: Path) -> tokenizers.Tokenizer:
    """The `tokenizers` tokenizer that `transformers` runs for a model."""
    folder = os.environ.get("TOKENMILL_TEST_TOKENIZERS")
    if folder and (own := Path(folder, name, "tokenizer.json")).is_file():
        return tokenizers.Tokenizer.from_file(str(own))
    from transformers import AutoTokenizer

    backend = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer
    # A GGUF file does not carry these rules of the models' tokenizer.json, and the conversion does not know them.
    if name.startswith("smollm2"):
        digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
        gpt2 = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, gpt2])
    if name.startswith("qwen2.5"):
        backend.normalizer = tokenizers.normalizers.NFC()
    return backend
