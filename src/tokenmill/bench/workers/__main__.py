"""Starts one worker: ``python PATH/TO/workers NAME``."""

import contextlib
import ctypes
import importlib
import signal
import sys
import types

# A worker is stopped most of the time and would not see that whoever asks it has died: the kernel ends it then.
with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

# The workers have their libraries' names: taken from this folder as top-level modules they would hide them.
package = types.ModuleType("bench_workers")
package.__path__ = [sys.path.pop(0)]
sys.modules[package.__name__] = package
importlib.import_module(f"bench_workers.{sys.argv[1]}").main()
