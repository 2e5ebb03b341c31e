"""The sampler's arrays on the device: logits, the slots' state, and what logprobs need."""

from __future__ import annotations

from dataclasses import dataclass

from rvllm.backends.cuda.layout.addresses import Shape
from rvllm.backends.cuda.layout.allocations import Allocation
from rvllm.backends.cuda.ops.sampling.slots import MAX_TOP, StateSizes


@dataclass(frozen=True)
class LogprobArrays:
    """Device arrays of the logprobs kernel for up to `rows` entries, one behind the other from `entries` on.

    entries int32 [4, rows]: row, target, wanted, and the count in the last line's first word. Behind them
    token float32 [rows], ranks int32 [rows], top_ids int32 and top float32 [rows, MAX_TOP], which one copy
    fetches.
    """

    rows: int
    entries: int = 0

    @property
    def entry_bytes(self) -> int:
        return 16 * self.rows

    @property
    def token(self) -> int:
        """Address of token, and of all that is fetched."""
        return self.entries + self.entry_bytes

    @property
    def ranks(self) -> int:
        return self.token + 4 * self.rows

    @property
    def top_ids(self) -> int:
        return self.ranks + 4 * self.rows

    @property
    def top(self) -> int:
        return self.top_ids + 4 * MAX_TOP * self.rows

    @property
    def result_bytes(self) -> int:
        """Bytes from `token` to the end of `top`."""
        return self.rows * (8 + 8 * MAX_TOP)


def logits_allocations(shape: Shape) -> list[Allocation]:
    """Logits as they come, and as they are drawn from."""
    return [Allocation(f, "logits", 4 * shape.samples * shape.logits_stride) for f in ("logits", "scaled")]


def allocations(shape: Shape) -> list[Allocation]:
    """The slots' state, a step's tokens and masks, and logprobs."""
    sizes, line = StateSizes(shape.seqs, shape.vocab), "sampler"
    logprobs = LogprobArrays(shape.samples)
    return [
        Allocation("parameters", line, sizes.parameters, zeroed=True),
        Allocation("histories", line, sizes.histories),
        Allocation("bias_ids", line, sizes.biases),
        Allocation("biases", line, sizes.biases),
        Allocation("stops", line, sizes.stops),
        Allocation("bests", line, 8 * sizes.chunks() * shape.samples),
        Allocation("tokens", line, 4 * shape.samples, zeroed=True),
        Allocation("last_tokens", line, 4 * shape.seqs, zeroed=True),
        Allocation("masks", line, 4 * shape.samples * shape.mask_words),
        Allocation("scores", line, logprobs.entry_bytes + logprobs.result_bytes),
    ]
