"""Rendering chat templates: a conversation becomes a prompt by the model's own Jinja program.

Rendering follows `transformers` (``apply_chat_template``): the same environment, filters, functions and names, so that
a prompt is the one the model was tuned on. Templates come with models, from strangers, so they run in Jinja's sandbox,
see only plain data, and are bounded: in loop turns and calls, and in the size of what they build.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor
from jinja2.exceptions import SecurityError

from tokenmill.tokenizer.chat_template import ChatTemplateError

MAX_STEPS = 400_000
"""Loop turns, calls and operations that one rendering may take; large values count for many."""
MAX_CHARACTERS = 16 << 20
"""Longest text, or list, that a template may build."""
_CHARACTERS_A_STEP = 1024
_ITEMS_A_STEP = 16
_MAX_WIDTH = 999_999
"""Largest integer that a template may pass to a string method or filter (a padding width, a count)."""
_WIDE_FIELD = re.compile(r"[0-9]{7}")


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    documents: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    names: Mapping[str, Any],
) -> str:
    """The prompt that the template ``source`` makes of ``messages``; ``names`` is what else it can read. See
    ``ChatTemplates.render``. Raises ``ChatTemplateError``."""
    template = _compile(source)
    try:
        conversation = [_plain_message(message, number) for number, message in enumerate(messages)]
        if any(isinstance(message.get("content"), list) for message in conversation) and not _reads_parts(source):
            conversation = [_joined_parts(message, number) for number, message in enumerate(conversation)]
        plain_names = _plain(names)
        with _budget:
            return template.render(
                messages=conversation,
                tools=_plain(tools),
                documents=_plain(documents),
                add_generation_prompt=add_generation_prompt,
                **plain_names,
            )
    except ChatTemplateError:
        raise
    except jinja2.TemplateError as error:
        raise ChatTemplateError(f"the chat template refuses the conversation: {error}") from error
    except Exception as error:  # a template is a program: any operation in it can fail in its own way
        raise ChatTemplateError(
            f"the chat template fails on the conversation: {type(error).__name__}: {error}"
        ) from error


@functools.lru_cache(maxsize=64)
def _compile(source: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ChatTemplateError(f"the chat template does not parse: line {error.lineno}: {error.message}") from error
    except Exception as error:  # nesting too deep for the parser, for one
        raise ChatTemplateError(f"the chat template does not compile: {type(error).__name__}: {error}") from error


def _plain_message(message: Mapping[str, Any], number: int) -> dict[str, Any]:
    plain = _plain(message)
    if not isinstance(plain, dict) or "role" not in plain:
        raise ChatTemplateError(f'message {number} is no mapping with a "role": {message!r:.80}')
    return {key: value for key, value in plain.items() if value is not None}


def _joined_parts(message: dict[str, Any], number: int) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts: list[str] = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ChatTemplateError(f"message {number} has a content part of type {kind!r}; this model reads text only")
        texts.append(text)
    return {**message, "content": "\n".join(texts)}


def _plain(value: Any) -> Any:
    """``value`` rebuilt from plain JSON types: objects have methods that the sandbox cannot judge."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if callable(dump := getattr(value, "model_dump", None)):  # pydantic
        return _plain(dump())
    raise ChatTemplateError(f"a {type(value).__name__} cannot be given to a chat template; give plain JSON values")


@functools.lru_cache(maxsize=64)
def _reads_parts(source: str) -> bool:
    """Whether a template looks into lists of content parts: it loops over the content, or asks for its type."""
    tree = _environment().parse(source)
    return any(_is_content(loop.iter) for loop in tree.find_all(jinja2.nodes.For)) or any(
        test.name in ("string", "iterable", "sequence") and _is_content(test.node)
        for test in tree.find_all(jinja2.nodes.Test)
    )


def _is_content(node: jinja2.nodes.Node) -> bool:
    """Whether ``node`` is ``content``, ``message.content`` or ``message["content"]``, filtered or not."""
    match node:
        case jinja2.nodes.Filter(node=jinja2.nodes.Node() as inner):
            return _is_content(inner)
        case jinja2.nodes.Name(name="content") | jinja2.nodes.Getattr(attr="content"):
            return True
        case jinja2.nodes.Getitem(arg=jinja2.nodes.Const(value="content")):
            return True
    return False


class _Budget(threading.local):
    """Counts the work of the rendering that runs on this thread."""

    left = 0

    def __enter__(self) -> None:
        self.left = MAX_STEPS

    def __exit__(self, *_: object) -> None:
        self.left = 0

    def spend(self, steps: int = 1) -> None:
        self.left -= steps
        if self.left < 0:
            raise SecurityError(f"it takes more than {MAX_STEPS:,} steps")

    def built(self, value: Any) -> Any:
        """Charges for the memory of ``value``, which it returns."""
        if isinstance(value, _TEXT):
            _check_size(len(value))
            self.spend(len(value) // _CHARACTERS_A_STEP)
        elif isinstance(value, (list, tuple, dict)):
            _check_size(len(value))
            self.spend(len(value) // _ITEMS_A_STEP)
        return value


_budget = _Budget()
_TEXT = (str, bytes)


def _check_size(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise SecurityError(f"it builds a value of more than {MAX_CHARACTERS:,} characters")


def _check_growth(name: str, value: Any, arguments: Sequence[Any]) -> None:
    """Refuses, before it is made, text that method or filter ``name`` of ``value`` would make too large."""
    if name in ("format", "format_map", "__mod__") and isinstance(value, str) and _WIDE_FIELD.search(value):
        raise SecurityError("it formats to a width of more than 999,999")
    for argument in arguments:
        if isinstance(argument, int) and abs(argument) > _MAX_WIDTH:
            raise SecurityError(f"it pads or repeats text {argument:,} times")
    match name, value, arguments:
        case "replace", str(), [str(old), str(new), *_]:
            _check_size(value.count(old) * len(new))
        case "indent", str(), [int(width), *_]:
            _check_size(value.count("\n") * width)
        case "join", str(), [list() | tuple() as items, *_]:
            _check_size(sum(len(item) + len(value) for item in items if isinstance(item, str)))
        case "join", list() | tuple(), _:
            between = len(arguments[0]) if arguments and isinstance(arguments[0], str) else 0
            _check_size(sum(len(item) + between for item in value if isinstance(item, str)))


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox with bounds on work and memory."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        """Has each turn of a loop, and each ``~``, pass through ``call`` as method calls do."""
        tree = _JoinsAsCalls().visit(super()._parse(source, name, filename))
        for loop in tree.find_all(jinja2.nodes.For):
            step = jinja2.nodes.Call(jinja2.nodes.EnvironmentAttribute("count_turn"), [], [], None, None)
            loop.body.insert(0, jinja2.nodes.ExprStmt(step).set_lineno(loop.lineno))
        return cast(jinja2.nodes.Template, tree.set_environment(self))

    def count_turn(self) -> None:
        """A loop's turn; the call itself is what counts."""

    def join_operands(self, *operands: Any) -> str:
        """The ``~`` operator."""
        return "".join(map(str, operands))

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Joins what a template, macro or block has written."""
        written: list[str] = []
        size = 0
        for part in parts:
            size += len(part)
            _check_size(size)
            written.append(part)
        return cast(str, _budget.built("".join(written)))

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        _budget.spend()
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, _TEXT):
            _check_growth(method.__name__, owner, [*args, *kwargs.values()])
        return _budget.built(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _budget.spend()
        sizes = [len(side) if isinstance(side, (*_TEXT, list, tuple)) else 0 for side in (left, right)]
        numbers = [abs(side) if isinstance(side, int) else 0 for side in (left, right)]
        match operator:
            case "+":
                _check_size(sum(sizes))
            case "*":
                _check_size(sizes[0] * numbers[1] + sizes[1] * numbers[0])
                _check_size(numbers[0].bit_length() + numbers[1].bit_length())
            case "**":
                _check_size(numbers[0].bit_length() * numbers[1] * _CHARACTERS_A_STEP)
            case "%" if isinstance(left, str):
                _check_growth("__mod__", left, right if isinstance(right, tuple) and "*" in left else ())
        return _budget.built(super().call_binop(context, operator, left, right))


class _JoinsAsCalls(jinja2.visitor.NodeTransformer):
    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:  # noqa: N802  the visitor's naming
        self.generic_visit(node)
        joined = jinja2.nodes.EnvironmentAttribute("join_operands")
        return jinja2.nodes.Call(joined, node.nodes, [], None, None).set_lineno(node.lineno)


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # keeps the marks that say whether a filter wants the context first
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _budget.spend()
        first = 1 if hasattr(function, "jinja_pass_arg") else 0
        _check_growth(name, args[first], [*args[first + 1 :], *kwargs.values()])
        return _budget.built(function(*args, **kwargs))

    return bounded


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks, for training, what the assistant wrote; a prompt has its contents as they are."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it as an instance attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """``dict`` for templates: only the call."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it reads; Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.filters = {name: _bounded_filter(name, function) for name, function in environment.filters.items()}
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=jinja2.utils.Namespace
    )
    return environment
