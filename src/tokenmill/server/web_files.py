"""The files of the web page, as they leave the server. They are the same for everybody and hold no secrets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import PurePosixPath

# Nothing is taken from another host, nothing runs that is not a file of the server, and the browser itself refuses to
# make HTML of a string (trusted-types), so whatever a model writes stays text.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".LICENSE": "text/plain; charset=utf-8",
}


@dataclass(frozen=True, slots=True)
class WebFile:
    body: bytes
    media_type: str
    etag: str

    def headers(self) -> dict[str, str]:
        """For the file, and for the answer that the client's copy is still good."""
        return {
            "etag": self.etag,
            "cache-control": "no-cache",  # to be kept, and asked about each time
            "content-security-policy": _POLICY,
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
        }


def _read(folder: Traversable, path: str) -> Iterator[tuple[str, WebFile]]:
    for entry in folder.iterdir():
        name = f"{path}/{entry.name}"
        if entry.is_dir():
            yield from _read(entry, name)
        else:
            body = entry.read_bytes()
            media_type = _MEDIA_TYPES[PurePosixPath(entry.name).suffix]
            yield (
                "/" if name == "/web/index.html" else name,
                WebFile(body, media_type, f'"{sha256(body).hexdigest()[:16]}"'),
            )


WEB_FILES = dict(_read(files("tokenmill.server") / "web", "/web"))
"""By the path of their URL; the page itself is ``/``."""
