"""`rvllm plan`: print the program a model runs, op by op, with what each op moves and computes."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rvllm.cli.common.models import read
from rvllm.cli.common.ops import PlannedStep
from rvllm.config import EngineConfig
from rvllm.errors import UsageError
from rvllm.settings import add_flags, build

if TYPE_CHECKING:
    from rvllm.backends.cpu.measure import Rates
    from rvllm.program.cost import StepShape
    from rvllm.program.memory import Workspace
    from rvllm.program.ops.dense import Op, Program

FLAGS = (
    "model", "device", "dtype", "quantization", "kv_cache_dtype", "threads", "cpu_kernels", "gemm_strategy",
    "load_format", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_blocks",
    "num_gpu_blocks", "kv_cache_memory_gb", "num_cpu_blocks", "num_state_snapshots", "enable_prefix_caching",
    "gpu_memory_utilization", "gpu_memory_share", "gpu_memory_reserve_gb", "decode_path",
)  # fmt: skip
DEFAULT_CONTEXT = 1024
DEFAULT_TEXT = 128  # tokens of an encoder's texts


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="print the program a model runs: ops, shapes, bytes, FLOPs",
        description="Prints the program a model runs for one step: ops, shapes, dtypes, bytes, FLOPs, floor "
        "times and where the buffers lie. The model's config suffices; no weights are read.",
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences in the step [1]")
    parser.add_argument(
        "--context", type=int, default=None, metavar="C",
        help=f"tokens of each sequence in the cache after the step [{DEFAULT_CONTEXT}, or --prefill]",
    )  # fmt: skip
    parser.add_argument(
        "--prefill", type=int, default=1, metavar="P", help="tokens each sequence computes; 1 is a decode [1]"
    )
    parser.add_argument(
        "--bandwidth", type=float, default=None, metavar="GB/S",
        help="memory bandwidth for the floor times [measured on the CPU]",
    )  # fmt: skip
    parser.add_argument(
        "--tflops", type=float, default=None, metavar="T",
        help="10^12 operations a second for the floor times [measured for NumPy's CPU kernels]",
    )  # fmt: skip
    parser.add_argument("--buffers", action="store_true", help="list every buffer's place in the workspace")
    parser.add_argument(
        "--memory", action="store_true",
        help="what a start would take of a GPU, and how many sequences of which length fit; needs no GPU",
    )  # fmt: skip
    parser.add_argument(
        "--gpu", default=None, metavar="NAME", help="with --memory: the GPU to plan for [h100-80gb]"
    )
    parser.add_argument(
        "--vram-gb", type=float, default=None, metavar="GB", help="with --memory: GB of it instead of its own"
    )
    parser.add_argument("--all", action="store_true", help="list every op of every layer, with its shapes")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_flags(parser, EngineConfig, "model", FLAGS)


def main(args: argparse.Namespace) -> int:
    """Runs `rvllm plan`; raises RvllmError."""
    from rvllm.backends.load import choose_device
    from rvllm.program.memory import plan_workspace
    from rvllm.weights.checkpoint import stored_formats

    if args.memory:
        return plan_memory(args)
    if args.gpu is not None or args.vram_gb is not None:
        raise UsageError("--gpu and --vram-gb need --memory")
    config = build(EngineConfig, vars(args))
    model = read(config)
    program = model.program
    kernels: dict[str, str] = {}
    packed: dict[str, int] = {}
    shape = step_shape(args, program)
    device = choose_device(config)
    if device != "cpu":
        from rvllm.backends.cuda.layout.preview import kernels_here

        program, kernels = kernels_here(program, model.stored, config, shape)
    else:
        from rvllm.backends.cpu.compiled.model import packed_weights

        packed = packed_weights(program, model.stored, config)
    rates = floor_rates(args, device, config.threads, bool(packed))
    step = PlannedStep(program, model.stored, shape, rates, kernels, packed)
    workspace = plan_workspace(program.ops, shape.tokens, shape.samples)
    stored = stored_formats(model.checkpoint)
    if args.json:
        print(json.dumps(as_json(step, workspace, stored), indent=1))
    else:
        print(as_text(step, workspace, stored, buffers=args.buffers, everything=args.all))
    return 0


def plan_memory(args: argparse.Namespace) -> int:
    """`rvllm plan --memory`; raises CapacityError, naming the flags that would fit, when nothing does."""
    from rvllm.backends.cuda.known_gpus import known_gpu
    from rvllm.backends.load import gpu_dtype
    from rvllm.cli.common.capacity import capacity, capacity_text
    from rvllm.program.cost import kv_bytes_per_token

    if args.vram_gb is not None and not 1 <= args.vram_gb <= 10_000:
        raise UsageError(f"--vram-gb: must be in [1, 10000], got {args.vram_gb:g}")
    config = build(EngineConfig, vars(args))
    model = read(config, gpu_dtype)
    stored = None if config.load_format == "dummy" else model.stored
    found = capacity(model.program, stored, config, known_gpu(args.gpu or "h100-80gb", args.vram_gb))
    per_token = kv_bytes_per_token(model.program)
    print(json.dumps(found, indent=1) if args.json else capacity_text(found, per_token))
    return 0


def step_shape(args: argparse.Namespace, program: Program) -> StepShape:
    """The step the flags describe. Raises UsageError naming the flag that cannot be."""
    from rvllm.program.cost import StepShape
    from rvllm.program.ops.encoder import embedding_size

    for name, high in (
        ("batch", 1 << 16),
        ("prefill", program.max_position),
        ("context", program.max_position),
    ):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= high:
            raise UsageError(f"--{name}: must be in [1, {high}], got {value}")
    context = args.context
    if embedding_size(program) is not None:  # texts are computed whole
        length = context or (args.prefill if args.prefill > 1 else min(DEFAULT_TEXT, program.max_position))
        if args.prefill not in (1, length):
            raise UsageError(
                f"--prefill {args.prefill}: an encoder computes texts whole; give --context alone"
            )
        return StepShape(sequences=args.batch, query_len=length, context=length)
    if context is None:
        context = args.prefill if args.prefill > 1 else min(DEFAULT_CONTEXT, program.max_position)
    if context < args.prefill:
        raise UsageError(
            f"--context {context} cannot be less than --prefill {args.prefill}, which it includes"
        )
    if args.batch * args.prefill > 1 << 24:
        raise UsageError(f"--batch times --prefill must be at most {1 << 24} tokens")
    return StepShape(sequences=args.batch, query_len=args.prefill, context=context)


def floor_rates(
    args: argparse.Namespace, device: str, threads: int | None, compiled: bool = False
) -> Rates | None:
    """The rates given; on the CPU those missing are measured, elsewhere there is no floor without them.

    compiled: the CPU's compiled kernels compute on the stored form, at another rate than is timed: no bound.
    """
    from rvllm.backends.cpu.measure import Rates, measure

    for name in ("bandwidth", "tflops"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 1e9:
            raise UsageError(f"--{name}: must be above 0, got {value:g}")
    if args.bandwidth is not None and args.tflops is not None:
        return Rates(args.bandwidth * 1e9, args.tflops * 1e12)
    if device != "cpu":
        return None
    found = measure(threads)
    return Rates(
        found.bandwidth if args.bandwidth is None else args.bandwidth * 1e9,
        args.tflops * 1e12 if args.tflops is not None else math.inf if compiled else found.flops,
    )


def as_json(step: PlannedStep, workspace: Workspace, stored: tuple[str, int]) -> dict[str, Any]:
    """Everything the command knows, in bytes, operations and seconds; stored: see `as_text`."""
    from rvllm.cli.common.matrices import kept_as, stored_as
    from rvllm.program.cost import kv_bytes_per_token

    program, shape, rates = step.program, step.shape, step.rates

    def entry(op: Op) -> dict[str, Any]:
        return {
            "name": op.name,
            "kind": op.kind,
            "reads": {b.name: [shape.rows(b), b.width] for b in op.reads},
            "writes": {b.name: [shape.rows(b), b.width] for b in op.writes},
            "weights": {w.name: list(w.shape) for w in op.weights},
            "dtype": step.dtype(op),
            "stored": {w.name: stored_as(w, step.stored) for w in op.weights},
            "kept": {w.name: kept_as(w, program, step.stored, step.packed) for w in op.weights},
            "kernel": step.kernels.get(op.name),
            **asdict(step.cost(op)),
            "floor_seconds": step.floor(op),
        }

    return {
        "architecture": program.architecture,
        "dtype": program.dtype.value,
        "step": {"batch": shape.sequences, "query_len": shape.query_len, "context": shape.context},
        "ops": [entry(op) for op in program.ops],
        "total": {**asdict(step.total), "floor_seconds": step.total_floor},
        "rates": {"bandwidth": rates.bandwidth, "flops": rates.flops if rates.flops < math.inf else None}
        if rates
        else None,
        "kv_bytes_per_token": kv_bytes_per_token(program),
        "state_bytes_per_sequence": program.state_elements_per_slot * 4,
        "workspace_bytes": workspace.nbytes,
        "buffers": {n: {"offset": p.offset, "nbytes": p.nbytes} for n, p in workspace.placements.items()},
        "notes": list(program.notes),
        "stored_formats": stored[0],
        "stored_bytes": stored[1],
    }


def as_text(
    step: PlannedStep, workspace: Workspace, stored: tuple[str, int], *, buffers: bool, everything: bool
) -> str:
    """The totals, the workspace and the table; stored: formats and bytes of the checkpoint's tensors.

    everything: equal layers are not folded.
    """
    from rvllm.cli.common.ops import folded_table, op_rows, whole_table
    from rvllm.cli.common.tables import facts, table
    from rvllm.program.ops.encoder import embedding_size

    program, shape = step.program, step.shape
    what = "decode" if shape.query_len == 1 else f"prefill of {shape.query_len} tokens"
    if embedding_size(program) is not None:
        what = f"texts of {shape.query_len} tokens"
    shown = whole_table if everything else folded_table
    parts = [
        f"{program.architecture}, {program.dtype.value}: {what}, batch {shape.sequences}, "
        f"context {shape.context}",
        facts("total", _totals(step)),
        facts("memory", _memory(step, workspace, stored)),
        table(*shown(op_rows(step), bool(step.rates), bool(step.kernels))),
    ]
    if buffers:
        places = sorted(workspace.placements.values(), key=lambda p: (p.offset, p.buffer.name))
        cells = [[p.buffer.name, str(p.offset), str(p.nbytes), p.buffer.dtype.value] for p in places]
        parts.append(table(["buffer", "offset", "bytes", "dtype"], cells, right=(1, 2)))
    if program.notes:
        parts.append("\n".join(f"note: {note}" for note in program.notes))
    return "\n\n".join(parts)


def _totals(step: PlannedStep) -> list[tuple[str, str]]:
    """What the whole step moves and computes, and its floor."""
    from rvllm.cli.common.tables import human_bytes, human_flops, human_seconds

    total, rates, floor = step.total, step.rates, step.total_floor
    totals = [
        ("ops", str(len(step.program.ops))),
        ("weights read", human_bytes(total.weight_bytes)),
        ("activations moved", human_bytes(total.activation_bytes)),
        ("KV cache moved", human_bytes(total.kv_bytes)),
        ("FLOPs", human_flops(total.flops)),
    ]
    if rates is None or floor is None:
        return [*totals, ("floor", "give --bandwidth and --tflops of the GPU")]
    computed = f" and {rates.flops / 1e12:.4g} TFLOP/s" if rates.flops < math.inf else ""
    return [
        *totals,
        ("floor", human_seconds(floor)),
        ("limit", f"{step.shape.tokens / floor:,.0f} tokens/s"),
        ("at", f"{rates.bandwidth / 1e9:.4g} GB/s{computed}"),
    ]


def _memory(step: PlannedStep, workspace: Workspace, stored: tuple[str, int]) -> list[tuple[str, str]]:
    """What the model keeps; stored: see `as_text`."""
    from rvllm.cli.common.tables import human_bytes
    from rvllm.program.cost import kv_bytes_per_token, weight_bytes

    program = step.program
    memory = [
        ("all weights", human_bytes(sum(map(weight_bytes(program, step.packed), program.weights)))),
        ("stored", f"{human_bytes(stored[1])}: {stored[0]}" if stored[0] else "no weights there"),
        ("KV cache per token", human_bytes(kv_bytes_per_token(program))),
        ("workspace", f"{human_bytes(workspace.nbytes)} for {len(workspace.placements)} buffers"),
    ]
    if program.states:
        carried = program.state_elements_per_slot * 4
        memory.insert(2, ("state per sequence", f"{human_bytes(carried)} in {len(program.states)} parts"))
    return memory
