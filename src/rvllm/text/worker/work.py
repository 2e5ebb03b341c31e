"""Work on texts that somebody else wrote: who does it, and what happens when it takes too much.

Tokenising, rendering chat templates and compiling grammars run native and foreign code over what a client
sent. A server lets `WorkerPool` do it in processes that may be killed; a program on its user's own texts
does it where it is (`InProcess`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from rvllm.text.tokenizers.tokenizer import Tokenizer

P = ParamSpec("P")
T = TypeVar("T")

IN_THREAD = 5_000  # characters or bytes: larger work is done beside the event loop
LARGE = 100_000  # work of this size, and all whose size says nothing of its time, leaves workers to the rest
asking: ContextVar[str] = ContextVar("rvllm_asking", default="")  # the client whose work it is

Task = Callable[Concatenate[Tokenizer, P], T]
"""A function of a module, called with the tokenizer and whatever else it takes; it returns a text, numbers,
a list of these, or None."""


class TextWork(Protocol):
    """Does tasks."""

    async def run(self, task: Task[P, T], what: str, size: int, /, *args: P.args, **options: P.kwargs) -> T:
        """What the task returns.

        what: the request's field that it is about, for errors. size: characters or bytes of the input;
        LARGE for a grammar, whose size does not tell how long it takes.
        Raises what the task raises (RvllmError); LimitError when it takes more than it may,
        UnavailableError when nobody can do it.
        """


class InProcess:
    """Does tasks in this process, large ones in a thread: for texts of the process's own user."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    async def run(self, task: Task[P, T], what: str, size: int, /, *args: P.args, **options: P.kwargs) -> T:
        """See `TextWork`."""
        if size < IN_THREAD:
            return task(self._tokenizer, *args, **options)
        return await asyncio.to_thread(task, self._tokenizer, *args, **options)
