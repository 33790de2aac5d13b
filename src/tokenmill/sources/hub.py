"""Fetches models from the Hugging Face hub: one file of the catalogue, or a whole safetensors checkpoint."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from tokenmill.sources.catalogue import HubFile
from tokenmill.sources.errors import SourceError
from tokenmill.sources.progress import PullProgress, SetBytes, follow_folder

_REFERENCE = re.compile(r"(?P<repository>[\w][\w.-]*/[\w][\w.-]*)(?:@(?P<revision>[\w][\w./-]*))?")
_CONNECT_SECONDS = 10
_CHUNK = 1 << 20

_CHECKPOINT_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "*.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
]
# Copies of the weights in other layouts that some repositories add.
_NOT_CHECKPOINT_FILES = ["*/*", "consolidated*"]


def parse_reference(reference: str) -> tuple[str, str | None] | None:
    """``org/name`` or ``org/name@revision`` as (repository, revision); None if it is neither."""
    match = _REFERENCE.fullmatch(reference)
    return (match["repository"], match["revision"]) if match else None


def fetch_hub_file(source: HubFile, size: int, sha256: str, partial: Path, progress: PullProgress) -> tuple[Path, str]:
    """Downloads one file into ``partial`` (huggingface_hub resumes what is there) and hashes it.

    The hub knows the SHA-256 of large files, so a repository that holds another file than the expected one costs one
    request and no download. Returns the file and its SHA-256. Raises SourceError with the reason.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    folder = partial / "hub"
    try:
        described = get_hf_file_metadata(hf_hub_url(source.repository, source.file), timeout=_CONNECT_SECONDS)
    except Exception as error:
        raise SourceError(_reason(error)) from error
    etag = (described.etag or "").strip('"')
    if len(etag) == len(sha256) and etag != sha256:
        raise SourceError(f"the repository holds another file under this name (SHA-256 {etag}, expected {sha256})")
    if described.size is not None and described.size != size:
        raise SourceError(f"the repository's file has {described.size:,} bytes, expected {size:,}")

    bars_were_off = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with progress.transfer(f"downloading {source}", size) as set_bytes, follow_folder(folder, set_bytes):
            path = Path(hf_hub_download(source.repository, source.file, local_dir=folder))
    except Exception as error:
        raise SourceError(_reason(error)) from error
    finally:
        if not bars_were_off:
            enable_progress_bars()
    with progress.transfer("checking", size) as set_bytes:
        return path, file_sha256(path, set_bytes)


def fetch_hub_checkpoint(repository: str, revision: str | None, progress: PullProgress) -> Path:
    """The folder of a safetensors checkpoint in huggingface_hub's own cache, downloaded if it is not there.

    Without a network, or with ``HF_HUB_OFFLINE=1``, an earlier download is used. Raises SourceError with the reason.
    """
    from huggingface_hub import snapshot_download

    name = repository if revision is None else f"{repository}@{revision}"
    progress.note(f"looking up {name} on the Hugging Face hub")
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=_CHECKPOINT_FILES,
                ignore_patterns=_NOT_CHECKPOINT_FILES,
                etag_timeout=_CONNECT_SECONDS,
            )
        )
    except Exception as error:
        raise SourceError(_reason(error)) from error


def file_sha256(path: Path, set_bytes: SetBytes = lambda done: None) -> str:
    """SHA-256 of a file in lower-case hex."""
    digest = hashlib.sha256()
    done = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            set_bytes(done)
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    """One line on why the hub did not deliver."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return "HF_HUB_OFFLINE is set, and the file is not in the hub's local cache"
    if isinstance(error, LocalEntryNotFoundError) or "Connect" in type(error).__name__:
        return "the hub cannot be reached, and the file is not in its local cache"
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
