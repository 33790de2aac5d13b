"""The chat templates of a model. Rendering one, with Jinja, is loaded when it is wanted (``chat_rendering.py``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenmill.errors import TokenmillError


class ChatTemplateError(TokenmillError):
    """A chat template that is missing, does not parse, refuses the conversation or fails on it."""


class ChatTemplates:
    """The chat templates of one model, by name. Safe to use from many threads at once."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """``sources``: template text by name; a model with one template calls it ``default``. ``special_tokens``: what
        templates read as ``bos_token``, ``eos_token`` and so on."""
        self._sources = dict(sources)
        self._special_tokens = dict(special_tokens)

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """What templates read as ``bos_token``, ``eos_token`` and so on."""
        return self._special_tokens

    def names(self) -> list[str]:
        """The names of the model's templates, sorted."""
        return sorted(self._sources)

    def source(self, name: str | None = None, with_tools: bool = False) -> str:
        """The text of template ``name``. Without a name: ``tool_use`` if there is one and tools are given, else
        ``default``."""
        if name is None:
            name = "tool_use" if with_tools and "tool_use" in self._sources else "default"
            if name not in self._sources and len(self._sources) == 1:
                name = next(iter(self._sources))
        if name not in self._sources:
            raise ChatTemplateError(f"no chat template is named {name!r}; this model has: {', '.join(self.names())}")
        return self._sources[name]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt text of ``messages``, each with a ``role`` and, mostly, a ``content``.

        ``tools`` (JSON schemas), ``documents`` and ``kwargs`` (``enable_thinking=False``) reach the template as they
        are. Content given as a list of ``{"type": "text", "text": ...}`` parts reaches templates that read parts; for
        those that expect a string the parts are joined by newlines, and parts of another type are an error.
        ``chat_template`` is the name of one of the model's templates. Keys whose value is None count as absent.
        Raises ``ChatTemplateError``.
        """
        from tokenmill.tokenizer.chat_rendering import render

        if not messages:
            raise ChatTemplateError("the conversation is empty: give at least one message")
        return render(
            self.source(chat_template, with_tools=bool(tools)),
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            names={**self._special_tokens, **kwargs},
        )
