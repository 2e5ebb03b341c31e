"""The contract between the engine and whatever computes: a flat batch of tokens in, sampled tokens out.

The engine gives every running sequence a slot (0 .. max_num_seqs - 1) for as long as it runs. What a
sequence carries from step to step (its last sampled token, its block table, its sampling parameters, its
token counts for penalties) lives in the backend under that slot, so that a step can be launched before
the host has read the tokens of the step before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import msgspec
import numpy as np
from numpy.typing import NDArray

from rvllm.kernels.constants import constants
from rvllm.telemetry.stats import StepKernel
from rvllm.telemetry.step_trace import TracedStep

Int32 = NDArray[np.int32]
Progress = Callable[[float, str], None]  # part done, 0 to 1; what is being done

_SAMPLING = constants("sampling/sampling.cuh")
KV_BLOCK = constants("attention/kv_block.cuh")["KV_BLOCK"]  # tokens of a block, on every device
BROKEN_ROW = constants("sampling/sample.cu")["BROKEN_ROW"]  # in place of a token
MAX_BIASES = _SAMPLING["MAX_BIASES"]  # entries of a request's logit_bias that a slot has room for
MAX_STOPS = _SAMPLING["MAX_STOPS"]  # token ids that min_tokens can hold back
MOVE_OUT, MOVE_IN, COPY, SAVE, RESTORE = range(5)  # kinds of StepBatch.moves
LAST_SAMPLED = -1  # in StepBatch.tokens: the token this slot sampled last, which only the device may know


class SamplingSpec(msgspec.Struct, frozen=True, array_like=True):
    """How one slot draws its tokens. Neutral values switch a step off.

    The token at output index i (0-based, counted from the end of the prompt) depends on the logits, the seed
    and i alone, so a seed gives the same tokens in any batch. Where top_k, top_p and min_p filter nothing, it
    is the largest of logit / temperature + Gumbel noise of the id; else the uniform number
    philox4x32-10(key = seed, counter = i) / 2^32 inverts the cumulative distribution in order of token id.
    """

    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0  # 64 bits
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0  # `stop_token_ids` cannot be drawn before so many tokens
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None  # None: none; k: the drawn token's and the k most likely ones'


@dataclass(frozen=True, slots=True)
class SlotStart:
    """A sequence takes a slot, anew or after preemption.

    tokens: all its token ids so far (the prompt, and the output before a preemption); penalties count them.
    prompt_len: how many of `tokens` are the prompt.
    """

    slot: int
    sampling: SamplingSpec
    tokens: Int32
    prompt_len: int


@dataclass(slots=True)
class StepBatch:
    """One step: for each of S sequences a run of tokens whose keys and values are to be computed.

    slots, query_lens, starts: int32 [S]; sequence s contributes query_lens[s] tokens at positions
    starts[s], starts[s] + 1, ... Decodes come first (query_lens 1), prefill chunks after them.
    tokens: int32 [T], T = sum(query_lens); LAST_SAMPLED stands only where a decode's input is the token
    that its slot sampled in the step before.
    sample: bool [S]; whether a token is drawn from the sequence's last row (false for all but the last
    chunk of a prompt).
    moves: int32 [M, 3] rows (kind, block, other) of KV blocks to copy, in their order and after the moves of
    earlier steps, before anything of this one: MOVE_OUT from device block `block` to host block `other`,
    MOVE_IN from host block `other` to device block `block`, COPY from device block `block` to device block
    `other`; and of the states of recurrent layers: SAVE slot `block`'s to snapshot `other`, RESTORE them from
    there. What moves out was written by steps that are collected, and no step under way writes it.
    moves_after: the last step that may use a block that these moves write; later ones may still run.
    moves_ahead: how many of the moves, the last ones, all MOVE_OUT, need only be made before the next step.
    started: slots taken since the last step; they come before anything else is done but the moves.
    new_blocks: int32 [B, 3] rows (slot, index, block): block-table entries to set before the step. A
    SlotStart empties the slot's table first.
    prompt_logprobs: per sequence index s, how many top logprobs to report for each token of the chunk
    given its predecessors (0: only the token's own); rows 0 .. query_len - 1 predict the next token.
    masks: per sequence index s, a packed bitmask uint32 [ceil(vocab / 32)] of tokens that may be drawn.
    seconds: for pairs of texts, per sequence index s, the row of it at which the second text begins.
    """

    step: int
    slots: Int32
    query_lens: Int32
    starts: Int32
    tokens: Int32
    sample: NDArray[np.bool_]
    started: list[SlotStart] = field(default_factory=list)
    new_blocks: Int32 = field(default_factory=lambda: np.empty((0, 3), dtype=np.int32))
    moves: Int32 = field(default_factory=lambda: np.empty((0, 3), dtype=np.int32))
    moves_after: int = -1
    moves_ahead: int = 0
    prompt_logprobs: dict[int, int] = field(default_factory=dict)
    masks: dict[int, NDArray[np.uint32]] = field(default_factory=dict)
    seconds: dict[int, int] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """T, the number of rows of the flat batch."""
        return len(self.tokens)


class TokenLogprobs(msgspec.Struct, array_like=True, gc=False):
    """Log-probabilities of one position: the token's own, its rank (1 is best), the top ones in order.

    They are those before temperature and filters, as OpenAI and vLLM report them.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(slots=True)
class StepResult:
    """What a step drew: tokens int32 [S], -1 where nothing was sampled, BROKEN_ROW where a logit is infinite
    or no number, so that no token can be drawn."""

    step: int
    tokens: Int32
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # by sequence index s
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)  # by s: one a row that has
    # a next token within what the SlotStart gave
    device_seconds: float = 0.0  # time the device spent on the step, 0 where it is not measured


@dataclass(frozen=True, slots=True)
class Limits:
    """What the backend was built for; the scheduler never exceeds it."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    num_blocks: int  # KV blocks to hand out, ids 0 .. num_blocks - 1
    pipeline_depth: int  # steps that may be launched before the oldest must be collected: 1 is synchronous
    max_mixed_tokens: int = 0  # of a step in which sequences decode; 0: max_num_batched_tokens
    num_cpu_blocks: int = 0  # KV blocks in host memory, ids 0 .. num_cpu_blocks - 1
    block_move_seconds: float = 0.0  # that a block takes from one memory to the other
    block_copies: bool = False  # whether a step may bring COPY moves
    prefix_reuse: bool = True  # whether its blocks are all that a sequence needs to go on from a prefix
    num_snapshots: int = 0  # of recurrent states, with which blocks are all that it needs, too


class LedgerLine(msgspec.Struct, frozen=True, rename={"nbytes": "bytes"}):
    """One line of the memory ledger, in bytes."""

    name: str
    nbytes: int


class Backend(Protocol):
    """A loaded model on a device: what every one has. It is a `Generator` or an `Encoder` too."""

    @property
    def name(self) -> str:
        """`cpu` or the GPU's name."""

    @property
    def limits(self) -> Limits:
        """Capacities, fixed for the backend's life."""

    def ledger(self) -> list[LedgerLine]:
        """Where the memory went, line by line."""

    def last_kernels(self) -> list[StepKernel]:
        """The kernels of the last step, for people who watch."""

    def stats(self) -> dict[str, float]:
        """Counters and gauges for the metrics page (idle share, graph buckets, ...), by metric name.

        A name may carry labels: `rvllm:cuda_graph_captured{kind="decode",size="8"}`.
        """

    def close(self) -> None:
        """Gives everything back; the backend is unusable afterwards."""


@runtime_checkable
class Generator(Backend, Protocol):
    """A model that draws tokens."""

    def launch(self, batch: StepBatch) -> Any:
        """Starts a step and returns a handle for `collect`; never waits for the device."""

    def collect(self, handle: Any) -> StepResult:
        """Waits for a launched step; steps are collected in the order they were launched."""

    def decode_floor(self, seqs: int, context: int) -> float | None:
        """Least seconds that a decode step of `seqs` sequences of `context` tokens can take, where known."""


@runtime_checkable
class Encoder(Backend, Protocol):
    """A model that computes whole texts."""

    def embed(self, batch: StepBatch) -> NDArray[np.float32]:
        """A vector or the numbers of its classes a sequence, float32 [S, width]."""

    def embed_tokens(self, batch: StepBatch) -> list[NDArray[np.float32]]:
        """By sequence, each token's row as it is, or the numbers of its classes: float32 [L, width]."""


@runtime_checkable
class Preparable(Protocol):
    """A backend that can do ahead what later steps would wait for."""

    def prepare(self) -> bool:
        """Does a little of it, in some 10 ms; False when nothing is left. Called between steps alone."""


@runtime_checkable
class Traceable(Protocol):
    """A backend that knows more of a step than its result."""

    def describe(self, handle: Any, step: TracedStep) -> None:
        """Fills in what it knows of a step that has just been collected; see `TracedStep`."""


@runtime_checkable
class Droppable(Protocol):
    """A backend that can give up less than everything."""

    def drop_caches(self, kept: Sequence[int] = ()) -> bool:
        """Gives back the memory of KV blocks and states, and loses what they held; False where that cannot be
        done without closing, and nothing has happened.

        kept: blocks whose contents are there again after `take_caches`; with any, states are, too.
        """

    def take_caches(self) -> None:
        """Takes the memory again. Raises CapacityError when it is not there any more."""
