"""Forms with files (multipart/form-data, RFC 7578), read as they come: a file goes where the caller says."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Protocol

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from rvllm.api.http.errors import ApiError, invalid

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of each form that is none
MAX_PARTS = 32
MAX_HEAD = 8192  # bytes of a part's headers
MAX_FIELD = 1 << 16  # bytes of a field that is no file


class Sink(Protocol):
    """Takes the bytes of a file."""

    def write(self, data: bytes) -> None:
        """Takes more of it."""

    def discard(self) -> None:
        """Forgets the file, unless it was kept; may come at any time and more than once."""


class Form:
    """A form that is being received: `fields` by name, and at most one file.

    Raises ApiError 400, from any method that takes bytes, for what is no form, and 415 for another kind.
    """

    def __init__(self, content_type: bytes, open_file: Callable[[], Sink]) -> None:
        """open_file: makes what a file is written to, once its part begins."""
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data":
            raise ApiError(415, "the body must be sent with Content-Type: multipart/form-data")
        if not 0 < len(boundary) <= 70:
            raise invalid("the form's Content-Type names no boundary")
        self.fields: dict[str, bytes] = {}
        self.file_field = self.filename = ""  # of the file, if there is one
        self.file: Sink | None = None
        self._open_file = open_file
        self._parts = self._head = 0
        self._headers: dict[bytes, bytes] = {}
        self._key, self._value = b"", b""
        self._name: str | None = None  # of the field that is being read; None: it is the file
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begins,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_ends,
                "on_headers_finished": self._headers_end,
                "on_part_data": self._part_data,
                "on_end": self._form_ends,
            },
        )

    def feed(self, data: bytes) -> None:
        """Reads on. May write to the file, so that it belongs into a thread."""
        try:
            self._parser.write(data)
        except MultipartParseError as error:
            raise invalid(f"the form cannot be read: {error}") from None

    def finish(self) -> None:
        """The body has ended. Raises a 400 when the form has not."""
        if not self._ended:
            raise invalid("the form is cut off: its last boundary is missing")

    def discard(self) -> None:
        if self.file is not None:
            self.file.discard()

    def _part_begins(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise invalid(f"the form has more than {MAX_PARTS} parts")
        self._head, self._headers = 0, {}

    def _count_head(self, more: int) -> None:
        self._head += more
        if self._head > MAX_HEAD:
            raise invalid(f"a part of the form has more than {MAX_HEAD} bytes of headers")

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._count_head(end - start)
        self._key += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._count_head(end - start)
        self._value += data[start:end]

    def _header_ends(self) -> None:
        self._headers[self._key.lower()] = self._value
        self._key, self._value = b"", b""

    def _headers_end(self) -> None:
        disposition, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if disposition != b"form-data" or b"name" not in options:
            raise invalid("a part of the form has no name")
        name = options[b"name"].decode("utf-8", "replace")
        if b"filename" not in options:
            self._name, self.fields[name] = name, b""
            return
        if self.file is not None:
            raise invalid("the form has more than one file")
        self._name, self.file_field = None, name
        self.filename = _plain(options[b"filename"].decode("utf-8", "replace"))
        self.file = self._open_file()

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name is None:
            assert self.file is not None
            self.file.write(data[start:end])
            return
        if len(self.fields[self._name]) + end - start > MAX_FIELD:
            raise invalid(f"a field of the form has more than {MAX_FIELD} bytes", self._name[:100])
        self.fields[self._name] += data[start:end]

    def _form_ends(self) -> None:
        self._ended = True


def _plain(filename: str) -> str:
    """A file's name without folders or control characters."""
    name = re.split(r"[/\\]", filename)[-1]
    return "".join(c for c in name if c.isprintable())[:255] or "file"
