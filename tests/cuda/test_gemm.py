"""Matrix kernels without a GPU: packing, plans, the layout that Python and C++ must agree on, compiling.

With a GPU, `scripts/gpu/gemm_check.py` runs every kernel; `test_on_the_gpu` here runs its quick part.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rvllm.backends.cuda.device import driver
from rvllm.backends.cuda.ops.gemm import plan as gemm
from rvllm.backends.cuda.ops.gemm import sm80
from rvllm.backends.cuda.ops.gemm.common import Kind
from rvllm.backends.cuda.ops.gemm.cost import Work
from rvllm.errors import UsageError
from rvllm.kernels import build
from rvllm.kernels.gemm import specs as gemm_manifest
from rvllm.kernels.gemm.specs import SPECS

ROOT = Path(__file__).parents[2]
NAMES = {spec.name: spec for spec in SPECS}
SHAPES = st.tuples(st.integers(1, 200_000), st.integers(1, 4000).map(lambda k: 8 * k))
SEVEN_B = {"qkv": (4608, 3584), "o": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944),
           "lm_head": (152064, 3584)}  # fmt: skip


def bits(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 1 << 16, shape).astype(np.uint16)


@pytest.mark.parametrize(("n", "k"), [(64, 64), (1, 8), (203, 72), (576, 1536), (130, 200)])
def test_packing_follows_the_documented_offsets(n: int, k: int) -> None:
    rng = np.random.default_rng()
    weight = bits(rng, n, k)
    packed = gemm.pack_matrix(weight)
    assert packed.nbytes == gemm.packed_nbytes(n, k)
    blocks, words = -(-k // 64), packed.view(np.uint16)
    row, column = np.arange(n)[:, None], np.arange(k)[None, :]
    chunk = column % 64 // 8 ^ row % 8
    at = (row // 64 * blocks + column // 64) * 8192 + row % 64 * 128 + chunk * 16 + column % 8 * 2
    assert np.array_equal(words[at // 2], weight)
    assert np.count_nonzero(words) == np.count_nonzero(weight)  # all padding is zero


def test_gate_and_up_take_turns_of_eight_rows() -> None:
    gate = np.arange(24, dtype=np.uint16)[:, None] + np.zeros((1, 8), np.uint16)
    both = gemm.interleave_gate_up(gate, gate + 100)
    assert both.shape == (gemm.gated_rows(24), 8)
    first = [*range(8), *range(100, 108), *range(8, 16), *range(108, 116)]
    assert both[:32, 0].tolist() == first


@given(SHAPES)
def test_segments_cover_k_and_fit_a_cluster(shape: tuple[int, int]) -> None:
    blocks, segments = -(-shape[1] // 64), gemm.segments_of(*shape)
    # The kernels cut K as segment_start says: segment s is of blocks * s // segments on.
    assert 1 <= segments <= min(blocks, gemm.MAX_SEGMENTS)


@settings(max_examples=80)
@given(
    SHAPES,
    st.integers(1, 9000),
    st.sampled_from(gemm_manifest.DTYPES),
    st.sampled_from([80, 86, 89, 90, 100, 120]),
)
def test_plans_name_kernels_that_exist_and_cover_the_product(
    shape: tuple[int, int], tokens: int, dtype: str, capability: int
) -> None:
    plan = gemm.plan_gemm(*shape, tokens, dtype, 132, capability)
    spec = NAMES[plan.kernel]
    assert spec.runs_on(capability) and plan.smem <= spec.smem
    assert plan.mode in ("split", "pair", "tall") or plan.stages or plan.smem == spec.smem
    assert plan.segments == gemm.segments_of(*shape)  # whatever the batch: the bits depend on it
    assert plan.grid[0] % plan.cluster == 0 and plan.cluster <= 8
    if capability == 90:
        compiled = int(plan.kernel.rpartition("_n")[2])
        assert plan.block == gemm_manifest.sm90_threads(plan.mode, compiled)
        assert plan.token_tile in gemm_manifest.widths_of(plan.mode, compiled)
    tiles, token_tiles = -(-shape[0] // 64), -(-tokens // plan.token_tile)
    if plan.stages:
        tile = sm80.way_of(plan.mode, plan.token_tile).tile
        row_tiles = -(-shape[0] // tile.rows)
        assert plan.grid[0] % row_tiles == 0  # blocks together take the same rows
        assert token_tiles <= plan.grid[0] // row_tiles * plan.grid[1] < 2 * token_tiles + 16
        assert plan.grid[2] == (plan.segments if plan.partials else 1)
        assert plan.partials or plan.segments == 1 or tile.keeps
        assert plan.partials <= sm80.most_partial_bytes(shape[0], plan.segments)
        assert not plan.partials or row_tiles * token_tiles <= sm80.MAX_SPLIT_TILES
        assert plan.block == tile.threads and plan.smem == plan.stages * tile.stage
        assert 2 <= plan.stages <= 6 and plan.smem + 1024 <= sm80.card_of(capability).smem
    elif plan.mode == "pair":
        assert plan.grid == (2, token_tiles, -(-tiles // 2)) and plan.cluster == 2 and plan.segments == 4
        assert plan.smem - 256 >= 2 * 4 * plan.token_tile * (2 * 64 + 4)
    elif plan.mode in ("split", "eight"):
        assert plan.mode == "split" or plan.segments == 8
        assert plan.grid == (plan.segments, token_tiles, -(-tiles // 2)) and plan.cluster == plan.segments
        partial_sums = 4 * plan.token_tile * (2 * 64 + 4)
        assert plan.smem - 256 >= max(partial_sums, 2 * (2 * 8192 + 128 * plan.token_tile))
    else:
        assert 1 <= plan.grid[0] <= 132 and plan.token_tile % plan.box_rows == 0
        assert plan.mode in ("sum", "wide") or plan.segments == 1
        if plan.mode in ("tall", "wide"):  # as many clusters of two as there are tiles, or as are resident
            rows, of = (192, 2 * plan.token_tile) if plan.mode == "tall" else (256, plan.token_tile)
            assert plan.grid[0] == 2 * min(66, -(-shape[0] // rows) * -(-tokens // of))
        if plan.mode != "tall":  # whose blocks of a cluster share weights, not tokens
            assert plan.token_tile % (plan.box_rows * plan.cluster) == 0
    if tokens <= 128 and capability == 90:  # weights are streamed once: two blocks of `tall` share them
        assert tokens <= plan.token_tile * (2 if plan.mode == "tall" else 1)


@pytest.mark.parametrize("name", SEVEN_B)
def test_decode_uses_most_of_an_h100(name: str) -> None:
    plan = gemm.plan_gemm(*SEVEN_B[name], 16, "bf16", 132)
    assert 100 <= int(np.prod(plan.grid)) <= 132


@pytest.mark.parametrize("capability", [80, 86, 89, 120])
@pytest.mark.parametrize("name", SEVEN_B)
def test_the_chosen_way_of_an_sm80_card_is_the_cheapest_of_all(name: str, capability: int) -> None:
    """Also among those not thought of; and no batch is planned to take longer than a much larger one."""
    n, k = SEVEN_B[name]
    segments, card = gemm.segments_of(n, k), sm80.card_of(capability)
    planned = []
    for tokens in (1, 8, 9, 16, 32, 48, 64, 128, 256, 512, 1024, 8192):
        plan = gemm.plan_gemm(n, k, tokens, "bf16", 108, capability)
        work = Work(n, tokens, plan.blocks, segments, 108)
        every = [sm80.Way(t, s) for tiles in sm80.MMA_TILES.values() for t in tiles for s in (False, True)]
        few = tokens <= sm80.MAX_SPLIT_TOKENS  # beyond, sums left for other blocks would take too much memory
        able = [way for way in every if sm80.can_run(way, segments) and (few or not way.split)]
        planned.append(sm80.cycles(sm80.way_of(plan.mode, plan.token_tile), work, card))
        assert planned[-1] <= 1.1 * min(sm80.cycles(way, work, card) for way in able), (tokens, plan.mode)
    assert all(more >= 0.95 * fewer for fewer, more in pairwise(planned)), planned


def test_a_ring_is_as_deep_as_the_card_has_room_for() -> None:
    tiles = [tile for tiles in sm80.MMA_TILES.values() for tile in tiles]
    rings = {c: [sm80.stages_of(tile, card.smem, 99) for tile in tiles] for c, card in sm80.CARDS.items()}
    assert rings[80] == [(4, 4), (4, 4), (3, 4), (3, 3), (3, 2), (5, 1), (3, 1)]
    assert rings[86] == rings[89] == rings[120] == [(3, 3), (3, 3), (4, 2), (3, 2), (4, 1), (3, 1), (2, 1)]
    assert [sm80.stages_of(tile, 101_376, 1) for tile in tiles[:3]] == [(6, 1)] * 3
    with pytest.raises(ValueError, match="cannot sum 4 segments"):
        gemm.variant(3584, 3584, 300, "bf16", "sm80_wide", 256, 108)


def test_refusals_name_the_way_out() -> None:
    with pytest.raises(UsageError, match="8, 16"):
        gemm.plan_gemm(64, 12, 1, "bf16", 132)
    with pytest.raises(UsageError, match="bf16, f16"):
        gemm.plan_gemm(64, 64, 1, "f64", 132)


def compile_text(text: str, target: str) -> str:
    """NVRTC's log of a source; raises AssertionError with it when it does not compile."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC comes with the cuda extra")
    _, program = nvrtc.nvrtcCreateProgram(text.encode(), b"probe.cu", 0, [], [])
    options = [
        *build.OPTIONS,
        f"-arch={target}",
        f"-I{build.SOURCES}",
        *(f"-I{p}" for p in build._cuda_includes()),
    ]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytearray(size)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert status.value == 0, log.decode()
    return log.decode()


def test_python_and_cuda_agree_on_the_layout() -> None:
    lines = ['#include "gemm/gemm_sm90.cu"', "using namespace rvllm::gemm;"]
    for mode, sizes in gemm_manifest.MODES.items():
        for size in sizes:
            layout = f"Layout<{size}, {mode.upper()}>"
            same = ">=" if mode == "eight" else "=="  # it is launched with a shorter ring
            lines.append(f"static_assert({layout}::BYTES {same} {gemm_manifest.sm90_smem(mode, size)});")
            lines.append(f"static_assert({layout}::THREADS == {gemm_manifest.sm90_threads(mode, size)});")
    lines.insert(1, '#include "gemm/gemm_sm90_tall.cu"')
    for tile in gemm_manifest.TALL_TILES:
        lines.append(f"static_assert(Tall::bytes({tile}) == {gemm_manifest.sm90_smem('tall', tile)});")
    lines.append(f"static_assert(Tall::THREADS == {gemm_manifest.sm90_threads('tall', 192)});")
    lines.insert(2, '#include "gemm/gemm_sm90_wide.cu"')
    lines.append(f"static_assert(Wide::BYTES == {gemm_manifest.sm90_smem('wide', 256)});")
    lines.append(f"static_assert(Wide::THREADS == {gemm_manifest.sm90_threads('wide', 256)});")
    kinds = {kind.name: int(kind) for kind in Kind}
    lines += [f"static_assert({name} == {value});" for name, value in kinds.items()]
    lines.append("static_assert(packed_offset(70, 130, 3) == (3 + 2) * 8192 + 6 * 128 + 6 * 16 + 4);")
    compile_text("\n".join(lines), "sm_90a")
    with pytest.raises(AssertionError, match="static assert"):
        compile_text("\n".join([*lines, "static_assert(Layout<8, WALK>::BYTES == 1);"]), "sm_90a")


def test_unit_names_keep_units_apart() -> None:
    """Two kernels of one source compile together exactly when their units agree."""
    groups = build.units([spec for spec in SPECS if spec.source == "gemm/gemm_sm90.cu"], "sm_90a")
    assert len(groups) == len({spec.unit for spec in SPECS if spec.source == "gemm/gemm_sm90.cu"})
    assert sum(len(unit.symbols) for unit in groups) == sum(s.source == "gemm/gemm_sm90.cu" for s in SPECS)


@pytest.mark.gpu
def test_on_the_gpu() -> None:
    if not driver.device_count():
        pytest.skip("no NVIDIA GPU here")
    pytest.importorskip("torch", reason="the check keeps its memory in torch")
    import torch

    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA here")
    script = ROOT / "scripts" / "gpu" / "gemm_check.py"
    path = f"{ROOT / 'src'}:{script.parent}"
    done = subprocess.run(
        [sys.executable, script, "--quick"], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
