"""Log lines that people read and machines split: time, level, event, then `key=value` pairs.

2026-03-01T12:00:00.123Z info  request finished request_id=chatcmpl-1f… status=200 seconds=0.412
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import TextIO

LOGGER = logging.getLogger("rvllm")
OTHERS = ("uvicorn", "asyncio")


class KeyValueFormatter(logging.Formatter):
    """Renders a record and the fields that `event` gave it on one line, whatever they contain."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; control characters are escaped, a traceback follows on its own lines."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        words = [f"{moment}.{int(record.msecs):03d}Z", f"{record.levelname.lower():<7}"]
        text = record.getMessage()
        words.append(text if text.isprintable() else json.dumps(text)[1:-1])
        fields: dict[str, object] = getattr(record, "fields", {})
        words += [f"{key}={_quoted(value)}" for key, value in fields.items()]
        line = " ".join(words)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def set_up(level: str, stream: TextIO | None = None) -> None:
    """Sends the package's log lines of `level` (debug, info, warning, error) and above to stderr."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(KeyValueFormatter())
    LOGGER.handlers[:] = [handler]
    LOGGER.setLevel(level.upper())
    LOGGER.propagate = False
    for name in OTHERS:  # their lines take the same form; what clients do wrong is not worth a line of theirs
        logging.getLogger(name).handlers[:] = [handler]
        logging.getLogger(name).setLevel(logging.ERROR)


def event(level: int, message: str, **fields: object) -> None:
    """Logs a message with fields; a field that is None is left out."""
    if LOGGER.isEnabledFor(level):
        LOGGER.log(level, message, extra={"fields": {key: v for key, v in fields.items() if v is not None}})


def _quoted(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    plain = text.isprintable() and text and not any(mark in text for mark in ' "=')
    return text if plain else json.dumps(text)
