"""An answer's deltas become the items of a response, and the events that OpenAI documents for them."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from rvllm.api.generate.answer import AnswerDelta
from rvllm.api.http.errors import ApiError
from rvllm.api.schemas.answers import CompletionDetails, Usage
from rvllm.api.schemas.items import CALLS, Item
from rvllm.api.schemas.responses import (
    IncompleteDetails,
    InputDetails,
    ResponseAnswer,
    ResponseError,
    ResponseUsage,
)
from rvllm.text.tools.events import CallArguments, CallStart, Text

_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "custom_tool_call": "ctc"}
OnEvent = Callable[[str, dict[str, Any]], Awaitable[None]]


class ResponseWriter:
    """Fills a response from deltas; each step is told to `on_event` as (type, event)."""

    def __init__(self, response: ResponseAnswer, on_event: OnEvent) -> None:
        self.response = response
        self.begun = False
        self._on_event = on_event
        self._number = 0
        self._customs = {tool.name for tool in response.tools if tool.type == "custom"}
        self._open = ""  # the kind of the item being written, for calls with their number
        self._pieces: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._finish = ""

    async def begin(self) -> None:
        """Tells of the response, once."""
        if self.begun:
            return
        self.begun = True
        if self.response.status == "queued":
            await self._send("response.queued", response=self.response)
            self.response.status = "in_progress"
        else:
            await self._send("response.created", response=self.response)
        await self._send("response.in_progress", response=self.response)

    async def take(self, delta: AnswerDelta, usage: Usage, logprobs: list[dict[str, Any]]) -> None:
        """Takes the next delta, the tokens so far, and the log-probabilities of the delta's tokens."""
        await self.begin()
        self.response.usage = _usage(usage)
        if delta.reasoning:
            await self._enter("reasoning", {"summary": [], "content": []})
            await self._add(delta.reasoning, "response.reasoning_text.delta", content_index=0)
            logprobs = []
        for event in delta.events:
            if isinstance(event, Text):
                await self._text(event.text, logprobs)
            else:
                await self._call(event)
            logprobs = []
        if logprobs and self._open == "message":  # of text that is held back
            await self._text("", logprobs)
        self._finish = delta.finish_reason or self._finish

    async def finish(self) -> None:
        """Ends the response as its last chunk says."""
        response = self.response
        cut = self._finish == "length"
        await self._leave("incomplete" if cut else "completed")
        response.status = "incomplete" if cut else "completed"
        if cut:
            response.incomplete_details = IncompleteDetails("max_output_tokens")
        else:
            response.completed_at = int(time.time())
        await self._send(f"response.{response.status}", response=response)

    async def fail(self, error: ApiError) -> None:
        await self.begin()
        self.response.status = "failed"
        code = "server_error" if error.status >= 500 else str(error.code or "invalid_prompt")
        self.response.error = ResponseError(code, str(error))
        await self._send("response.failed", response=self.response)

    def abandon(self, error: ApiError | None = None) -> None:
        """Ends the response where it is, and tells nobody: cancelled, or failed with `error`."""
        if self._open:
            self._fill(self.response.output[-1], "incomplete")
        self.response.status = "cancelled"
        if error is not None:
            self.response.status, self.response.error = "failed", ResponseError("server_error", str(error))

    def _fill(self, item: Item, status: str) -> None:
        """Puts what has been written into its item."""
        text = "".join(self._pieces)
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = text
        elif item["type"] == "custom_tool_call":
            item["input"] = _input(text)
        else:
            item["content"] = [_part(item["type"], text, self._logprobs)]

    async def _text(self, text: str, entries: list[dict[str, Any]]) -> None:
        await self._enter("message", {"role": "assistant", "content": []})
        self._logprobs += entries
        await self._add(text, "response.output_text.delta", content_index=0, logprobs=entries)

    async def _call(self, event: CallStart | CallArguments) -> None:
        if isinstance(event, CallStart):
            item = {"call_id": event.id or "", "name": event.name}
            if event.name in self._customs:
                await self._enter(f"custom_tool_call {event.index}", item | {"input": ""})
            else:
                await self._enter(f"function_call {event.index}", item | {"arguments": ""})
        elif self._open.startswith("custom_tool_call"):  # its text is within JSON: told when it is whole
            self._pieces.append(event.text)
        elif event.text:
            await self._add(event.text, "response.function_call_arguments.delta")

    async def _enter(self, kind: str, item: Item) -> None:
        """Begins an item unless one of its kind is being written."""
        if self._open == kind:
            return
        await self._leave("completed")
        self._open = kind
        kind = kind.partition(" ")[0]
        prefix = _PREFIXES[kind]
        place = len(self.response.output)
        name = f"{prefix}_{self.response.id.removeprefix('resp_')}_{place}"
        item = {"id": name, "type": kind, "status": "in_progress", **item}
        self.response.output.append(item)
        await self._send("response.output_item.added", output_index=place, item=item)
        if kind not in CALLS:
            await self._send("response.content_part.added", **self._at(content_index=0), part=_part(kind))

    async def _add(self, text: str, event: str, **fields: Any) -> None:
        self._pieces.append(text)
        await self._send(event, **self._at(**fields), delta=text)

    async def _leave(self, status: str) -> None:
        """Ends the item being written."""
        if not self._open:
            return
        item, text = self.response.output[-1], "".join(self._pieces)
        kind = item["type"]
        self._fill(item, "in_progress")
        if kind == "function_call":
            done = {"name": item["name"], "arguments": text}
            await self._send("response.function_call_arguments.done", **self._at(), **done)
        elif kind == "custom_tool_call":
            name = "response.custom_tool_call_input"
            await self._send(f"{name}.delta", **self._at(), delta=item["input"])
            await self._send(f"{name}.done", **self._at(), input=item["input"])
        else:
            (part,) = item["content"]
            if kind == "message":
                done = {"text": text, "logprobs": list(self._logprobs)}
                await self._send("response.output_text.done", **self._at(content_index=0), **done)
            else:
                await self._send("response.reasoning_text.done", **self._at(content_index=0), text=text)
            await self._send("response.content_part.done", **self._at(content_index=0), part=part)
        item["status"] = status
        await self._send("response.output_item.done", output_index=len(self.response.output) - 1, item=item)
        self._open = ""
        self._pieces, self._logprobs = [], []

    def _at(self, **fields: Any) -> dict[str, Any]:
        output = self.response.output
        return {"item_id": output[-1]["id"], "output_index": len(output) - 1, **fields}

    async def _send(self, kind: str, **fields: Any) -> None:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        await self._on_event(kind, event)


def _input(arguments: str) -> str:
    """The text that a custom tool is given, from the arguments that stand for it; cut off, as they are."""
    try:
        found = json.loads(arguments)["input"]
    except (ValueError, KeyError, TypeError):
        return arguments
    return found if isinstance(found, str) else arguments


def _part(kind: str, text: str = "", logprobs: list[dict[str, Any]] | None = None) -> Mapping[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs or ())}


def _usage(usage: Usage) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputDetails(usage.prompt_tokens_details.cached_tokens),
        output_tokens=usage.completion_tokens,
        output_tokens_details=usage.completion_tokens_details or CompletionDetails(),
        total_tokens=usage.total_tokens,
    )


def snapshot(event: dict[str, Any]) -> dict[str, Any]:
    """The event as it is now: the response and items in it go on changing."""
    frozen: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(event))
    return frozen
