"""Batches through the official `openai` client."""

from __future__ import annotations

import json
from typing import Any

import openai

from support.waiting import until

CHAT = "/v1/chat/completions"


def chat_line(name: str, **body: Any) -> dict[str, Any]:
    """A line that asks for a few tokens."""
    full = {"model": "tiny", "messages": [{"role": "user", "content": name}], "max_tokens": 3, **body}
    return {"custom_id": name, "method": "POST", "url": CHAT, "body": full}


def jsonl(*lines: Any) -> bytes:
    return "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines).encode() + b"\n"


def start(client: openai.OpenAI, *lines: Any, url: Any = CHAT) -> str:
    """Uploads the lines; the batch's name."""
    file = client.files.create(file=("input.jsonl", jsonl(*lines)), purpose="batch")
    made = client.batches.create(input_file_id=file.id, endpoint=url, completion_window="24h",
                                 metadata={"who": "me"})  # fmt: skip
    return made.id


def completed(client: openai.OpenAI, name: str) -> int:
    """Lines that are done."""
    counts = client.batches.retrieve(name).request_counts
    return counts.completed if counts is not None else 0


def ended(client: openai.OpenAI, name: str) -> Any:
    """The batch, once nothing of it runs."""

    def look() -> Any:
        found = client.batches.retrieve(name)
        return None if found.status in ("validating", "in_progress", "finalizing", "cancelling") else found

    return until(look)


def run(client: openai.OpenAI, *lines: Any, url: Any = CHAT) -> Any:
    return ended(client, start(client, *lines, url=url))


def results(client: openai.OpenAI, file: str) -> list[Any]:
    """The lines of a file of results."""
    return [json.loads(line) for line in client.files.content(file).text.splitlines()]
