"""Anthropic's tools with a type: those that the client runs become functions, hosted ones are left out.

A client tool's schema is known to Anthropic's models and not sent; other models need to be told.
"""

from __future__ import annotations

import logging
from typing import Any

from rvllm.api.http.errors import invalid

_log = logging.getLogger(__name__)


def _object(required: tuple[str, ...], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


def _text(description: str) -> dict[str, Any]:
    return {"type": "string", "description": description}


_LINES = {"type": "array", "items": {"type": "integer"}, "description": "First and last line to show."}
_EDITS = {"path": _text("The file."), "old_str": _text("The text to replace; it must occur once."),
          "new_str": _text("The text to put there."), "insert_text": _text("The text to insert."),
          "insert_line": {"type": "integer", "description": "The line to insert behind; 0: the beginning."},
          "file_text": _text("The content of a file to create."), "view_range": _LINES}  # fmt: skip

# By the beginning of the type, which a date follows: (description, schema).
CLIENT_TOOLS: dict[str, tuple[str, dict[str, Any]]] = {
    "bash_": (
        "Runs a command in a shell that stays open between calls.",
        _object(
            (),
            command=_text("The command."),
            restart={"type": "boolean", "description": "Start a new shell."},
        ),
    ),
    "text_editor_": (
        "Shows, creates and edits files.",
        _object(("command", "path"), command={"enum": ["view", "create", "str_replace", "insert"]}, **_EDITS),
    ),
    "memory_": (
        "Keeps notes in files below /memories.",
        _object(
            ("command",),
            command={"enum": ["view", "create", "str_replace", "insert", "delete", "rename"]},
            old_path=_text("The file to rename."),
            new_path=_text("Its new name."),
            **_EDITS,
        ),
    ),
}
_HOSTED = ("web_search_", "web_fetch_", "code_execution_", "tool_search_", "mcp_toolset")


def typed_tool(kind: str, where: str) -> tuple[str, dict[str, Any]] | None:
    """(description, schema) of a client tool; None for one that Anthropic's own service runs.

    Raises a 400 for a type that is not known or that needs what text cannot carry.
    """
    for beginning, tool in CLIENT_TOOLS.items():
        if kind.startswith(beginning):
            return tool
    if kind.startswith(_HOSTED):
        _log.warning("%s: %s is run by Anthropic's service and left out here", where, kind[:60])
        return None
    why = (
        "answers with screenshots, and this server takes text alone"
        if kind.startswith("computer_")
        else "is not known"
    )
    raise invalid(f"{where}.type: {kind[:40]} {why}", f"{where}.type", "unsupported_parameter")
