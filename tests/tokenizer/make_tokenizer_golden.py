"""Writes llama.cpp's ids for random texts to golden_smollm2.jsonl, one JSON list [text, parse_special, ids] a line.

TOKENMILL_LLAMA_CPP_PYTHON=/path/to/python python tests/tokenizer/make_tokenizer_golden.py smollm2-135m.gguf
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizer_references import as_llama_cpp_reads, llama_cpp_ids, read_gguf, special_tokens
from tokenizer_texts import texts

GOLDEN = Path(__file__).with_name("golden_smollm2.jsonl")


def main(path: Path) -> None:
    metadata = read_gguf(path).metadata
    generated = texts(500, special_tokens(metadata), seed=2024, assigned_only=True)
    pairs = [
        (as_llama_cpp_reads(text, metadata), parse_special)
        for number, text in enumerate(generated)
        for parse_special in (number % 4 != 0,)
    ]
    with GOLDEN.open("w", encoding="utf-8") as file:
        for (text, parse_special), ids in zip(pairs, llama_cpp_ids(path, pairs), strict=True):
            file.write(json.dumps([text, parse_special, ids], separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
