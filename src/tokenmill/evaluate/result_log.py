"""Results as they come, one JSON object a line, so that a run that is broken off goes on where it was.

The first line says what is measured (model, settings); a log of anything else is not continued.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenmill.errors import TokenmillError


class ResultLogError(TokenmillError):
    """A log that cannot be read, or that belongs to another run."""


class ResultLog:
    """The items that are done. Each is written to disk before the next begins."""

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        """Opens or continues the log at ``path``; None keeps results in memory only.

        Raises ResultLogError if the file is a log of another run, naming what differs.
        """
        self.done: dict[str, dict[str, Any]] = {}
        """Records by item id."""
        self._path = path
        own: dict[str, Any] = json.loads(json.dumps(dict(identity)))  # as it would be read again
        if path is None:
            return
        if path.exists():
            self._read(path, own)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"run": own}) + "\n")

    def add(self, item_id: str, record: Mapping[str, Any]) -> None:
        """Appends one item's result."""
        self.done[item_id] = dict(record)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({"item": item_id, "result": dict(record)}) + "\n")

    def _read(self, path: Path, identity: dict[str, Any]) -> None:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ResultLogError(f"{path} cannot be read: {error.strerror}") from error
        whole = content[: content.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            found = lines[0]["run"]
            self.done = {line["item"]: line["result"] for line in lines[1:]}
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ResultLogError(f"{path} is no log of results; name another file") from None
        differing = sorted(name for name in found.keys() | identity.keys() if found.get(name) != identity.get(name))
        if differing:
            what = "; ".join(f"{name} was {found.get(name)!r}, is {identity.get(name)!r}" for name in differing[:3])
            raise ResultLogError(f"{path} is a log of another run ({what}); name another file or delete it")
        if len(whole) < len(content):  # killed while it wrote a line
            os.truncate(path, len(whole))
