"""Mixtures of experts on CUDA: kernels against the reference, planning, loading, engines."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rvllm.backends.cuda.device.catalog import select
from rvllm.backends.cuda.device.driver import DeviceFacts
from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.backends.cuda.device.launches import Counts
from rvllm.backends.cuda.formats.choose import kept
from rvllm.backends.cuda.layout.fusion import fuse
from rvllm.backends.cuda.layout.weights import packed_weights
from rvllm.backends.cuda.ops.gemm.plan import interleave_gate_up, pack_matrix
from rvllm.backends.cuda.ops.moe import choose
from rvllm.backends.cuda.ops.moe.choose import even_tile
from rvllm.backends.cuda.ops.moe.launches import FAMILY
from rvllm.backends.cuda.ops.moe.plan import ExpertsAt, ExpertsPlan, most_tiles
from rvllm.backends.cuda.ops.moe.router import RouteAt, route_part
from rvllm.backends.cuda.staging import Span
from rvllm.backends.cuda.weight_loader import Loader
from rvllm.config import EngineConfig
from rvllm.engine.ipc.messages import Sampling
from rvllm.errors import MissingKernelError
from rvllm.kernels.decode.specs import MAX_NORM_WIDTH
from rvllm.kernels.moe import specs as experts_manifest
from rvllm.kernels.moe.specs import QUANTISED_WIDE, segments_of
from rvllm.program.cost import StepShape, op_cost
from rvllm.program.dtypes import DType
from rvllm.program.formats import IntegerFormat
from rvllm.program.ops.dense import Experts, Route, Weight
from support.emulator import Emulator, needs_emulator
from support.emulator.driver import emulated_driver
from support.kernels import experts_checks
from support.kernels.gpu_engine import CONFIG, backend, core_of, model, run
from support.kernels.harness import BF16, DTYPES, Machine
from support.kernels.planned import A100, GB125, H200, L40, built, planner
from support.models.real_configs import CONFIGS
from support.models.tiny import ArrayCheckpoint, weights_of

MIXTRAL, QWEN3_30B = CONFIGS["Mixtral-8x7B"], CONFIGS["Qwen3-30B-A3B"]


# ---- kernels


def sizes(gpu: Machine, few: Sequence[int], all_: Sequence[int]) -> tuple[int, ...]:
    return tuple(few if isinstance(gpu, Emulator) else all_)


def test_shared_experts_start_while_others_are_chosen() -> None:
    """The first product of a shared MLP that is no expert of the stack goes before the routed ones."""
    stages = fuse(built(CONFIGS["DeepSeek-V2-Lite"], num_hidden_layers=2, mlp_bias=True))
    kinds = [[op.name.split(".", 2)[-1] for op in stage.ops] for stage in stages if "layers.1." in stage.name]
    at = kinds.index(["mlp_norm", "moe.route"])
    assert kinds[at + 1 : at + 4] == [
        ["shared.gate_up", "shared.act"], ["moe.experts", "moe.add"], ["shared.down", "shared.add"],
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", experts_checks.ROUTINGS)
def test_routing(gpu: Any, rng: np.random.Generator, name: str, dtype: str) -> None:
    given = sizes(gpu, (1, 2, 7, 18), (1, 2, 7, 33, 130))
    experts_checks.check_route(gpu, rng, DTYPES[dtype], name, given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*experts_checks.ROUTINGS])
def test_norm_and_routing_in_one(gpu: Any, rng: np.random.Generator, name: str, dtype: str) -> None:
    experts_checks.check_route_norm(gpu, rng, DTYPES[dtype], name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_routing_with_equal_scores(gpu: Any, rng: np.random.Generator, dtype: str) -> None:
    experts_checks.check_route_ties(gpu, rng, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", experts_checks.MIXTURES)
def test_experts(gpu: Any, rng: np.random.Generator, name: str, dtype: str) -> None:
    if name == "large" and isinstance(gpu, Emulator):
        pytest.skip("takes too long emulated")
    given = sizes(gpu, (1, 7, 20), (1, 2, 3, 7, 33, 130, 700))
    experts_checks.check_experts(gpu, rng, DTYPES[dtype], name, given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", experts_checks.MIXTURES)
def test_experts_have_the_same_bits_in_company(
    gpu: Any, rng: np.random.Generator, name: str, dtype: str
) -> None:
    if isinstance(gpu, Emulator) and (name == "large" or dtype == "float16"):
        pytest.skip("takes too long emulated")
    given = sizes(gpu, (2, 18), (2, 5, 8, 9, 64, 300, 900))
    experts_checks.check_experts_invariance(gpu, rng, DTYPES[dtype], name, given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_and_its_norm_in_one_launch(gpu: Any, rng: np.random.Generator, dtype: str) -> None:
    experts_checks.check_sum_and_norm(gpu, rng, DTYPES[dtype])


def test_ids_of_no_expert_do_no_harm(gpu: Any, rng: np.random.Generator) -> None:
    experts_checks.check_experts_that_do_not_exist(gpu, rng, BF16)


# ---- planning


@pytest.mark.parametrize("facts", [H200, A100, L40], ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16])
@pytest.mark.parametrize("config", [MIXTRAL, QWEN3_30B], ids=["mixtral", "qwen3_30b"])
def test_every_step_of_a_mixture_resolves_to_kernels(
    config: dict[str, Any], facts: DeviceFacts, dtype: DType
) -> None:
    given = planner(built(config, dtype, num_hidden_layers=2), facts, EngineConfig(), GB125)
    names = given.kernels()
    specs, missing = select(names, facts.capability)
    assert not missing
    assert any("route" in name for name in names)
    for planned in (*given.decode(1), *given.decode(4), *given.decode(64), *given.body(4096)):
        spec = next((s for s in specs if s.name == planned.kernel), None)
        if spec is not None and "experts" in spec.name:
            assert planned.smem <= min(max(spec.smem, 48 << 10), facts.smem_per_block)


def test_mixtral_fits_an_h200_and_a_step_of_one_token_takes_seven_launches_a_layer() -> None:
    given = planner(built(MIXTRAL), H200, EngineConfig(max_model_len=8192), GB125)
    assert 92e9 < given.memory.lines["weights"] < 95e9
    kernels = [p.kernel for p in given.decode(1)]
    assert len(kernels) == 2 + 32 * 7 + 1 + 1 + 1 + 2  # begin, embed, layers, gather, norm, head, sampling
    assert sum("route" in k or "experts" in k for k in kernels) == 32 * 3


def test_a_router_of_one_token_takes_whole_tiles_of_rows_that_fit_a_block() -> None:
    op = next(op for op in built(QWEN3_30B, num_hidden_layers=1).ops if isinstance(op, Route))
    at = RouteAt(1, 2, 3, 4, 5, 6, 7, 1)
    assert route_part(op, at, None) is not None and op.weight.shape == (128, 2048)
    for shape in ((128, 2048 + 8), (128 + 1, 2048), (128, MAX_NORM_WIDTH + 64)):
        assert route_part(replace(op, weight=replace(op.weight, shape=shape)), at, None) is None, shape


def test_memory_of_a_step_of_experts() -> None:
    """Mixtral: two of eight experts a token, 14,336 elements inside and 4,096 outside, of 2 bytes each."""
    found = FAMILY.scratch(built(MIXTRAL, num_hidden_layers=2), 100, 8, 90)
    assert found["experts.inner"] == 2 * 100 * 2 * 14336 and found["experts.parts"] == 2 * 100 * 2 * 4096
    assert found["experts.logits"] == 4 * 100 * 8 and found["experts.order"] == 4 * 100 * 2


def test_an_add_goes_with_the_experts_and_so_does_the_norm_behind_it() -> None:
    stages = [[op.kind for op in stage.ops] for stage in fuse(built(MIXTRAL, num_hidden_layers=2))]
    assert stages.count(["experts", "add", "norm"]) == 1 and stages.count(["experts", "add"]) == 1
    given = planner(built(MIXTRAL, num_hidden_layers=2), H200, EngineConfig(), GB125)
    kernels = [p.kernel for p in given.decode(8)]
    assert sum("combine_norm" in k for k in kernels) == 1 and not any("norm_rms_add" in k for k in kernels)


def test_a_token_is_routed_by_a_cluster_where_that_is_possible() -> None:
    def route(experts: int, facts: DeviceFacts, tokens: int) -> tuple[str, tuple[int, ...], int]:
        given = planner(
            built(QWEN3_30B, num_hidden_layers=1, num_experts=experts), facts, EngineConfig(), GB125
        )
        (found,) = [p for p in given.decode(tokens) if "route" in p.kernel]
        return found.kernel.split("route")[1], found.grid(Counts(1, 1, 1))[:2], found.cluster

    assert route(20, H200, 1) == ("_cluster_norm_e128", (2, 1), 2)
    assert route(128, H200, 4) == ("_cluster_norm_e128", (8, 4), 8)
    assert route(128, H200, 8) == ("_cluster_e128", (8, 8), 8)
    assert route(129, H200, 1) == ("_norm_e512", (9, 1), 1)
    assert route(128, A100, 3) == ("_norm_e128", (8, 3), 1)
    assert route(128, A100, 9) == ("_e128", (8, 9), 1)
    assert route(128, H200, 64) == ("_cluster_e128", (8, 16), 8)
    assert route(128, H200, 1024) == ("_many_e128", (32, 1), 1)


def test_every_kernel_of_a_mixture_in_fp8_is_named_at_the_start() -> None:
    config = EngineConfig(quantization="fp8")
    given = planner(kept(built(QWEN3_30B, num_hidden_layers=3), None, config, H200), H200, config, GB125)
    named = set(given.kernels())
    steps = [*given.decode(1), *given.decode(8), *given.decode(128), *given.body(4096)]
    assert not {p.kernel for p in steps} - named


def test_experts_with_columns_in_their_own_order_get_rows_in_it() -> None:
    """On Hopper too: a launch before each product, and tiles of sorted entries from one token on."""

    def ordered(weight: Weight) -> Weight:
        if weight.role != "stack":
            return weight
        kept = IntegerFormat(((weight.shape[-2], "int4"),), "GPTQ 4-bit", reordered=True)
        return replace(weight, format=kept)

    mixture = built(QWEN3_30B, num_hidden_layers=1).with_weights(ordered)
    given = planner(mixture, H200, EngineConfig(), GB125)
    named = set(given.kernels())
    kernel, wide = "sm80_bf16_experts_int4_n", f"sm90_bf16_moe_int4_n{QUANTISED_WIDE}"
    for tokens, product in ((1, f"{kernel}16"), (8, f"{kernel}16"), (128, f"{kernel}16"), (4096, wide)):
        step = given.decode(tokens) if tokens <= 128 else given.body(tokens)
        launches = [p for p in step if re.search("experts_(sort|int4)|moe_(reorder|int4|gather)", p.kernel)]
        reorder = "sm80_moe_reorder_rows"
        assert [p.kernel for p in launches] == ["sm90_experts_sort", reorder, product, reorder, product]
        assert {p.kernel for p in launches} <= named
        up, down = launches[1], launches[3]
        assert up.grid(Counts(tokens, 1, tokens)) == (8 * tokens, 2, 1) and down.grid(Counts(1, 1, 1))[1] == 1
        assert up.parameters[6].value == 2 * 768 // 64 * 16 * (256 + 4096) + 4 * 2048  # bytes of an expert


def test_too_many_experts_are_refused_by_name() -> None:
    wide = built(QWEN3_30B, num_hidden_layers=1, num_experts=1024)
    with pytest.raises(MissingKernelError, match="8 of 1024 experts"):
        planner(wide, H200, EngineConfig(), GB125).kernels()


def test_tiles_are_enough_for_the_worst_spread() -> None:
    rng = np.random.default_rng()
    for _ in range(200):
        tokens, experts, tile = rng.integers(1, 70), int(rng.integers(1, 40)), int(rng.integers(1, 20))
        top_k = int(rng.integers(1, experts + 1))
        counts = np.bincount(
            np.argsort(rng.random((tokens, experts)) * rng.random(experts))[:, :top_k].reshape(-1)
        )
        assert sum(-(-counts // tile)) <= most_tiles(tokens * top_k, experts, tile)


def tiles_of(mixed: experts_checks.Mixed, tokens: int, facts: DeviceFacts) -> ExpertsPlan:
    chip = DeviceInfo(facts.capability, facts.sm_count, facts.smem_per_block)
    nowhere = ExpertsAt(**dict.fromkeys((f.name for f in fields(ExpertsAt)), 0))
    return ExpertsPlan(mixed.op(BF16), "experts", tokens, "bf16", chip, nowhere)


def test_tiles_grow_with_the_step() -> None:
    mixed = experts_checks.Mixed(128, 8, 2048, 768, 2048)
    tiles = [tiles_of(mixed, tokens, H200).tile for tokens in range(2, 2000, 7)]
    assert tiles == sorted(tiles) and tiles[0] == 8 and tiles[-1] == experts_manifest.WIDE


@pytest.mark.parametrize(
    ("experts", "chosen", "always", "few"), [(128, 8, 0, 224), (66, 8, 2, 128)], ids=["qwen3", "lite"]
)
def test_quantised_experts_of_few_entries_have_small_tiles(
    experts: int, chosen: int, always: int, few: int
) -> None:
    for tokens in (1, 8, 16, 32, 64, few, 2 * few, 8 * few):
        found = choose.spread(tokens, experts, chosen, always)
        small = tokens <= few
        assert choose.quantised_tile_of(found, 90) == (16 if small else experts_manifest.QUANTISED_WIDE)
        assert choose.quantised_tile_of(found, 80) == (16 if small else 64)


def test_experts_have_no_more_tiles_than_full_ones_would_be() -> None:
    for entries in range(1, 2000):
        for tile in (8, 16, 64, 128, experts_manifest.WIDE):
            each = even_tile(entries, tile)
            assert each <= tile and -(-entries // each) == -(-entries // tile)


def test_experts_that_every_token_has_count_when_tiles_are_chosen() -> None:
    (hit, each), shared = choose.spread(256, 66, 8, 2)
    assert shared == (2, 256) and hit == pytest.approx(64) and 24 <= each < 48, "six of 64, about 24 each"
    lite = experts_checks.Mixed(66, 8, 2048, 1408, 2048, always=2)
    for facts in (A100, L40):
        assert [tiles_of(lite, tokens, facts).block.tokens for tokens in (72, 256)] == [16, 64]
    # 15 and 28 entries of an expert that is routed to, with room for chance: one tile each
    assert [tiles_of(lite, tokens, H200).tile for tokens in (72, 170)] == [16, 32]


def test_segments_leave_no_warp_idle() -> None:
    for k in range(8, 20000, 8):
        assert 1 <= segments_of(k) <= experts_manifest.MAX_SEGMENTS
        assert segments_of(k) <= -(-k // 64)


def test_a_step_reads_the_experts_that_are_hit() -> None:
    program = built(QWEN3_30B, num_hidden_layers=1)
    op = next(op for op in program.ops if isinstance(op, Experts))
    route = next(op for op in program.ops if isinstance(op, Route))
    one = op_cost(program, op, StepShape(1, 1, 1)).weight_bytes
    assert one == pytest.approx(8 * 3 * 768 * 2048 * 2)
    assert op_cost(program, op, StepShape(4096, 1, 1)).weight_bytes == pytest.approx(16 * one, rel=1e-6)
    assert op_cost(program, route, StepShape(1, 1, 1)).weight_bytes == 128 * 2048 * 2


# ---- loading


class HostLoader(Loader):
    """A loader whose device is the emulator; `nbytes` of rows are sent at a time."""

    def __init__(self, gpu: Emulator, nbytes: int) -> None:
        self._gpu, self.tag, self._held = gpu, "bf16", []  # type: ignore[var-annotated]
        self._staging = [SimpleNamespace(nbytes=nbytes)]  # type: ignore[list-item]
        self._stream, self._rows_bytes, self.rows_at = None, 1 << 30, 0  # type: ignore[assignment]

    def queue(self, span: Span, place: Callable[[int, int, int, int], None], row_bytes: int = 0) -> None:
        for start, stop, first, padded in self._cut(span, row_bytes):
            self._held.append(self._gpu.array(span.data[start:stop]))
            place(self._held[-1].address, first, stop - start, padded)

    def run(self, kernel: str, arguments: Sequence[Any], grid: int) -> None:
        cells = [ctypes.c_uint64(a) if isinstance(a, int) else a for a in arguments]
        self._gpu.launch(kernel, 2, 64, cells)


@pytest.mark.emulated
@needs_emulator
@pytest.mark.parametrize("rows", [8, 1000])
def test_stacks_are_packed_expert_by_expert(rows: int) -> None:
    config = model(
        "MixtralForCausalLM", num_local_experts=3, num_experts_per_tok=2, hidden_size=72,
        intermediate_size=40, num_hidden_layers=1,
    )  # fmt: skip
    program, gpu = built(config), Emulator()
    arrays = weights_of(program)
    checkpoint, loader = ArrayCheckpoint(config, arrays), HostLoader(gpu, rows * 80 * 4)
    wanted = {w.form: w for w in packed_weights(fuse(program)) if w.form in ("stack", "gated_stack")}
    assert wanted["gated_stack"].nbytes == 3 * 2 * 2 * 8192
    assert wanted["stack"].nbytes == 3 * 2 * 1 * 8192
    for form, w in wanted.items():
        target = gpu.zeros((w.nbytes,), np.uint8)
        loader._expand(w, target.address, checkpoint)
        found = target.get().reshape(3, -1)
        for e in range(3):
            gate, down, up = (
                arrays[f"model.layers.0.block_sparse_moe.experts.{e}.w{i}.weight"].astype(BF16)
                for i in (1, 2, 3)
            )
            matrix = down if form == "stack" else interleave_gate_up(gate, up)
            assert (found[e] == pack_matrix(matrix)).all(), (form, e)


@pytest.mark.emulated
@needs_emulator
@pytest.mark.parametrize("rows", [8, 1000])
def test_shared_experts_are_packed_behind_the_others(rows: int) -> None:
    config = {**CONFIGS["DeepSeek-V2-Lite"], "hidden_size": 80, "moe_intermediate_size": 40,
              "n_routed_experts": 3, "num_experts_per_tok": 2, "num_hidden_layers": 2}  # fmt: skip
    program, gpu = built(config), Emulator()
    arrays = weights_of(program)
    checkpoint, loader = ArrayCheckpoint(config, arrays), HostLoader(gpu, rows * 80 * 4)
    shared = {
        which: arrays[f"model.layers.1.mlp.shared_experts.{which}_proj.weight"].astype(BF16)
        for which in ("gate", "up", "down")
    }
    assert shared["up"].shape == shared["down"].shape == (80, 80)
    for w in packed_weights(fuse(program)):
        if w.form not in ("stack", "gated_stack"):
            continue
        target = gpu.zeros((w.nbytes,), np.uint8)
        loader._expand(w, target.address, checkpoint)
        found = target.get().reshape(5, -1)
        for s in range(2):
            part = slice(40 * s, 40 * (s + 1))
            gated = interleave_gate_up(shared["gate"][part], shared["up"][part])
            matrix = gated if w.form == "gated_stack" else np.ascontiguousarray(shared["down"][:, part])
            assert (found[3 + s] == pack_matrix(matrix)).all(), (w.form, s)


# ---- engines


@pytest.mark.emulated
@needs_emulator
@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_a_mixture_on_the_emulated_backend(rng: np.random.Generator, architecture: str) -> None:
    """Loading, graphs and steps: the CPU backend's scores, and the same bits alone and in company."""
    config = model(
        architecture, num_hidden_layers=2, hidden_size=128, intermediate_size=72, moe_intermediate_size=72,
        num_local_experts=4, num_experts=4, num_experts_per_tok=2, num_attention_heads=2,
        num_key_value_heads=1, norm_topk_prob=True,
    )  # fmt: skip
    requests = [
        (rng.integers(0, 515, n).tolist(), Sampling(max_tokens=3, logprobs=2, prompt_logprobs=1))
        for n in (3, 20, 40, 9)
    ]
    small = replace(CONFIG, max_num_batched_tokens=24)  # the longest prompt comes in two chunks
    with emulated_driver():
        core = core_of(backend(config, "cuda", DType.F16, small), config, small)
        found = run(core, requests)
        (alone,) = run(core, requests[1:2])
        core.close()
    assert [o.logprobs for o in alone] == [o.logprobs for o in found[1]]
    core = core_of(backend(config, "cpu", DType.F16), config)
    wanted = run(core, requests)
    core.close()
    apart = [
        abs(a.logprob - b.logprob)
        for ours, theirs in zip(found, wanted, strict=True)
        for a, b in zip(ours[0].prompt_logprobs or [], theirs[0].prompt_logprobs or [], strict=True)
    ]
    assert len(apart) == 68
    assert np.mean(np.array(apart) < 0.03) > 0.9  # a near tie of the router may fall to the other side
