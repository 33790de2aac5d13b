"""Text to measure on that needs no download: what is on any machine with Python.

Three kinds: ``code`` (sources of the standard library), ``prose`` (its documentation topics and docstrings, licence
texts and package descriptions of what is installed) and ``mixed`` (both in turn). Documents are dealt to a calibration
and an evaluation part by a hash of their names, so that no document is in both, on any machine. Which texts exist
depends on the interpreter and the installed packages: results name the SHA-256 of what they ran on.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import sysconfig
from collections.abc import Callable, Iterator
from enum import Enum
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path

from tokenmill.errors import TokenmillError, UsageError

SEPARATOR = "\n\n"
"""Between documents, as in the usual preparation of WikiText."""

_LEAST_CHARACTERS = 400
_MOST_CHARACTERS = 30_000


class TextError(TokenmillError):
    """A text that cannot be read or is too short to measure on."""


Source = tuple[str, Callable[[], str | None]]
"""A document's name, and what reads it."""


class Kind(Enum):
    CODE = "code"
    PROSE = "prose"
    MIXED = "mixed"


class Part(Enum):
    CALIBRATION = "calibration"
    EVALUATION = "evaluation"


def corpus(kind: Kind, part: Part, characters: int, folder: Path | None = None) -> str:
    """At most ``characters`` of one kind and part, whole documents but the last, always in the same order.

    ``folder`` stands for the standard library's. Raises TextError if this machine has not a tenth as much.
    """
    pieces, length = [], 0
    for _, text in documents(kind, part, folder):
        pieces.append(text)
        length += len(text) + len(SEPARATOR)
        if length >= characters:
            break
    joined = SEPARATOR.join(pieces)[:characters]
    if len(joined) < characters // 10:
        raise TextError(f"this machine has {len(joined)} characters of {kind.value} ({part.value}), not {characters}")
    return joined


def documents(kind: Kind, part: Part, folder: Path | None = None) -> Iterator[tuple[str, str]]:
    """Names and texts of one part, in a fixed order that mixes sources."""
    if kind is Kind.MIXED:
        pairs = zip_longest(documents(Kind.CODE, part, folder), documents(Kind.PROSE, part, folder))
        yield from (document for document in chain.from_iterable(pairs) if document is not None)
        return
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    sources = dict(_code(folder) if kind is Kind.CODE else _prose(folder))  # equal licences come once
    for name in sorted(sources, key=_hash):
        text = sources[name]() if part_of(name) is part else None
        if text is not None and len(text) >= _LEAST_CHARACTERS:
            yield name, text[:_MOST_CHARACTERS]


def part_of(name: str) -> Part:
    """The part that the document ``name`` belongs to: half of all names each."""
    return Part.EVALUATION if _hash(name)[0] % 2 else Part.CALIBRATION


def read_texts(paths: list[str], characters: int | None = None) -> str:
    """The texts of files, joined by blank lines; ``corpus:KIND[/PART]`` names one of this machine's (evaluation part).

    Raises TextError for a file that is missing or is no UTF-8 text, UsageError for an unknown kind.
    """
    texts = []
    for path in paths:
        if path.startswith("corpus:"):
            kind, _, part = path.removeprefix("corpus:").partition("/")
            try:
                texts.append(corpus(Kind(kind), Part(part or "evaluation"), characters or 200_000))
            except ValueError:
                raise UsageError(
                    f"{path!r} is no corpus: give corpus:code, corpus:prose or corpus:mixed, "
                    "with /calibration or /evaluation behind it"
                ) from None
            continue
        try:
            texts.append(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise TextError(f"{path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise TextError(f"{path} is no UTF-8 text: byte {error.start} is {error.object[error.start]:#x}") from error
    joined = SEPARATOR.join(texts)
    return joined if characters is None else joined[:characters]


def text_digest(text: str) -> str:
    """SHA-256 of the text's UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _code(folder: Path) -> Iterator[Source]:
    for path in folder.rglob("*.py"):
        inside = path.relative_to(folder)
        if not {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"} & set(inside.parts):
            yield f"code/{inside.as_posix()}", partial(_read, path)


def _prose(folder: Path) -> Iterator[Source]:
    yield from _topics(folder)
    for name, load in _code(folder):
        # Under the source's name, so that a docstring is in the same part as the file that it comes from.
        yield name, partial(_docstrings, load)
    for distribution in importlib.metadata.distributions():
        yield f"description/{distribution.metadata['Name']}", partial(_description, distribution)
        for file in distribution.files or ():
            if file.name.upper().startswith(("LICENSE", "LICENCE", "COPYING", "NOTICE")) and file.suffix != ".py":
                licence = _read(Path(str(file.locate())))
                if licence is not None:
                    # Many packages carry the same licence: named by its contents, it is in one part only.
                    yield f"licence/{text_digest(licence)}", partial(str, licence)


def _topics(folder: Path) -> Iterator[Source]:
    """The language reference that ``help()`` shows."""
    source = _read(folder / "pydoc_data" / "topics.py")
    if source is None:
        return
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for name, text in ast.literal_eval(node.value).items():
                yield f"topic/{name}", partial(str, text)


def _docstrings(load: Callable[[], str | None]) -> str:
    try:
        tree = ast.parse(load() or "")
    except (SyntaxError, ValueError):
        return ""
    found = (
        ast.get_docstring(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return SEPARATOR.join(text for text in found if text and len(text) > 80)


def _description(distribution: importlib.metadata.Distribution) -> str | None:
    description = distribution.metadata.get_payload()  # type: ignore[attr-defined]
    return description if isinstance(description, str) else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
