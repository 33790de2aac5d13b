"""Prints what the core install weighs: every package that `pip install tokenmill` brings, in MB on disk.

Exits with 1 above the limit.

Run it with the interpreter of an environment that has tokenmill installed (not in editable mode).
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

LIMIT_MB = 150


def main() -> None:
    sizes = {name: installed_bytes(name) for name in requirements("tokenmill")}
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size / 1e6:8.1f} MB  {name} {metadata.version(name)}")
    total = sum(sizes.values()) / 1e6
    print(f"{total:8.1f} MB  in all (limit {LIMIT_MB} MB)")
    if total > LIMIT_MB:
        sys.exit(1)


def requirements(name: str) -> set[str]:
    """``name`` and everything that it needs, extras left out."""
    found: set[str] = set()
    open_names = [name]
    while open_names:
        current = canonical(open_names.pop())
        if current in found:
            continue
        try:
            needed = metadata.requires(current) or []
        except metadata.PackageNotFoundError:  # a requirement for another platform or Python
            continue
        found.add(current)
        open_names += [re.split(r"[^\w.-]", entry, maxsplit=1)[0] for entry in needed if "extra ==" not in entry]
    return found


def installed_bytes(name: str) -> int:
    paths = [Path(str(file.locate())) for file in metadata.files(name) or []]
    return sum(path.stat().st_size for path in paths if path.is_file())


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
