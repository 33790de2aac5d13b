"""Writes llama.cpp's ids for random texts to golden_smollm2.jsonl, one JSON list [text, parse_special, ids] a line.

TOKENMILL_LLAMA_CPP_PYTHON=/path/to/python python tests/tokenizer/make_tokenizer_golden.py smollm2-135m.gguf
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizer_references import llama_cpp_reading, llama_cpp_ids, read_gguf, special_tokens
from tokenizer_texts import texts

GOLDEN = Path(__file__).with_name("golden_smollm2.jsonl")


def main(path: Path) -> None:
    metadata = read_gguf(path).metadata
    generated = texts(500, special_tokens(metadata), seed=2024, assigned_only=True)
    pairs = [(text, number % 4 != 0) for number, text in enumerate(map(llama_cpp_reading(metadata), generated))]
    with GOLDEN.open("w", encoding="utf-8") as file:
        for (text, parse_special), ids in zip(pairs, llama_cpp_ids(path, pairs), strict=True):
            file.write(json.dumps([text, parse_special, ids], separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
