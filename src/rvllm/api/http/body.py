"""From the bytes of a request body to a checked struct, with an error that names the field."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sized
from typing import TypeVar

import msgspec
import numpy as np

from rvllm.api.http.errors import ApiError, invalid

MAX_TOOLS = 128
MAX_MESSAGES = 10_000  # of a conversation, whatever the surface calls them
# What a body may hold: it is parsed on the event loop, where a list or an object takes about a microsecond.
MAX = {"lists and objects": 100_000, "keys": 200_000, "values": 2_000_000}
SMALL = 400_000  # bytes; not worth counting
RequestT = TypeVar("RequestT", bound=msgspec.Struct)
_PATH = re.compile(r"(?P<what>.*) - at `\$\.?(?P<path>.*)`$", re.DOTALL)
_MISSING = re.compile(r"missing required field `(?P<name>\w+)`")


def parse(body: bytes, kind: type[RequestT]) -> RequestT:
    """The body as a struct of `kind`.

    Raises ApiError 400 for what is not JSON, too deeply nested, of a wrong type, out of a number's range or
    not text (lone surrogates, broken UTF-8); its `param` is the path of the field.
    """
    check_structure(body)
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


def check_structure(body: bytes) -> None:
    """Raises a 400 for JSON of so many parts that parsing it would stop everybody else.

    Counts what stands outside strings, and of what is not valid JSON something of that order.
    """
    if len(body) < SMALL or not _exceeded(_counts(body)):
        return
    plain = np.frombuffer(body.replace(b"\\\\", b"").replace(b'\\"', b""), dtype=np.uint8)
    found: Counter[str] = Counter()
    opened = 0  # 1 within a string
    for first in range(0, len(plain), SMALL):  # a body that is made to hurt has shown it after a few
        piece = plain[first : first + SMALL]
        within = (np.cumsum(piece == ord('"'), dtype=np.uint8) + opened) & 1
        opened = int(within[-1])
        found.update(_counts(piece[within == 0].tobytes()))
        if what := _exceeded(found):
            raise invalid(f"the body holds more than {MAX[what]} {what}")


def _counts(data: bytes) -> dict[str, int]:
    lists = data.count(b"[") + data.count(b"{")
    return {"lists and objects": lists, "keys": data.count(b":"), "values": data.count(b",")}


def _exceeded(counts: Mapping[str, int]) -> str | None:
    return next((what for what, count in counts.items() if count > MAX[what]), None)


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
