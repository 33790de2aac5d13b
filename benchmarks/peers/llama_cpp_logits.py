"""Logits of llama.cpp at every position of given token windows, written to a file of float32.

Runs in the peer's own virtual environment (llama-cpp-python, numpy):
    python llama_cpp_logits.py MODEL.gguf WINDOWS.json OUT.f32 THREADS
OUT holds [windows * tokens, vocabulary].
"""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def main() -> None:
    model, windows_file, out_file, threads = sys.argv[1:5]
    windows = json.loads(Path(windows_file).read_text())
    length = max(map(len, windows))
    llm = llama_cpp.Llama(
        model,
        n_ctx=length,
        n_batch=512,
        n_threads=int(threads),
        n_threads_batch=int(threads),
        logits_all=True,
        flash_attn=True,
        verbose=False,
    )
    with open(out_file, "wb") as out:
        for tokens in windows:
            llm.reset()
            llm.eval(tokens)
            np.ascontiguousarray(llm.scores[: len(tokens)], dtype=np.float32).tofile(out)
    print(json.dumps({"version": llama_cpp.__version__, "system": llama_cpp.llama_print_system_info().decode()}))


main()
