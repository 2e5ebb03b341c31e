"""What each step of an engine was and where its time went, as JSON, one line a step (--trace-steps)."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from rvllm.errors import UsageError

FLAG = "--trace-steps"
BUFFER = 1 << 18  # bytes of lines that are kept before they are written


class TracedStep(msgspec.Struct, kw_only=True):
    """A step. Times are seconds, `began` since the trace began; the host's are of the engine's one thread."""

    step: int
    began: float = 0.0
    decodes: int = 0  # sequences that take part with one token each
    prompts: int = 0  # sequences of which a part of the prompt is computed
    prompt_tokens: int = 0
    keys: int = 0  # tokens that the decodes attend to
    draws: int = 0  # tokens drawn
    running: int = 0  # sequences with a slot
    waiting: int = 0  # requests without
    alone: bool = False  # no other step was under way when it was launched
    outside: float = 0.0  # from the end of what the engine did before: messages, or waiting for some
    schedule: float = 0.0
    launch: float = 0.0  # capturing included
    capture: float = 0.0  # of graphs that were not there yet
    collect: float = 0.0  # waiting for the device
    update: float = 0.0  # booking what it gave
    device: float = 0.0
    idle: float = 0.0  # of the device, from the end of the step before to its begin
    padded: int = 0  # tokens that its graph computes
    graphs: str = ""

    @property
    def tokens(self) -> int:
        return self.decodes + self.prompt_tokens

    @property
    def kind(self) -> str:
        """decodes, prompts, or both."""
        if not self.prompts:
            return "decodes"
        return "mixed" if self.decodes else "prompts"


class StepTrace:
    """Writes steps behind what a file holds, as they are collected.

    Raises UsageError where it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._encode = msgspec.json.Encoder().encode
        try:
            self._file = path.open("ab", buffering=BUFFER)
        except OSError as error:
            raise UsageError(f"{FLAG}: cannot write {path}: {error.strerror}") from None
        self._began = self._ended = time.perf_counter()

    def launched(self, step: TracedStep, began: float, scheduled: float, launched: float) -> None:
        """Books the host's times of a step: when scheduling began and ended, and the launch."""
        step.began, step.outside = began - self._began, began - self._ended
        step.schedule, step.launch = scheduled - began, launched - scheduled

    def collected(self, step: TracedStep) -> None:
        """Writes a step of which all is known."""
        self._file.write(self._encode(step) + b"\n")

    def ended(self) -> None:
        """The engine turns to its messages."""
        self._ended = time.perf_counter()

    def close(self) -> None:
        self._file.close()


def read_steps(path: Path) -> list[TracedStep]:
    """What a `StepTrace` wrote; a last line that was cut off is left out.

    Raises UsageError for other files.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    decode = msgspec.json.Decoder(TracedStep).decode
    try:
        return [decode(line) for line in lines[:-1]]
    except msgspec.MsgspecError as error:
        raise UsageError(f"{path} holds no steps as {FLAG} writes them: {error}") from None
