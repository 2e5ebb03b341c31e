"""From the bytes of a request body to a checked struct, with an error that names the field."""

from __future__ import annotations

import re
from collections.abc import Sized
from typing import TypeVar

import msgspec

from rvllm.api.http.errors import ApiError, invalid

MAX_TOOLS = 128
MAX_MESSAGES = 10_000  # of a conversation, whatever the surface calls them
RequestT = TypeVar("RequestT", bound=msgspec.Struct)
_PATH = re.compile(r"(?P<what>.*) - at `\$\.?(?P<path>.*)`$", re.DOTALL)
_MISSING = re.compile(r"missing required field `(?P<name>\w+)`")


def parse(body: bytes, kind: type[RequestT]) -> RequestT:
    """The body as a struct of `kind`.

    Raises ApiError 400 for what is not JSON, too deeply nested, of a wrong type, out of a number's range or
    not text (lone surrogates, broken UTF-8); its `param` is the path of the field.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise wrong_field(str(error)) from None
    except msgspec.DecodeError as error:
        raise invalid(f"the body is not valid JSON: {error}") from None
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not valid UTF-8: {error.reason}") from None
    except RecursionError:
        raise invalid("the body is nested too deeply") from None


def check_count(items: Sized, most: int, param: str) -> None:
    """Raises a 400 for a list of more than `most` entries; comes before anything walks over it."""
    if len(items) > most:
        raise invalid(f"{param} has {len(items)} entries, more than {most}", param)


def wrong_field(message: str, where: str = "") -> ApiError:
    """msgspec's complaint as a 400 whose `param` is the path of the field, below `where`."""
    found = _PATH.match(message)
    what, path = (found["what"], found["path"]) if found else (message, "")
    path = f"{where}.{path}".strip(".").replace(".[", "[")
    missing = _MISSING.search(what)
    if missing:
        path = f"{path}.{missing['name']}" if path else missing["name"]
        return invalid(f"{path} is required", path)
    if not path:
        return invalid(f"the body must be a JSON object: {what}")
    return invalid(f"{path}: {what[:1].lower()}{what[1:]}", path)
