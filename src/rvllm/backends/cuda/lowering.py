"""From fused stages to planned launches: one kernel for each stage, or a list of what lacks one."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from rvllm.backends.cuda.addresses import Addresses, Shape
from rvllm.backends.cuda.attention import DecodePlan, PrefillPlan
from rvllm.backends.cuda.chip import Chip
from rvllm.backends.cuda.cublas import KERNEL as CUBLAS
from rvllm.backends.cuda.cublas import Matmul
from rvllm.backends.cuda.families import Emitter, Scratch
from rvllm.backends.cuda.fuse import Stage
from rvllm.backends.cuda.gemm import Kind, gated_rows, gemm_arguments, plan_gemm
from rvllm.backends.cuda.launches import Count, Counts, GridOf, MatrixMap, Planned, fixed
from rvllm.backends.cuda.lower_encoder import EMITTERS as ENCODER
from rvllm.backends.cuda.lower_encoder import scratch as encoder_scratch
from rvllm.backends.cuda.lower_experts import EMITTERS as EXPERTS
from rvllm.backends.cuda.lower_experts import scratch as experts_scratch
from rvllm.backends.cuda.lower_latent import EMITTERS as LATENT
from rvllm.backends.cuda.lower_latent import scratch as latent_scratch
from rvllm.backends.cuda.lower_recurrent import EMITTERS as RECURRENT
from rvllm.backends.cuda.lower_recurrent import scratch as recurrent_scratch
from rvllm.backends.cuda.metadata import NUM_DECODES, NUM_SAMPLES, NUM_TOKENS, Layout
from rvllm.backends.cuda.placement import Form
from rvllm.backends.cuda.sampling import CHUNK, PICK_THREADS, SCAN_WARPS
from rvllm.errors import MissingKernelError
from rvllm.kernels.ops_manifest import norm_add_norm_kernel, norm_kernel
from rvllm.program.dtypes import DType
from rvllm.program.ops import (
    Activate,
    Add,
    Attention,
    BlockSparseAttention,
    ClampedGate,
    Embed,
    GatedActivation,
    GatherRows,
    Linear,
    Logits,
    Norm,
    Op,
    Program,
    RopeKV,
    Route,
    Sample,
    Weight,
)

BLOCK = 256  # threads of elementwise kernels
GATED_KIND = {"silu": Kind.GATED_SILU, "gelu": Kind.GATED_GELU, "gelu_tanh": Kind.GATED_GELU_TANH}
ACT_KIND = {
    "silu": Kind.ACT_SILU, "gelu": Kind.ACT_GELU, "gelu_tanh": Kind.ACT_GELU_TANH, "relu": Kind.ACT_RELU,
    "relu2": Kind.ACT_RELU2,
}  # fmt: skip
FAMILIES: dict[type[Op], Emitter] = {**EXPERTS, **LATENT, **RECURRENT, **ENCODER}
LOWERED: tuple[type[Op], ...] = (
    Embed, Norm, Linear, RopeKV, Attention, GatedActivation, Activate, Add, GatherRows, Logits, Sample,
    *FAMILIES,
)  # fmt: skip


def scratch_of(program: Program, tokens: int, seqs: int) -> Scratch:
    """Device memory that families of ops need beside the program's buffers, in bytes by name."""
    found: Scratch = {}
    for sizes in (experts_scratch, latent_scratch, recurrent_scratch, encoder_scratch):
        found |= sizes(program, tokens, seqs)
    return found


def refuse_unknown(program: Program) -> None:
    """Raises MissingKernelError listing, by kind, every op of the program that no CUDA kernel computes."""
    unknown = Counter(op.kind for op in program.ops if not isinstance(op, LOWERED))
    if unknown:
        listed = ", ".join(f"{kind} ({count}x)" for kind, count in unknown.items())
        raise MissingKernelError(
            f"{program.architecture} needs ops that have no CUDA kernel: {listed}; run it with --device cpu"
        )


class Lowering:
    """Turns stages into launches for one padded step size.

    counts: rows the launches must cover. prefill: whether the step may hold sequences with several tokens.
    """

    def __init__(
        self,
        dtype: DType,
        chip: Chip,
        shape: Shape,
        addresses: Addresses,
        layout: Layout,
        counts: Counts,
        decode: Mapping[str, DecodePlan],
        prefill: Mapping[str, PrefillPlan] | None,
        strategy: str,
    ) -> None:
        self.dtype = dtype
        self.tag = "bf16" if dtype is DType.BF16 else "f16"
        self.chip = chip
        self.shape = shape
        self.at = addresses
        self.layout = layout
        self.counts = counts
        self.decode = decode
        self.prefill = prefill
        self.strategy = strategy
        self.planned: list[Planned] = []
        self.stages: Sequence[Stage] = ()
        self.missing: list[str] = []
        self._emitters: dict[type[Op], Callable[[Stage], None]] = {
            Embed: self._embed,
            Norm: self.norm,
            Linear: self._linear,
            RopeKV: self._rope_kv,
            Attention: self.attention,
            GatedActivation: self._activation,
            Activate: self._activation,
            Add: self._add,
            GatherRows: self._gather,
            Logits: self._logits,
            Sample: self._sample,
            **{kind: partial(emit, self) for kind, emit in FAMILIES.items()},
        }

    def lower(self, stages: Sequence[Stage]) -> list[Planned]:
        """The launches of all stages, in order.

        Raises MissingKernelError listing every op without a kernel.
        """
        self.stages = stages
        for stage in stages:
            leader = next((op for op in stage.ops if type(op) in LATENT), stage.ops[0])
            emit = self._emitters.get(type(leader))
            if emit is None:
                self.missing.append(f"{stage.name} ({stage.ops[0].kind})")
                continue
            try:
                emit(stage)
            except MissingKernelError as error:
                self.missing.append(f"{stage.name} ({error})")
        if self.missing:
            shown = "; ".join(self.missing[:6]) + ("; ..." if len(self.missing) > 6 else "")
            raise MissingKernelError(f"{len(self.missing)} ops have no CUDA kernel: {shown}")
        return self.planned

    def begin(self) -> list[Planned]:
        """The head of a step: block tables brought up to date."""
        parameters = [
            self.at.metadata,
            self.meta(self.layout.block_updates),
            self.at.tables,
            ctypes.c_int(self.shape.table_stride),
        ]
        return [Planned("begin", "sm80_begin_step", fixed(8), BLOCK, parameters)]

    def plan(
        self,
        op: str,
        kernel: str,
        grid: GridOf,
        block: int,
        *parameters: object,
        smem: int = 0,
        cluster: int = 1,
        why: str = "",
    ) -> None:
        """Adds one launch; see `Planned`."""
        self.planned.append(Planned(op, kernel, grid, block, parameters, smem, cluster, why))

    def meta(self, word: int) -> int:
        """Address of a word of the step's metadata."""
        return self.at.metadata + 4 * word

    def rows(self, rows: str) -> Callable[[Counts], int]:
        """How many rows of that kind a step has."""
        return (lambda c: c.tokens) if rows == "tokens" else (lambda c: c.samples)

    def capacity(self, rows: str) -> int:
        """How many rows of that kind the largest step has."""
        return self.shape.tokens if rows == "tokens" else self.shape.samples

    def weight(self, weight: Weight | None, form: Form) -> int:
        """Address of a weight in that form, null for none."""
        return 0 if weight is None else self.at.weights[weight.name, form]

    def _embed(self, stage: Stage) -> None:
        (op,) = stage.ops
        assert isinstance(op, Embed)
        self.plan(
            stage.name,
            f"sm80_{self.tag}_embed",
            lambda c: (c.tokens, 1, 1),
            128,
            self.at.buffers[op.out.name],
            self.weight(op.table, "table"),
            self.meta(self.layout.token_ids),
            self.meta(self.layout.token_slots),
            self.at.last_tokens,
            self.meta(NUM_TOKENS),
            ctypes.c_int(op.out.width),
            ctypes.c_float(op.scale),
        )

    def norm(self, stage: Stage) -> None:
        """A Norm, alone or as the first or last of what one kernel does."""
        norm = stage.ops[-1]
        if isinstance(norm, Route):
            self._emitters[Route](stage)
            return
        if isinstance(norm, RopeKV):
            self._rope_kv(stage)
            return
        if isinstance(stage.ops[0], Norm) and len(stage.ops) > 1:
            self._norm_add_norm(stage)
            return
        assert isinstance(norm, Norm)
        if norm.group is not None or norm.width is not None:
            self._norm_groups(stage.name, norm)
            return
        add = stage.ops[0] if len(stage.ops) == 2 else None
        assert add is None or isinstance(add, Add)
        kernel, threads = norm_kernel(self.dtype.value, norm.kind_, norm.x.width, add is not None)
        rows = self.rows(norm.x.rows)
        self.plan(
            stage.name,
            kernel,
            lambda c: (rows(c), 1, 1),
            threads,
            self.at.buffers[norm.out.name],
            self.at.buffers[norm.x.name],
            self.at.buffers[add.y.name] if add else 0,
            self.weight(norm.weight, "norm"),
            self.weight(norm.bias, "norm"),
            ctypes.c_int(norm.x.width),
            ctypes.c_float(norm.eps),
            ctypes.c_float(add.scale if add else 1.0),
        )

    def _norm_add_norm(self, stage: Stage) -> None:
        before, add, after = (*stage.ops, None)[:3]
        assert isinstance(before, Norm)
        assert isinstance(add, Add)
        assert after is None or isinstance(after, Norm)
        kernel, threads = norm_add_norm_kernel(self.dtype.value, add.x.width)
        rows = self.rows(add.x.rows)
        self.plan(
            stage.name,
            kernel,
            lambda c: (rows(c), 1, 1),
            threads,
            self.at.buffers[after.out.name] if after else 0,
            self.at.buffers[add.x.name],
            self.at.buffers[before.x.name],
            self.weight(before.weight, "norm"),
            self.weight(after.weight, "norm") if after else 0,
            ctypes.c_int(add.x.width),
            ctypes.c_float(before.eps),
            ctypes.c_float(after.eps if after else 0.0),
            ctypes.c_float(add.scale),
        )

    def _norm_groups(self, name: str, op: Norm) -> None:
        width = op.width if op.width is not None else op.x.width - op.start
        group = op.group or width
        if op.out != op.x or group % 2 or group > 256:
            raise MissingKernelError(f"no norm kernel for slices of {group} elements")
        slices, warps = width // group, 4
        each = op.weight is not None and op.weight.elements == width and slices > 1
        rows = self.rows(op.x.rows)
        self.plan(
            name,
            f"sm80_{self.tag}_norm_groups_{op.kind_}",
            lambda c: (-(-slices // warps), rows(c), 1),
            32 * warps,
            self.at.buffers[op.x.name],
            self.weight(op.weight, "norm"),
            self.weight(op.bias, "norm"),
            ctypes.c_int(op.x.width),
            ctypes.c_int(op.start),
            ctypes.c_int(slices),
            ctypes.c_int(group),
            ctypes.c_int(group if each else 0),
            ctypes.c_float(op.eps),
        )

    def gemm(
        self,
        stage: Stage,
        op: Linear | Logits,
        out: int,
        pitch: int,
        *,
        form: Form = "packed",
        kind: Kind = Kind.STORE,
        residual: int = 0,
        scale: float = 1.0,
        soft_cap: float = 0.0,
    ) -> None:
        """One matrix product over all rows of the step, with its epilogue."""
        rows, k = op.weight.shape
        if self.strategy == "cublas":
            self._cublas(stage, op, out, pitch, residual=residual, scale=scale, soft_cap=soft_cap)
            return
        if form == "gated":
            rows = gated_rows(rows // 2)
        count = self.rows(op.x.rows)(self.counts)
        plan = plan_gemm(rows, k, count, self.tag, self.chip.sm_count, self.chip.capability)
        x = self.at.buffers[op.x.name]
        source: object = x
        if plan.box_rows:
            source = MatrixMap(x, self.capacity(op.x.rows), k, plan.box_rows, 64, self.dtype is DType.BF16)
        parameters = gemm_arguments(
            plan,
            source,
            self.weight(op.weight, form),
            out,
            pitch,
            kind=kind,
            bias=self.weight(op.bias, "gated_bias" if form == "gated" else "bias"),
            residual=residual,
            scale=scale,
            soft_cap=soft_cap,
            tokens=Count(op.x.rows),
            x_width=k,
            x_pitch=k,
        )
        grid = plan.grid
        self.plan(
            stage.name,
            plan.kernel,
            lambda c: grid,
            plan.block,
            *parameters,
            smem=plan.smem,
            cluster=plan.cluster,
            why=plan.why,
        )

    def _cublas(
        self,
        stage: Stage,
        op: Linear | Logits,
        out: int,
        pitch: int,
        *,
        residual: int,
        scale: float,
        soft_cap: float,
    ) -> None:
        """The product by cuBLASLt; what it cannot do is refused."""
        if soft_cap or (residual and scale != 1.0) or (op.bias is not None and isinstance(op, Logits)):
            raise MissingKernelError("cuBLAS has no such epilogue; use --gemm-strategy native")
        rows, k = op.weight.shape
        matmul = Matmul(
            x=self.at.buffers[op.x.name],
            weight=self.weight(op.weight, "table"),
            out=out,
            bias=self.weight(op.bias, "bias"),
            residual=residual,
            tokens=self.rows(op.x.rows)(self.counts),
            rows=rows,
            width=k,
            pitch=pitch,
            scale=scale,
            bf16=self.dtype is DType.BF16,
            float_out=isinstance(op, Logits),
            workspace=self.at.gemm_workspace,
        )
        self.plan(stage.name, CUBLAS, fixed(1), 0, matmul, why="--gemm-strategy cublas")

    def _linear(self, stage: Stage) -> None:
        op, after = stage.ops[0], stage.ops[1] if len(stage.ops) == 2 else None
        assert isinstance(op, Linear)
        if isinstance(after, GatedActivation):
            out, kind = self.at.buffers[after.out.name], GATED_KIND[after.activation]
            self.gemm(stage, op, out, after.out.width, form="gated", kind=kind)
        elif isinstance(after, ClampedGate):
            self.gemm(
                stage, op, self.at.buffers[after.out.name], after.out.width,
                form="gated", kind=Kind.GATED_CLAMPED, scale=after.alpha, soft_cap=after.limit or 0.0,
            )  # fmt: skip
        elif isinstance(after, Activate):
            out, kind = self.at.buffers[after.out.name], ACT_KIND[after.activation]
            self.gemm(stage, op, out, after.out.width, kind=kind)
        elif isinstance(after, Add):
            x = self.at.buffers[after.x.name]
            self.gemm(stage, op, x, after.x.width, residual=x, scale=after.scale)
        else:
            self.gemm(stage, op, self.at.buffers[op.out.name], op.out.width)

    def _rope_kv(self, stage: Stage) -> None:
        *norms, op = stage.ops
        assert isinstance(op, RopeKV)
        cos, sin = self.at.ropes[op.rope] if op.rope is not None else (0, 0)
        rotated = op.rope.dim if op.rope is not None else 0
        if rotated % 4:
            raise MissingKernelError(f"no rope kernel for {rotated} rotated elements, not a multiple of 4")
        interleaved = op.rope is not None and op.rope.interleaved
        k_cache, v_cache = self.at.caches[op.cache.name]
        heads, warps = op.heads + 2 * op.kv_heads, 4
        kind, more = self._head_norms(norms, op)
        self.plan(
            stage.name,
            f"sm80_{self.tag}_rope_kv{kind}{'_interleaved' if interleaved else ''}",
            lambda c: (-(-heads // warps), c.tokens, 1),
            32 * warps,
            self.at.buffers[op.qkv.name],
            k_cache,
            v_cache,
            cos,
            sin,
            self.at.tables,
            self.meta(self.layout.positions),
            self.meta(self.layout.token_slots),
            self.meta(NUM_TOKENS),
            ctypes.c_int(op.qkv.width),
            ctypes.c_int(self.shape.table_stride),
            ctypes.c_int(op.heads),
            ctypes.c_int(op.kv_heads),
            ctypes.c_int(op.head_dim),
            ctypes.c_int(rotated),
            *more,
        )

    def _head_norms(self, norms: Sequence[Op], op: RopeKV) -> tuple[str, list[object]]:
        """What the norms of its heads add to a RopeKV: to the kernel's name, and to its parameters."""
        if not norms:
            return "", []
        queries, keys = norms
        assert isinstance(queries, Norm)
        assert isinstance(keys, Norm)
        if op.head_dim % 2 or op.head_dim > 256:
            raise MissingKernelError(f"no norm kernel for heads of {op.head_dim} elements")
        steps = [
            op.head_dim if norm.weight is not None and norm.weight.elements == norm.width else 0
            for norm in (queries, keys)
        ]
        weights = [self.weight(norm.weight, "norm") for norm in (queries, keys)]
        return f"_{queries.kind_}", [*weights, *map(ctypes.c_int, steps), ctypes.c_float(queries.eps)]

    def attention(self, stage: Stage) -> None:
        """Attention over the paged cache: a launch for single tokens, and one for longer runs of them."""
        (op,) = stage.ops
        assert isinstance(op, Attention | BlockSparseAttention)
        soft_cap, window, sight = 0.0, 0, list[object]()
        if isinstance(op, Attention):
            soft_cap, window = op.soft_cap or 0.0, op.window or 0
        else:
            sparsity = op.sparsity
            facts = (sparsity.size, sparsity.local, sparsity.stride, sparsity.head_step)
            sight = [ctypes.c_int(fact) for fact in facts]
        k_cache, v_cache = self.at.caches[op.cache.name]
        shared = (
            self.at.buffers[op.out.name],
            self.at.buffers[op.qkv.name],
            k_cache,
            v_cache,
            self.at.tables,
            self.meta(self.layout.seq_slots),
            self.meta(self.layout.kv_lens),
        )
        numbers = (
            ctypes.c_int(op.qkv.width),
            ctypes.c_int(op.out.width),
            ctypes.c_int(self.shape.table_stride),
            ctypes.c_int(op.kv_heads),
            ctypes.c_int(op.heads // op.kv_heads),
            ctypes.c_float(op.scale),
            ctypes.c_float(soft_cap),
            ctypes.c_int(window),
        )
        decode = self.decode[op.name]
        self.plan(
            stage.name,
            decode.kernel,
            fixed(decode.grid),
            decode.block,
            *shared,
            self.meta(NUM_DECODES),
            self.at.partial,
            self.at.arrivals,
            *numbers,
            ctypes.c_int(self.layout.seqs),
            *sight,
            smem=decode.smem,
            why="sequences with one token",
        )
        if self.prefill is not None:
            prefill = self.prefill[op.name]
            self.plan(
                stage.name,
                prefill.kernel,
                fixed(self.layout.tiles, op.kv_heads),
                prefill.block,
                *shared,
                self.meta(self.layout.query_offsets),
                self.meta(self.layout.tile_list),
                *numbers,
                *sight,
                smem=prefill.smem,
                why="sequences with several tokens",
            )

    def _activation(self, stage: Stage) -> None:
        (op,) = stage.ops
        assert isinstance(op, GatedActivation | Activate)
        width, rows = op.out.width, self.rows(op.out.rows)
        if width % 8:
            raise MissingKernelError(f"no activation kernel for rows of {width} elements")
        form = "gated" if isinstance(op, GatedActivation) else "act"
        self.plan(
            stage.name,
            f"sm80_{self.tag}_{form}_{op.activation}",
            lambda c: (-(-width // 8 // BLOCK), rows(c), 1),
            BLOCK,
            self.at.buffers[op.out.name],
            self.at.buffers[op.x.name],
            ctypes.c_int(width),
        )

    def _add(self, stage: Stage) -> None:
        if len(stage.ops) == 2:
            self.norm(stage)
            return
        (op,) = stage.ops
        assert isinstance(op, Add)
        rows = self.rows(op.x.rows)
        elements = rows(self.counts) * op.x.width
        self.plan(
            stage.name,
            f"sm80_{self.tag}_add",
            lambda c: (min(-(-elements // 8 // BLOCK), 8 * self.chip.sm_count), 1, 1),
            BLOCK,
            self.at.buffers[op.x.name],
            self.at.buffers[op.y.name],
            ctypes.c_uint64(elements // 8 * 8),
            ctypes.c_float(op.scale),
        )

    def _gather(self, stage: Stage) -> None:
        (op,) = stage.ops
        assert isinstance(op, GatherRows)
        self.plan(
            stage.name,
            f"sm80_{self.tag}_gather_rows",
            lambda c: (c.samples, 1, 1),
            128,
            self.at.buffers[op.out.name],
            self.at.buffers[op.x.name],
            self.meta(self.layout.sample_rows),
            self.meta(NUM_SAMPLES),
            ctypes.c_int(op.x.width),
        )

    def _logits(self, stage: Stage) -> None:
        (op,) = stage.ops
        assert isinstance(op, Logits)
        self.gemm(
            stage,
            op,
            self.at.logits,
            self.shape.logits_stride,
            kind=Kind.LOGITS,
            scale=op.scale,
            soft_cap=op.soft_cap or 0.0,
        )

    def _sample(self, stage: Stage) -> None:
        chunks = -(-self.shape.vocab // CHUNK)
        rows = (self.meta(self.layout.sample_slots), self.meta(NUM_SAMPLES))
        vocab, stride = ctypes.c_int(self.shape.vocab), ctypes.c_int(self.shape.logits_stride)
        history = ctypes.c_int(self.shape.history_stride)
        self.plan(
            stage.name,
            "sm80_sample_scan",
            lambda c: (-(-chunks // SCAN_WARPS), c.samples, 1),
            32 * SCAN_WARPS,
            self.at.logits,
            self.at.scaled,
            self.at.bests,
            self.at.parameters,
            *rows,
            self.at.histories,
            self.at.bias_ids,
            self.at.biases,
            self.at.stops,
            self.at.masks,
            self.meta(self.layout.mask_rows),
            vocab,
            stride,
            history,
            ctypes.c_int(self.shape.mask_words),
        )
        self.plan(
            stage.name,
            "sm80_sample_pick",
            lambda c: (c.samples, 1, 1),
            PICK_THREADS,
            self.at.tokens,
            self.at.last_tokens,
            self.at.scaled,
            self.at.bests,
            self.at.parameters,
            *rows,
            self.at.histories,
            vocab,
            stride,
            history,
            ctypes.c_int(chunks),
        )
