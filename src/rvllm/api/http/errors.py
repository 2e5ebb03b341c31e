"""Errors of the HTTP surface, in the shape of OpenAI's error objects."""

from __future__ import annotations

import re
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager

import msgspec

from rvllm.errors import CapacityError, LimitError, RvllmError, SlowClientError, UnavailableError, UsageError

MAX_MESSAGE = 1500  # characters of an error's message that are sent
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ErrorDetail(msgspec.Struct):
    """What clients read: a sentence, a kind, the parameter that is wrong and a code for programs."""

    message: str
    type: str
    param: str | None
    code: str | int | None


class ErrorBody(msgspec.Struct):
    """The JSON body of every answer that is not a success."""

    error: ErrorDetail


class ApiError(Exception):
    """A request that is answered with an error.

    status: the HTTP status; param: the request's field that is wrong; code: a word for programs, by default
    the status; headers: extra response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> ErrorBody:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = str(self)  # others' parsers quote what a client sent, whatever its length
        if len(message) > MAX_MESSAGE:
            message = f"{message[:MAX_MESSAGE]} ... ({len(message)} characters)"
        return ErrorBody(ErrorDetail(message, kind, self.param, self.code or self.status))


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400 that names the parameter."""
    return ApiError(400, message, param=param, code=code)


def unknown(what: str, name: str, param: str | None = None) -> ApiError:
    """A 404: there is no such file, batch, item, ...; param: by default `what`_id."""
    return ApiError(404, f"there is no {what} {name[:80]!r}", param=param or f"{what}_id")


def busy(message: str) -> ApiError:
    """A 503 that asks the client to come back."""
    return ApiError(503, message, code="overloaded", headers=((b"retry-after", b"1"),))


def overloaded(message: str, seconds: int) -> ApiError:
    """A 429: the queue is full, or was too slow; the client may come back in so many seconds."""
    headers = ((b"retry-after", str(seconds).encode()),)
    return ApiError(429, message, code="overloaded", headers=headers)


def from_rvllm(error: RvllmError, fields: Collection[str] = ()) -> ApiError:
    """A mistake found below the HTTP layer, as an answer.

    A UsageError is the client's; when its first word is one of the request's `fields`, or a
    path into one (`messages[0].content`), that is the parameter.
    """
    message = str(error)
    if isinstance(error, UsageError):
        word = message.partition(" ")[0].rstrip(":")
        code = "too_complex" if isinstance(error, LimitError) else None
        return invalid(message, word if re.split(r"[.\[]", word)[0] in fields else None, code)
    if isinstance(error, SlowClientError):
        return ApiError(408, message)
    if isinstance(error, UnavailableError):
        return busy(message)
    if isinstance(error, CapacityError):
        return invalid(message)
    return ApiError(500, message)


@contextmanager
def blaming(param: str) -> Generator[None, None, None]:
    """A UsageError raised inside is a 400 that names this parameter."""
    try:
        yield
    except UsageError as error:
        raise invalid(str(error), param) from None


@contextmanager
def field_names(names: Mapping[str, str], fields: Collection[str]) -> Generator[None, None, None]:
    """Errors raised inside speak of a surface's own fields.

    names: what the surface calls a field of the conversation, where it differs. fields: of the conversation.
    """
    try:
        yield
    except RvllmError as error:
        raise _renamed(from_rvllm(error, fields), names) from None
    except ApiError as error:
        raise _renamed(error, names) from None


def _renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    """The same error about the field's other name, in its parameter and where its message begins with it."""
    head = re.split(r"[.\[]", error.param or "")[0]
    other = names.get(head)
    if other is None:
        return error
    message = str(error)
    if re.match(rf"{re.escape(head)}(?!\w)", message):
        message = other + message[len(head) :]
    return ApiError(error.status, message, param=other, code=error.code, headers=error.headers)
