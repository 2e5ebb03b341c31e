"""CUDA graphs per padded step size, captured on first use or all at start.

A step of decodes alone is one graph. A step with prompts is two: a body that ends with the hidden rows,
per padded token count, and a head from there to the drawn tokens, per padded number of sampled rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from rvllm.backends.cuda.buckets import MIXED_TOKENS, bucket_of, decode_buckets, mixed_tokens, token_buckets
from rvllm.backends.cuda.device.catalog import Catalog
from rvllm.backends.cuda.device.driver import DeviceFacts, Graph, Stream
from rvllm.backends.cuda.device.graphs import GraphCache, Key
from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.backends.cuda.device.launches import Counts, Planned, kernel_names
from rvllm.backends.cuda.formats.fp8 import quantised_buffers
from rvllm.backends.cuda.layout.addresses import Addresses
from rvllm.backends.cuda.layout.allocations import nowhere
from rvllm.backends.cuda.layout.fusion import Stage, fuse
from rvllm.backends.cuda.layout.joining import joined
from rvllm.backends.cuda.layout.last_rows import gathered_early
from rvllm.backends.cuda.layout.memory import Budget, MemoryPlan, plan_memory
from rvllm.backends.cuda.layout.metadata import Layout
from rvllm.backends.cuda.layout.packed import PackedWeight
from rvllm.backends.cuda.layout.weights import packed_weights
from rvllm.backends.cuda.lowering import lower
from rvllm.backends.cuda.ops.attention.launches import turns
from rvllm.backends.cuda.ops.attention.plan import DecodePlan, PrefillPlan
from rvllm.backends.cuda.ops.decode import chains
from rvllm.backends.cuda.ops.decode.one import MAX_WIDTH
from rvllm.backends.cuda.ops.family import Lowering, TileShape
from rvllm.backends.cuda.ops.gemm.plan import planned_cycles
from rvllm.backends.cuda.ops.gemm.strategy import GemmStrategy
from rvllm.backends.cuda.paged import decode_plans, prefill_plans, tile_shape
from rvllm.config import EngineConfig
from rvllm.errors import UsageError
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Embed, GatherRows, LatentAttention, Linear, Logits, Program, Sample
from rvllm.program.ops.moe import Experts
from rvllm.telemetry.stats import StepKernel


@dataclass(frozen=True)
class StepPlanner:
    """All that planning a step's launches needs; no device is touched."""

    dtype: DType
    chip: DeviceInfo
    addresses: Addresses
    memory: MemoryPlan
    stages: Sequence[Stage]
    prefill: dict[str, PrefillPlan]
    tiles: TileShape | None
    strategy: GemmStrategy
    quantised: frozenset[str]
    path: str = "batched"

    @staticmethod
    def plan(
        program: Program,
        config: EngineConfig,
        facts: DeviceFacts,
        budget: Budget,
        strategy: GemmStrategy | None = None,
    ) -> tuple[StepPlanner, list[PackedWeight]]:
        """The planner of a program on such a GPU, at addresses of nothing, and the weights it wants.

        strategy: of products, as it was tuned; None: as `config` names it. Raises MissingKernelError,
        CapacityError or UsageError.
        """
        program = gathered_early(joined(program))
        strategy = strategy or GemmStrategy(config.gemm_strategy)
        stages = fuse(program, gated_epilogue=strategy.fuses_gates)
        wanted = packed_weights(stages, strategy.layout)
        chip = facts.info
        prefill = prefill_plans(program.ops, program.dtype, chip)
        tiles = tile_shape(program.ops, prefill)
        memory = plan_memory(program, stages, config, facts, budget, tiles, wanted, strategy)
        planner = StepPlanner(
            dtype=program.dtype,
            chip=chip,
            addresses=nowhere(memory.allocations, memory.workspace),
            memory=memory,
            stages=stages,
            prefill=prefill,
            tiles=tiles,
            strategy=strategy,
            quantised=quantised_buffers(stages, chip.capability),
            path=config.decode_path,
        )
        planner._check_path(program.architecture)
        return planner, wanted

    def _check_path(self, architecture: str) -> None:
        """Raises UsageError where the decode path joins nothing in this program; says which do."""
        if self.path not in chains.PATHS:
            return
        there = ["batched", *(p for p in chains.PATHS if chains.used(replace(self, path=p).decode(1), p))]
        if self.path not in there:
            raise UsageError(
                f"--decode-path {self.path} does not exist for {architecture} with these weights; "
                f"there are {', '.join(there)}"
            )

    def decode(self, seqs: int) -> list[Planned]:
        """A step of up to `seqs` sequences with one token each."""
        counts = Counts(seqs, seqs, seqs)
        lowering = self._lowering(
            self.decode_layout(seqs), counts, prefill=False, decode=self._decode_plans(seqs)
        )
        planned = [*lowering.begin(), *lower(lowering, self.stages)]
        return planned if seqs > 1 else lowering.joiner().joined(planned)

    def body(self, tokens: int) -> list[Planned]:
        """A step of up to `tokens` tokens, up to the rows whose logits are wanted."""
        lowering = self._lowering(self.memory.layout, Counts(tokens, self.memory.shape.seqs, 0), prefill=True)
        return [*lowering.begin(), *lower(lowering, self.stages[: self._cut()])]

    def head(self, samples: int) -> list[Planned]:
        """From the hidden rows to the drawn tokens, for up to `samples` rows."""
        lowering = self._lowering(self.memory.layout, Counts(0, 0, samples), prefill=False)
        return lower(lowering, self.stages[self._cut() :])

    def decode_layout(self, seqs: int) -> Layout:
        return replace(self.memory.layout, tokens=seqs, seqs=seqs, samples=seqs, tiles=0)

    def decode_sizes(self) -> list[int]:
        """Padded batch sizes of decode graphs."""
        return decode_buckets(self.memory.shape.seqs)

    def token_sizes(self) -> list[int]:
        """Padded token counts of bodies."""
        return token_buckets(self.memory.shape.tokens)

    def mixed_tokens(self) -> int:
        """The most tokens of a step with decodes that are best for this program; see `buckets.mixed_tokens`.

        Known for products of 16-bit weights by our own kernels for sm_90a.
        """
        ops = [stage.ops[0] for stage in self.stages]
        products = [op for op in ops if isinstance(op, Linear) and op.x.rows == "tokens"]
        ours = self.chip.capability == 90 and self.strategy.name == "native"
        if not ours or any(op.weight.format for op in products) or any(isinstance(op, Experts) for op in ops):
            return MIXED_TOKENS
        weights = Counter((op.weight.shape[0], op.weight.shape[-1]) for op in products)
        sms = self.chip.sm_count
        return mixed_tokens(
            self.token_sizes(),
            lambda tokens: sum(n * planned_cycles(*shape, tokens, sms) for shape, n in weights.items()),
        )

    def sample_sizes(self) -> list[int]:
        """Padded row counts of heads."""
        return decode_buckets(self.memory.shape.samples)

    def kernels(self) -> list[str]:
        """Every kernel any step can need; raises MissingKernelError where an op has none."""
        names: list[str] = []
        few = replace(self, stages=distinct(self.stages))
        for plan, sizes in (
            (few.decode, self.decode_sizes()),
            (few.body, self.token_sizes()),
            (few.head, self.sample_sizes()),
        ):
            for size in sizes:
                names += kernel_names(plan(size))
        if self.path in chains.PATHS:  # what is joined with what depends on all of a step
            names += kernel_names(self.decode(1))
        return list(dict.fromkeys(names))

    def _cut(self) -> int:
        cuts = (i for i, s in enumerate(self.stages) if isinstance(s.ops[0], GatherRows))
        return next(cuts, len(self.stages))

    def _decode_plans(self, seqs: int) -> dict[str, DecodePlan]:
        """How each layer's decode attention is launched for at most `seqs` sequences."""
        ops = (op for stage in self.stages for op in stage.ops)
        memory = self.memory
        last = [(s.ops[0], s.ops[-1]) for s in self.stages]
        rotating = {attention.name for rope, attention in last if turns(rope, attention)}
        return decode_plans(
            ops, self.dtype, self.chip, seqs, memory.longest, memory.shape.kv_blocks, rotating
        )

    def _lowering(
        self,
        layout: Layout,
        counts: Counts,
        *,
        prefill: bool,
        decode: dict[str, DecodePlan] | None = None,
    ) -> Lowering:
        return Lowering(
            self.dtype,
            self.chip,
            self.memory.shape,
            self.addresses,
            layout,
            counts,
            self.memory.decode if decode is None else decode,
            self.prefill if prefill else None,
            self.strategy,
            self.quantised,
            self.path,
            leaves_best(self.stages),
            self.chip.capability == 90 and self.path not in chains.PATHS and stands_alone(self.stages),
        )


def stands_alone(stages: Sequence[Stage]) -> bool:
    """Whether one token's products are quicker as launches of their own, see `ops/decode/one.py`."""
    ops = [op for stage in stages for op in stage.ops]
    widths = [op.out.width for op in ops if isinstance(op, Embed)]
    return (
        bool(widths) and max(widths) <= MAX_WIDTH and not any(isinstance(op, LatentAttention) for op in ops)
    )


def leaves_best(stages: Sequence[Stage]) -> bool:
    """Whether nothing stands between the logits and the draw; see `Lowering`."""
    kinds = [type(stage.ops[0]) for stage in stages]
    return (Logits, Sample) in pairwise(kinds)


def distinct(stages: Sequence[Stage]) -> list[Stage]:
    """One stage of each make: equal but for names, so that a plan of these uses the same kernels."""
    found: dict[str, Stage] = {}
    for stage in stages:
        found.setdefault(re.sub(r"layers\.\d+", "", repr(stage)), stage)
    return list(found.values())


class GraphBook(GraphCache):
    """The captured graphs of a planner."""

    def __init__(self, planner: StepPlanner, catalog: Catalog, stream: Stream) -> None:
        super().__init__(catalog, stream)
        self._planner = planner
        self._decode_sizes = planner.decode_sizes()
        self._token_sizes = planner.token_sizes()
        self._sample_sizes = planner.sample_sizes()
        self._last: list[Key] = []  # the graphs of the step asked for last
        kinds = {"head": self._sample_sizes, "decode": self._decode_sizes, "body": self._token_sizes}
        self._ahead: Iterator[Key] = iter([(kind, size) for kind, sizes in kinds.items() for size in sizes])

    def captured(self) -> dict[str, float]:
        """A figure of 1 for each graph there is, by kind and padded size; see `Backend.stats`."""
        return {f'rvllm:cuda_graph_captured{{kind="{k}",size="{size}"}}': 1.0 for k, size in self}

    def last_kernels(self) -> list[StepKernel]:
        """The kernels of the step whose graphs were asked for last, in the order of first use."""
        return [kernel for key in self._last for kernel in self.kernels(key)]

    def decode_size(self, seqs: int) -> int:
        """The padded batch size for `seqs` decodes."""
        return bucket_of(self._decode_sizes, seqs)

    def decode(self, size: int) -> Graph:
        """The graph of a decode step of `size` (a padded size) sequences."""
        self._last = [("decode", size)]
        return self.get("decode", size, self._planner.decode, Counts(size, size, size))

    def body_size(self, tokens: int) -> int:
        """The padded token count for `tokens` tokens."""
        return bucket_of(self._token_sizes, tokens)

    def body(self, tokens: int) -> Graph:
        """The graph that computes the hidden rows of up to `tokens` tokens."""
        size = self.body_size(tokens)
        self._last = [("body", size)]
        counts = Counts(size, self._planner.memory.shape.seqs, 0)
        return self.get("body", size, self._planner.body, counts)

    def head(self, samples: int) -> Graph:
        """The graph from hidden rows to tokens for up to `samples` rows."""
        size = bucket_of(self._sample_sizes, samples)
        self._last = [*self._last[:1], ("head", size)]
        return self.get("head", size, self._planner.head, Counts(0, 0, size))

    def capture_next(self) -> bool:
        """Captures one of the graphs that are not there yet; False when all are."""
        last = self._last
        for key in self._ahead:
            if key not in self:
                kind, size = key
                {"decode": self.decode, "body": self.body, "head": self.head}[kind](size)
                self._last = last
                return True
        return False

    def capture_all(self) -> None:
        while self.capture_next():
            pass
