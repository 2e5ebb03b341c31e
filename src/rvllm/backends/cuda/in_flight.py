"""Host memory and events of the steps under way."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import numpy as np

from rvllm.backends.base import StepBatch
from rvllm.backends.cuda.device.catalog import Catalog
from rvllm.backends.cuda.device.driver import Event, Launch, Pinned, Stream
from rvllm.backends.cuda.layout.memory import MemoryPlan
from rvllm.backends.cuda.layout.metadata import SampledRows
from rvllm.backends.cuda.ops.sampling.arrays import LogprobArrays

_NONE = np.zeros(0, dtype=np.int32)
NOTHING = StepBatch(-1, _NONE, _NONE, _NONE, _NONE, np.zeros(0, dtype=np.bool_))
KERNEL = "sm80_copy_words"
FETCHED = 32 << 10  # bytes of metadata up to which a kernel fetches them; the copy engine takes longer


class Sender:
    """Sends a step's metadata to the device."""

    def __init__(self, catalog: Catalog, stream: Stream, target: int) -> None:
        self._stream, self._target = stream, target
        self._source, self._pieces = ctypes.c_void_p(0), ctypes.c_int(0)
        self._launch = Launch(catalog[KERNEL], 256, 0, [target, self._source, self._pieces], pdl=False)

    def send(self, metadata: Pinned, used: int) -> None:
        """Queues the copy of the first `used` bytes."""
        if used > FETCHED:
            self._stream.copy_to_device(self._target, metadata.address, used)
            return
        self._source.value, self._pieces.value = metadata.device_address, -(-used // 16)
        self._launch.run(self._stream, (-(-self._pieces.value // 256), 1, 1))


@dataclass
class InFlightStep:
    """One step's pinned images and events; reused round robin once the step has been collected.

    began and ended enclose the step's graphs, done comes after the copies to the host. asked: for each
    entry of the logprobs kernel the sequence it belongs to, the token of the prompt that it scores, or -1,
    and how many top tokens it wants. follows: the step before this one, when that was a decode step still
    under way. before: the step before this one, of whatever kind. padded: tokens that its graph computes.
    capture_seconds: what capturing its graphs took.
    """

    metadata: Pinned
    tokens: Pinned
    entries: Pinned
    scores: Pinned
    began: Event
    ended: Event
    done: Event
    masks: Pinned | None = None
    wide: Pinned | None = None  # rows of logits, where more of them is wanted than the kernel reports
    batch: StepBatch = field(default_factory=lambda: NOTHING)
    rows: SampledRows = field(default_factory=lambda: SampledRows.of(NOTHING))
    asked: list[tuple[int, int, int]] = field(default_factory=list)
    decode: bool = False
    follows: InFlightStep | None = None
    before: InFlightStep | None = None
    padded: int = 0
    capture_seconds: float = 0.0

    @property
    def under_way(self) -> bool:
        """Whether it holds a step that has not been collected."""
        return self.batch is not NOTHING

    @staticmethod
    def create(plan: MemoryPlan) -> InFlightStep:
        """Pinned memory for the largest step of the plan."""
        logprobs = LogprobArrays(plan.shape.samples)
        return InFlightStep(
            metadata=Pinned(plan.layout.nbytes),
            tokens=Pinned(4 * plan.shape.samples),
            entries=Pinned(logprobs.entry_bytes),
            scores=Pinned(logprobs.result_bytes),
            began=Event(),
            ended=Event(),
            done=Event(),
        )

    def close(self) -> None:
        """Frees memory and events."""
        for pinned in (self.metadata, self.tokens, self.entries, self.scores, self.masks, self.wide):
            if pinned is not None:
                pinned.close()
        for event in (self.began, self.ended, self.done):
            event.close()
