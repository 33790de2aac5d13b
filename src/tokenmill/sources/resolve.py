"""From what the user calls a model to a file or folder on this machine."""

from __future__ import annotations

from pathlib import Path

from tokenmill.cache_folder import expand_home
from tokenmill.errors import UsageError
from tokenmill.sources.catalogue import CATALOGUE
from tokenmill.sources.errors import ModelUnavailableError, SourceError
from tokenmill.sources.folders import local_path
from tokenmill.sources.hub import fetch_hub_checkpoint, parse_reference
from tokenmill.sources.progress import PullProgress, TerminalProgress
from tokenmill.sources.pull import is_pulled, pull

_GGUF_MAGIC = b"GGUF"
_WHAT_TO_NAME = (
    f"Known names: {', '.join(CATALOGUE)}. Or name a .gguf file, a folder with config.json and safetensors, or "
    "org/name on the Hugging Face hub."
)


def resolve(model: str | Path, progress: PullProgress | None = None) -> Path:
    """The .gguf file or checkpoint folder that ``model`` means, fetched first if it is missing.

    ``model`` is a catalogue name, a path to a .gguf file, a folder with config.json and safetensors, or ``org/name``
    (``org/name@revision``) on the Hugging Face hub. A catalogue name wins over a file of the same name; ``./name``
    means the file. ``progress`` None reports on standard error.

    Raises UsageError if ``model`` is none of these, ModelUnavailableError if it cannot be fetched.
    """
    name = str(model)
    if not name.strip():
        raise UsageError(f"the model's name is empty. {_WHAT_TO_NAME}")
    if name in CATALOGUE:
        return _catalogue_file(name, progress)
    path = expand_home(name)
    if path.is_file():
        return _gguf_file(path)
    if path.is_dir():
        return _checkpoint_folder(path)
    if path.exists():
        raise UsageError(f"{path} is neither a regular file nor a folder")
    reference = None if _looks_like_path(name) else parse_reference(name)
    if reference is None:
        raise UsageError(_unknown(name))
    repository, revision = reference
    try:
        folder = fetch_hub_checkpoint(repository, revision, progress or TerminalProgress())
    except SourceError as error:
        raise ModelUnavailableError(
            name,
            [(f"folder {path}", "no such folder"), (f"Hugging Face hub: {name}", str(error))],
            "Check the name and the network, or name a folder with config.json and safetensors.",
        ) from error
    return _checkpoint_folder(folder)


def _catalogue_file(name: str, progress: PullProgress | None) -> Path:
    entry = CATALOGUE[name]
    path = local_path(entry)
    if path.exists() and not is_pulled(entry):
        raise UsageError(
            f"{path} has {path.stat().st_size:,} bytes, but {name} has {entry.size:,}; remove the file to pull it "
            f"again, or run the file as it is by its path"
        )
    return pull(entry, progress)


def _gguf_file(path: Path) -> Path:
    try:
        with path.open("rb") as stream:
            magic = stream.read(len(_GGUF_MAGIC))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if not magic:
        raise UsageError(f"{path} is empty; fetch it again")
    if magic != _GGUF_MAGIC:
        raise UsageError(f"{path} is not a GGUF file (it does not start with {_GGUF_MAGIC.decode()!r})")
    return path


def _checkpoint_folder(path: Path) -> Path:
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise UsageError(f"folder {path} cannot be read: {error.strerror}") from error
    if "config.json" in names and any(name.endswith(".safetensors") for name in names):
        return path
    if gguf := [name for name in names if name.endswith(".gguf")]:
        raise UsageError(f"{path} is a folder; name the file, e.g. {path / gguf[0]}")
    missing = "config.json" if "config.json" not in names else "a .safetensors file"
    raise UsageError(f"folder {path} is not a checkpoint: {missing} is missing")


def _looks_like_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or name.endswith(".gguf")


def _unknown(name: str) -> str:
    if _looks_like_path(name):
        return f"{name}: no such file or folder"
    import difflib

    close = difflib.get_close_matches(name, CATALOGUE, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown model {name!r}.{hint} {_WHAT_TO_NAME}"
