"""Tokenizes with llama.cpp's vocabulary; run by the Python that has llama-cpp-python.

    python llama_cpp_worker.py MODEL.gguf < texts > ids

Each line of input is a JSON pair [text, parse_special]; each line of output the JSON list of its ids, without BOS.
"""

import json
import sys

import llama_cpp

model = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
for line in sys.stdin:
    text, parse_special = json.loads(line)
    ids = model.tokenize(text.encode(), add_bos=False, special=parse_special)
    print(json.dumps(ids), flush=False)
