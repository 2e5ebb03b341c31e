"""Forms with files (multipart/form-data, RFC 7578), as uploads send them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rvllm.api.http.errors import invalid

_BOUNDARY = re.compile(rb'boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))')
_PARAMETER = re.compile(r'(?:^|;)\s*(name|filename)="((?:[^"\\]|\\.)*)"')
_MAX_PARTS = 32
_MAX_HEAD = 8192  # bytes of a part's headers


@dataclass
class Part:
    """One field of a form; `filename` is set for files."""

    name: str
    filename: str | None
    data: bytes


def parse_form(body: bytes, content_type: bytes) -> dict[str, Part]:
    """The parts of a form by name. Raises ApiError 400 when it is none."""
    found = _BOUNDARY.search(content_type)
    if found is None:
        raise invalid("the form's Content-Type names no boundary")
    mark = b"--" + (found[1] or found[2])
    pieces = (b"\r\n" + body).split(b"\r\n" + mark, _MAX_PARTS + 1)
    if len(pieces) < 2 or pieces[-1].rstrip(b"\r\n") != b"--":
        raise invalid(f"the form is cut off, or has more than {_MAX_PARTS} parts")
    parts = {}
    for piece in pieces[1:-1]:
        start = len(b"\r\n") if piece.startswith(b"\r\n") else 0
        end = piece.find(b"\r\n\r\n", start, start + _MAX_HEAD)
        if end < 0:
            raise invalid(f"a part of the form has no headers, or more than {_MAX_HEAD} bytes of them")
        head, data = piece[start:end], piece[end + 4 :]
        part = _part(head, data)
        parts[part.name] = part
    return parts


def _part(head: bytes, data: bytes) -> Part:
    for line in head.decode("utf-8", "replace").split("\r\n"):
        key, _, value = line.partition(":")
        if key.strip().lower() == "content-disposition":
            values = dict(_PARAMETER.findall(value))
            if "name" in values:
                filename = values.get("filename")
                return Part(values["name"], None if filename is None else _plain(filename), data)
    raise invalid("a part of the form has no name")


def _plain(filename: str) -> str:
    """A file's name without folders or control characters."""
    name = re.split(r"[/\\]", filename)[-1]
    return "".join(c for c in name if c.isprintable())[:255] or "file"
