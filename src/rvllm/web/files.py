"""The page's files, read once: plain HTML, CSS and ES modules that need no build step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path

STATIC = Path(__file__).parent / "static"
INDEX = "index.html"
CODE_CSS = "code.css"
_TYPES = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class WebFile:
    """A file as it goes over the wire; etag: a digest of its bytes, in quotes."""

    body: bytes
    content_type: bytes
    etag: bytes


def read_files() -> dict[str, WebFile]:
    """All files of the page by name."""
    return {
        path.name: _file(path.read_bytes(), path.suffix)
        for path in sorted(STATIC.iterdir())
        if path.suffix in _TYPES
    }


@cache
def code_css() -> WebFile:
    """The colours of code, which Pygments makes."""
    from rvllm.web import markdown

    return _file(markdown.code_css(), ".css")


def _file(body: bytes, suffix: str) -> WebFile:
    return WebFile(body, _TYPES[suffix], b'"%s"' % blake2b(body, digest_size=12).hexdigest().encode())
