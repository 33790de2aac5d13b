"""A system-call filter that leaves a process nothing but computing, reading files and writing to open pipes.

Classic BPF for seccomp(2), built here: an allow list, everything else fails with EPERM (``clone3`` with ENOSYS). It
needs no privilege, cannot be taken off, and holds for all children, of which it allows none. Linux on x86-64 and
aarch64. Standard library only: the sandboxed process loads this file by itself.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
# struct seccomp_data: nr, arch, instruction pointer (8), six arguments (8 each).
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_O_WRITES = 0o1 | 0o2 | 0o100 | 0o1000 | 0o2000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_APPEND
_O_TMPFILE = 0o20000000

# Numbers of arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
_X86_64 = {
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
    "pread64": 17, "readv": 19, "writev": 20, "access": 21, "select": 23, "sched_yield": 24, "mremap": 25,
    "madvise": 28, "dup": 32, "nanosleep": 35, "getpid": 39, "exit": 60, "uname": 63, "getcwd": 79,
    "readlink": 89, "gettimeofday": 96, "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104,
    "geteuid": 107, "getegid": 108, "sigaltstack": 131, "arch_prctl": 158, "gettid": 186, "time": 201, "futex": 202,
    "sched_getaffinity": 204, "getdents64": 217, "set_tid_address": 218, "restart_syscall": 219, "clock_gettime": 228,
    "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "newfstatat": 262, "readlinkat": 267,
    "faccessat": 269, "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "getrandom": 318, "statx": 332,
    "rseq": 334, "faccessat2": 439,
}  # fmt: skip
_AARCH64 = {
    "getcwd": 17, "dup": 23, "faccessat": 48, "close": 57, "getdents64": 61, "lseek": 62, "read": 63,
    "write": 64, "readv": 65, "writev": 66, "pread64": 67, "pselect6": 72, "ppoll": 73, "readlinkat": 78,
    "newfstatat": 79, "fstat": 80, "exit": 93, "exit_group": 94, "set_tid_address": 96, "futex": 98,
    "set_robust_list": 99, "nanosleep": 101, "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115,
    "restart_syscall": 128, "sched_getaffinity": 123, "sched_yield": 124, "sigaltstack": 132, "rt_sigaction": 134,
    "rt_sigprocmask": 135, "rt_sigreturn": 139, "times": 153, "uname": 160, "getrusage": 165, "gettimeofday": 169,
    "getpid": 172, "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178, "sysinfo": 179,
    "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226, "madvise": 233, "getrandom": 278,
    "statx": 291, "rseq": 293, "faccessat2": 439,
}  # fmt: skip

# Audit number of the architecture, its allow list, and the numbers that need a look at their arguments.
_MACHINES = {
    "x86_64": (0xC000003E, _X86_64, {"open": 2, "openat": 257, "prlimit64": 302, "clone3": 435}),
    "aarch64": (0xC00000B7, _AARCH64, {"openat": 56, "prlimit64": 261, "clone3": 435}),
}


def install() -> None:
    """Filters this process and all it starts, for good. Raises OSError where the system cannot."""
    machine = platform.machine()
    if machine not in _MACHINES:
        raise OSError(errno.ENOSYS, f"there is no system-call filter for {machine}")
    code = _program(*_MACHINES[machine])

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))

    program = Program(len(code) // 8, code)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "the kernel takes no system-call filter")


def _program(audit: int, allowed: dict[str, int], looked_at: dict[str, int]) -> bytes:
    """The filter's instructions: one comparison a number, arguments where they decide."""
    code: list[bytes] = []

    def emit(operation: int, k: int, on_true: int = 0, on_false: int = 0) -> None:
        code.append(struct.pack("=HBBI", operation, on_true, on_false, k))

    load, equal, any_bit, answer = 0x20, 0x15, 0x45, 0x06
    denied = _ERRNO | errno.EPERM
    emit(load, _ARCHITECTURE)
    emit(equal, audit, 1, 0)
    emit(answer, _KILL)
    emit(load, _NUMBER)
    for number in sorted(allowed.values()):
        emit(equal, number, 0, 1)
        emit(answer, _ALLOW)
    for name, flags_argument in (("open", 1), ("openat", 2)):
        if name in looked_at:
            emit(equal, looked_at[name], 0, 4)
            emit(load, _ARGUMENTS + 8 * flags_argument)
            emit(any_bit, _O_WRITES | _O_TMPFILE, 0, 1)
            emit(answer, denied)
            emit(answer, _ALLOW)
    emit(equal, looked_at["prlimit64"], 0, 6)  # reading limits is what a null third argument does
    emit(load, _ARGUMENTS + 8 * 2)
    emit(equal, 0, 0, 3)
    emit(load, _ARGUMENTS + 8 * 2 + 4)
    emit(equal, 0, 0, 1)
    emit(answer, _ALLOW)
    emit(answer, denied)
    emit(equal, looked_at["clone3"], 0, 1)
    emit(answer, _ERRNO | errno.ENOSYS)
    emit(answer, denied)
    return b"".join(code)
