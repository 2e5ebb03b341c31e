"""`rvllm plan`: print the program a model runs, op by op, with what each op moves and computes."""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

from rvllm.config import EngineConfig, SourceConfig
from rvllm.errors import UsageError
from rvllm.settings import add_flags, build, settings_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rvllm.backends.cpu.measure import Rates
    from rvllm.program.cost import StepShape
    from rvllm.program.memory import Workspace
    from rvllm.program.ops.dense import Op, Program
    from rvllm.weights.checkpoint import Checkpoint

FLAGS = (
    "model", "device", "dtype", "quantization", "kv_cache_dtype", "threads", "cpu_kernels", "gemm_strategy",
)  # fmt: skip
MEMORY_FLAGS = (
    "load_format", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_blocks",
    "num_gpu_blocks", "kv_cache_memory_gb", "num_cpu_blocks", "num_state_snapshots", "enable_prefix_caching",
    "gpu_memory_utilization", "gpu_memory_share", "gpu_memory_reserve_gb", "decode_path",
)  # fmt: skip
DEFAULT_CONTEXT = 1024
DEFAULT_TEXT = 128  # tokens of an encoder's texts


def add_parser(subparsers: Any) -> None:
    """Adds the `plan` subcommand."""
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
    add_flags(
        parser,
        EngineConfig,
        "model",
        [f.name for f, _ in settings_of(EngineConfig) if f.name not in (*FLAGS, *MEMORY_FLAGS)],
    )
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Runs `rvllm plan`; raises RvllmError."""
    from rvllm.backends.load import choose_device, choose_dtype
    from rvllm.models.kv_cache import with_kv_cache
    from rvllm.models.overrides import read_config
    from rvllm.models.registry import build_program
    from rvllm.program.memory import plan_workspace
    from rvllm.weights.checkpoint import stored_formats
    from rvllm.weights.fetch.source import resolve
    from rvllm.weights.open import open_checkpoint

    if args.memory:
        return plan_memory(args)
    if args.gpu is not None or args.vram_gb is not None:
        raise UsageError("--gpu and --vram-gb need --memory")
    config = build(EngineConfig, {name: getattr(args, name) for name in FLAGS})
    checkpoint = open_checkpoint(resolve(config.model, build(SourceConfig, {})))
    model = read_config(checkpoint, config)
    program = with_kv_cache(build_program(model, choose_dtype(config, checkpoint)), config.kv_cache_dtype)
    device = choose_device(config)
    kernels: dict[str, str] = {}
    holds = checkpoint if checkpoint.tensors else None
    shape = step_shape(args, program)
    if device != "cpu":
        from rvllm.backends.cuda.layout.preview import kernels_here

        program, kernels = kernels_here(program, holds, config, shape)
    packed: Mapping[str, int] = {}
    if device == "cpu":
        from rvllm.backends.cpu.memory import packed_weights

        packed = packed_weights(program, holds, config)
    rates = floor_rates(args, device, config.threads, bool(packed))
    workspace = plan_workspace(program.ops, shape.tokens, shape.samples)
    formats, nbytes = stored_formats(checkpoint)
    if args.json:
        stored = {"stored_formats": formats, "stored_bytes": nbytes}
        print(
            json.dumps(as_json(program, holds, shape, rates, workspace, kernels, packed) | stored, indent=1)
        )
    else:
        print(
            as_text(
                program,
                holds,
                shape,
                rates,
                workspace,
                (formats, nbytes),
                kernels,
                packed,
                buffers=args.buffers,
                everything=args.all,
            )
        )
    return 0


def plan_memory(args: argparse.Namespace) -> int:
    """`rvllm plan --memory`; raises CapacityError, naming the flags that would fit, when nothing does."""
    from rvllm.backends.cuda.known_gpus import known_gpu
    from rvllm.backends.load import gpu_dtype
    from rvllm.cli.common.capacity import capacity, capacity_text
    from rvllm.models.kv_cache import with_kv_cache
    from rvllm.models.overrides import read_config
    from rvllm.models.registry import build_program
    from rvllm.program.cost import kv_bytes_per_token
    from rvllm.weights.fetch.source import resolve
    from rvllm.weights.open import open_checkpoint

    if args.vram_gb is not None and not 1 <= args.vram_gb <= 10_000:
        raise UsageError(f"--vram-gb: must be in [1, 10000], got {args.vram_gb:g}")
    config = build(EngineConfig, {name: getattr(args, name) for name in (*FLAGS, *MEMORY_FLAGS)})
    checkpoint = open_checkpoint(resolve(config.model, build(SourceConfig, {})))
    model = read_config(checkpoint, config)
    program = with_kv_cache(build_program(model, gpu_dtype(config, checkpoint)), config.kv_cache_dtype)
    holds = checkpoint if checkpoint.tensors and config.load_format != "dummy" else None
    found = capacity(program, holds, config, known_gpu(args.gpu or "h100-80gb", args.vram_gb))
    print(json.dumps(found, indent=1) if args.json else capacity_text(found, kv_bytes_per_token(program)))
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


def as_json(
    program: Program,
    checkpoint: Checkpoint | None,
    shape: StepShape,
    rates: Rates | None,
    workspace: Workspace,
    kernels: dict[str, str],
    packed: Mapping[str, int],
) -> dict[str, Any]:
    """Everything the command knows, in bytes, operations and seconds. kernels: by op, on a GPU.

    packed: bytes of the weights that the CPU's compiled kernels keep, by name.
    """
    from rvllm.cli.common.matrices import kept_as, stored_as
    from rvllm.cli.common.ops import dtype_of
    from rvllm.program.cost import kv_bytes_per_token, op_cost, program_cost

    def entry(op: Op) -> dict[str, Any]:
        cost = op_cost(program, op, shape, packed)
        return {
            "name": op.name,
            "kind": op.kind,
            "reads": {b.name: [shape.rows(b), b.width] for b in op.reads},
            "writes": {b.name: [shape.rows(b), b.width] for b in op.writes},
            "weights": {w.name: list(w.shape) for w in op.weights},
            "dtype": dtype_of(op, program),
            "stored": {w.name: stored_as(w, checkpoint) for w in op.weights},
            "kept": {w.name: kept_as(w, program, checkpoint, packed) for w in op.weights},
            "kernel": kernels.get(op.name),
            "weight_bytes": cost.weight_bytes,
            "activation_bytes": cost.activation_bytes,
            "kv_bytes": cost.kv_bytes,
            "flops": cost.flops,
            "floor_seconds": cost.floor_seconds(rates.bandwidth, rates.flops) if rates else None,
        }

    total = program_cost(program, shape, packed)
    return {
        "architecture": program.architecture,
        "dtype": program.dtype.value,
        "step": {"batch": shape.sequences, "query_len": shape.query_len, "context": shape.context},
        "ops": [entry(op) for op in program.ops],
        "total": {
            "weight_bytes": total.weight_bytes,
            "activation_bytes": total.activation_bytes,
            "kv_bytes": total.kv_bytes,
            "flops": total.flops,
            "floor_seconds": floor_total(program, shape, rates, packed) if rates else None,
        },
        "rates": {"bandwidth": rates.bandwidth, "flops": rates.flops if rates.flops < math.inf else None}
        if rates
        else None,
        "kv_bytes_per_token": kv_bytes_per_token(program),
        "state_bytes_per_sequence": program.state_elements_per_slot * 4,
        "workspace_bytes": workspace.nbytes,
        "buffers": {n: {"offset": p.offset, "nbytes": p.nbytes} for n, p in workspace.placements.items()},
        "notes": list(program.notes),
    }


def floor_total(program: Program, shape: StepShape, rates: Rates, packed: Mapping[str, int]) -> float:
    """The sum of the ops' floors: they run one after the other."""
    from rvllm.program.cost import op_cost

    costs = (op_cost(program, op, shape, packed) for op in program.ops)
    return sum(cost.floor_seconds(rates.bandwidth, rates.flops) for cost in costs)


def as_text(
    program: Program,
    checkpoint: Checkpoint | None,
    shape: StepShape,
    rates: Rates | None,
    workspace: Workspace,
    stored: tuple[str, int],
    kernels: dict[str, str],
    packed: Mapping[str, int],
    *,
    buffers: bool,
    everything: bool,
) -> str:
    """The totals, the workspace and the table; stored: formats and bytes of the checkpoint's tensors.

    kernels: by op, on a GPU. everything: equal layers are not folded.
    """
    from rvllm.cli.common.ops import folded_table, op_rows, whole_table
    from rvllm.cli.common.tables import facts, table
    from rvllm.program.ops.encoder import embedding_size

    what = "decode" if shape.query_len == 1 else f"prefill of {shape.query_len} tokens"
    if embedding_size(program) is not None:
        what = f"texts of {shape.query_len} tokens"
    rows = op_rows(program, checkpoint, shape, rates, kernels, packed)
    shown = whole_table if everything else folded_table
    parts = [
        f"{program.architecture}, {program.dtype.value}: {what}, batch {shape.sequences}, "
        f"context {shape.context}",
        facts("total", _totals(program, shape, rates, packed)),
        facts("memory", _memory(program, workspace, stored, packed)),
        table(*shown(rows, bool(rates), bool(kernels))),
    ]
    if buffers:
        places = sorted(workspace.placements.values(), key=lambda p: (p.offset, p.buffer.name))
        cells = [[p.buffer.name, str(p.offset), str(p.nbytes), p.buffer.dtype.value] for p in places]
        parts.append(table(["buffer", "offset", "bytes", "dtype"], cells, right=(1, 2)))
    if program.notes:
        parts.append("\n".join(f"note: {note}" for note in program.notes))
    return "\n\n".join(parts)


def _totals(
    program: Program, shape: StepShape, rates: Rates | None, packed: Mapping[str, int]
) -> list[tuple[str, str]]:
    """What the whole step moves and computes, and its floor."""
    from rvllm.cli.common.tables import human_bytes, human_flops, human_seconds
    from rvllm.program.cost import program_cost

    total = program_cost(program, shape, packed)
    totals = [
        ("ops", str(len(program.ops))),
        ("weights read", human_bytes(total.weight_bytes)),
        ("activations moved", human_bytes(total.activation_bytes)),
        ("KV cache moved", human_bytes(total.kv_bytes)),
        ("FLOPs", human_flops(total.flops)),
    ]
    if rates is None:
        return [*totals, ("floor", "give --bandwidth and --tflops of the GPU")]
    floor = floor_total(program, shape, rates, packed)
    computed = f" and {rates.flops / 1e12:.4g} TFLOP/s" if rates.flops < math.inf else ""
    return [
        *totals,
        ("floor", human_seconds(floor)),
        ("limit", f"{shape.tokens / floor:,.0f} tokens/s"),
        ("at", f"{rates.bandwidth / 1e9:.4g} GB/s{computed}"),
    ]


def _memory(
    program: Program, workspace: Workspace, stored: tuple[str, int], packed: Mapping[str, int]
) -> list[tuple[str, str]]:
    """What the model keeps; stored: formats and bytes of the checkpoint's tensors."""
    from rvllm.cli.common.tables import human_bytes
    from rvllm.program.cost import kv_bytes_per_token, weight_bytes

    memory = [
        ("all weights", human_bytes(sum(map(weight_bytes(program, packed), program.weights)))),
        ("stored", f"{human_bytes(stored[1])}: {stored[0]}" if stored[0] else "no weights there"),
        ("KV cache per token", human_bytes(kv_bytes_per_token(program))),
        ("workspace", f"{human_bytes(workspace.nbytes)} for {len(workspace.placements)} buffers"),
    ]
    if program.states:
        carried = program.state_elements_per_slot * 4
        memory.insert(2, ("state per sequence", f"{human_bytes(carried)} in {len(program.states)} parts"))
    return memory
