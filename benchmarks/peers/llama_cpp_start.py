"""Loads a model with llama-cpp-python, decodes one token and prints seconds since the interpreter started its work.

python llama_cpp_start.py MODEL.gguf PROMPT THREADS
"""

import sys
import time

start = time.perf_counter()
import llama_cpp  # noqa: E402

model, prompt, threads = sys.argv[1:4]
llm = llama_cpp.Llama(model, n_ctx=2048, n_threads=int(threads), flash_attn=True, verbose=False)
next(iter(llm(prompt, max_tokens=1, temperature=0, stream=True)))
print(time.perf_counter() - start)
