"""The keys that clients must bring: any text, one or many."""

from __future__ import annotations

import hmac
from contextvars import ContextVar
from hashlib import blake2b

from rvllm.config import ServerConfig
from rvllm.errors import UsageError
from rvllm.settings import read_text

MAX_KEYS = 10_000
current_key: ContextVar[str] = ContextVar("current_key", default="")
"""A name for the key of the request being answered, from which the key cannot be told; "" without one."""


class Keys:
    """The accepted keys; none: everybody is let in."""

    def __init__(self, keys: list[str]) -> None:
        # A header's bytes may be UTF-8 or, as Python's http.client sends them, Latin-1.
        self._keys = {key.encode() for key in keys}
        for key in keys:
            try:
                self._keys.add(key.encode("latin-1"))
            except UnicodeEncodeError:
                continue

    def __bool__(self) -> bool:
        return bool(self._keys)

    def accept(self, given: bytes) -> bool:
        """Whether it is one of the keys; how long that takes tells nothing of them."""
        current_key.set(blake2b(given, digest_size=8).hexdigest())
        found = False
        for key in self._keys:
            found |= hmac.compare_digest(given, key)
        return found


def load_keys(config: ServerConfig) -> Keys:
    """The keys of `--api-key` and `--api-key-file`.

    Raises UsageError for a file that cannot be read or holds no key, and for a key that no header can carry.
    """
    found = [] if config.api_key is None else [("--api-key", key) for key in config.api_key.split("\n")]
    if config.api_key_file is not None:
        lines = read_text("--api-key-file", config.api_key_file).split("\n")
        keys = [line.rstrip("\r") for line in lines if line.strip()]
        if not keys:
            raise UsageError(f"--api-key-file: {config.api_key_file} holds no key")
        if len(keys) > MAX_KEYS:
            raise UsageError(f"--api-key-file: {config.api_key_file} holds more than {MAX_KEYS} keys")
        found += [("--api-key-file", key) for key in keys]
    for flag, key in found:
        if not key or key != key.strip() or any(ord(c) < 32 or ord(c) == 127 for c in key):
            raise UsageError(
                f"{flag}: a key must not be empty, begin or end with a space or hold control characters"
            )
    return Keys([key for _, key in found])
