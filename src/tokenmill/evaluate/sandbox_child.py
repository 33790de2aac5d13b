"""The sandboxed side: limits and filter first, then the program; run by path, outside of any package.

``python -I -S sandbox_child.py MEMORY_BYTES CPU_SECONDS``; a token line and then the program on standard input. Answers
on standard output: ``ready``, then the token and ``passed``, or what the program died of.
"""

import importlib.util
import os
import resource
import sys
from pathlib import Path


def main() -> None:
    memory, seconds = int(sys.argv[1]), int(sys.argv[2])
    token = sys.stdin.buffer.readline().strip()
    source = sys.stdin.buffer.read().decode()
    spec = importlib.util.spec_from_file_location("seccomp", Path(__file__).with_name("seccomp.py"))
    assert spec is not None
    assert spec.loader is not None
    seccomp = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(seccomp)
    # Nothing of the program's goes to the parent: it gets its own descriptor for the verdict and a null device.
    verdict, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    try:
        seccomp.install()
    except OSError as error:
        os.write(verdict, f"{error}\n".encode())
        return
    os.write(verdict, b"ready\n")
    try:
        exec(compile(source, "<program>", "exec"), {"__name__": "__program__"})
        answer = token + b" passed\n"
    except BaseException as error:
        try:
            answer = f"{type(error).__name__}: {error}"[:300].replace("\n", " ").encode(errors="replace") + b"\n"
        except BaseException:
            answer = b"raised something that cannot be shown\n"
    os.write(verdict, answer)
    os._exit(0)


main()
