"""Results as files: whole or not at all, and JSON that every reader takes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from rvllm.errors import UsageError


def json_text(value: Any) -> str:
    """A value as JSON; numbers that JSON has not are null."""
    return json.dumps(_finite(value), indent=1) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(path: Path, text: str, flag: str) -> None:
    """Writes a file in one step, so that none is half there. Raises UsageError naming the flag."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.exists() and not path.is_file():  # /dev/stdout
            path.write_text(text, encoding="utf-8")
            return
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UsageError(f"{flag}: cannot write {path}: {error.strerror}") from None
