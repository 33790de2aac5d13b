"""A chat's state: its messages, and saving and loading them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenmill.cache_folder import expand_home
from tokenmill.errors import TokenmillError

_ROLES = ("user", "assistant")


class ConversationFileError(TokenmillError):
    """A saved conversation that cannot be written or read."""


@dataclass(slots=True)
class Conversation:
    """Messages in order, user and assistant taking turns, and the system message apart."""

    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Adds what the user says."""
        self.messages.append({"role": "user", "content": text})

    def answered(self, text: str) -> None:
        """Adds what the model says."""
        self.messages.append({"role": "assistant", "content": text})

    def take_back_answer(self) -> bool:
        """Removes the last answer so that it can be given anew; False if there is nothing to answer."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        return bool(self.messages)

    def reset(self) -> None:
        """Forgets all messages; the system message stays."""
        self.messages.clear()

    def prompt(self) -> list[dict[str, str]]:
        """What the chat template gets."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.messages]

    def save(self, file: str | Path) -> Path:
        """Writes JSON; an existing file is replaced only by a complete one."""
        path = expand_home(file)
        partial = path.with_name(f".{path.name}.partial")
        text = json.dumps({"system": self.system, "messages": self.messages}, ensure_ascii=False, indent=2)
        try:
            partial.write_text(text + "\n", encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise ConversationFileError(f"{path} cannot be written: {error.strerror}") from error
        return path

    @classmethod
    def load(cls, file: str | Path) -> Conversation:
        """Reads what ``save`` wrote. Raises ConversationFileError if it is anything else."""
        path = expand_home(file)
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConversationFileError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ConversationFileError(f"{path} is not a saved conversation: {error}") from error
        if not _is_conversation(saved):
            raise ConversationFileError(
                f"{path} is not a saved conversation: it needs 'system' and a list of 'messages'"
            )
        return cls(saved.get("system"), [{"role": m["role"], "content": m["content"]} for m in saved["messages"]])


def _is_conversation(saved: Any) -> bool:
    return (
        isinstance(saved, dict)
        and isinstance(saved.get("system"), str | None)
        and isinstance(saved.get("messages"), list)
        and all(
            isinstance(m, dict) and m.get("role") in _ROLES and isinstance(m.get("content"), str)
            for m in saved["messages"]
        )
    )
