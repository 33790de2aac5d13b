"""Where models come from: the catalogue, pulling with verification, and resolving names to files."""

from tokenmill.sources.catalogue import CATALOGUE, DEFAULT_MODEL, CatalogueModel
from tokenmill.sources.errors import ChecksumError, DiskSpaceError, ModelUnavailableError, SourceError
from tokenmill.sources.folders import local_path, models_folder
from tokenmill.sources.progress import PullProgress, SilentProgress, TerminalProgress
from tokenmill.sources.pull import is_pulled, pull, verify
from tokenmill.sources.resolve import resolve

__all__ = [
    "CATALOGUE",
    "DEFAULT_MODEL",
    "CatalogueModel",
    "ChecksumError",
    "DiskSpaceError",
    "ModelUnavailableError",
    "PullProgress",
    "SilentProgress",
    "SourceError",
    "TerminalProgress",
    "is_pulled",
    "local_path",
    "models_folder",
    "pull",
    "resolve",
    "verify",
]
