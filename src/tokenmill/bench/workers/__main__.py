"""Starts one worker: ``python PATH/TO/workers NAME``."""

import importlib
import sys
import types

# The workers have their libraries' names: taken from this folder as top-level modules they would hide them.
package = types.ModuleType("bench_workers")
package.__path__ = [sys.path.pop(0)]
sys.modules[package.__name__] = package
importlib.import_module(f"bench_workers.{sys.argv[1]}").main()
