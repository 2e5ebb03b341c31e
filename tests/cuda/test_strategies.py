"""Whose kernels compute a product under each --gemm-strategy; no GPU is needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rvllm.backends.cuda.device.launches import Planned
from rvllm.backends.cuda.ops.gemm import cutlass
from rvllm.config import EngineConfig
from rvllm.errors import MissingKernelError, UsageError
from rvllm.kernels import build, external
from rvllm.kernels.gemm.cutlass.specs import SPECS, TILES
from rvllm.kernels.manifest import MANIFEST
from rvllm.program.dtypes import DType
from support.kernels.machine_code import GRIDDEP_LAUNCH, GRIDDEP_WAIT, opcodes
from support.kernels.planned import A100, GEMMA_27B, H100, planner, program

LAYER = ("qkv", "o", "gate_up", "down")


def products(strategy: str, tokens: int = 16, **changes: object) -> list[Planned]:
    """The launches of one layer's products and the head's, by order."""
    given = program(num_hidden_layers=1, **changes)
    planned = planner(given, H100, EngineConfig(gemm_strategy=strategy)).decode(tokens)
    return [p for p in planned if re.search("gemm|cutlass|cublas", p.kernel)]


def whose(planned: Planned) -> str:
    return next(name for name in ("cutlass", "cublas", "gemm") if name in planned.kernel)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("native", ["gemm"] * 5),
        ("cublas", ["cublas"] * 5),
        ("cutlass", ["cutlass"] * 5),
        ("hybrid", ["cublas", "cublas", "cutlass", "cublas", "cutlass"]),
    ],
)
def test_each_product_has_the_strategys_kernel(strategy: str, expected: list[str]) -> None:
    planned = products(strategy)
    assert [whose(p) for p in planned] == expected
    if strategy != "native":
        assert all(f"--gemm-strategy {strategy}" in p.why for p in planned)


def test_hybrid_gives_cutlass_what_the_library_has_no_epilogue_for() -> None:
    """Gemma's soft cap of the logits, its GELU gates."""
    planned = products("hybrid", **{k: v for k, v in GEMMA_27B.items() if k != "num_hidden_layers"})
    assert [whose(p) for p in planned] == ["cublas", "cublas", "cutlass", "cublas", "cutlass"]


def test_weights_lie_once_each_as_their_kernel_reads_them() -> None:
    forms = {}
    for strategy in ("native", "cutlass", "hybrid"):
        plan = planner(program(num_hidden_layers=1), H100, EngineConfig(gemm_strategy=strategy))
        names = plan.addresses.weights
        forms[strategy] = {form for name, form in names if "proj" in name or "mlp" in name or "attn" in name}
        assert len({name for name, _ in names}) == len(names)  # none is kept twice
    assert forms["native"] == forms["cutlass"] and "gated" in forms["hybrid"] and "table" in forms["hybrid"]


@pytest.mark.parametrize("n", [64, 203, 3584, 4608, 37888])
@pytest.mark.parametrize("k", [8, 72, 3584, 18944])
def test_every_batch_has_a_tile_that_covers_it_within_the_card(n: int, k: int) -> None:
    for tokens in (*range(1, 66), 100, 128, 129, 192, 256, 300, 512, 8192):
        plan = cutlass.plan_cutlass(n, k, tokens, "bf16", 132, 90)
        assert MANIFEST[plan.kernel].smem >= plan.smem and plan.smem <= 232448 - 1024
        assert plan.grid[0] % plan.cluster == 0 and 0 < plan.grid[0] <= 132
        assert plan.box_rows * plan.cluster == plan.token_tile and plan.box_rows <= 256
        assert plan.segments == 1  # one chain over K whatever the tile: the bits of a row are its own
        assert tokens > 64 or plan.token_tile < 2 * max(tokens, 8)


def test_the_time_by_the_model_never_falls_with_more_tokens() -> None:
    for n, k in ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)):
        times = [
            cutlass.cycles(cutlass.plan_cutlass(n, k, t, "bf16", 132, 90).tile, n, t, k // 64, 132)
            for t in (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
        ]
        assert times == sorted(times)


def test_other_gpus_are_refused_with_what_they_can_use() -> None:
    with pytest.raises(MissingKernelError, match=r"compute capability 9\.0.*has 8\.0.*native or cublas"):
        planner(program(num_hidden_layers=1), A100, EngineConfig(gemm_strategy="cutlass")).kernels()
    with pytest.raises(UsageError, match="inner size"):
        cutlass.plan_cutlass(64, 12, 1, "bf16", 132, 90)


def test_without_the_extra_the_refusal_names_it_and_a_built_kernel_needs_it_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external, "find_spec", lambda name: None)
    monkeypatch.setattr(build, "_nvrtc", lambda: None)
    (unit,) = build.units(SPECS[:1], "sm_90a")
    with pytest.raises(MissingKernelError, match=r"need its headers: pip install .*--gemm-strategy native"):
        build.load([unit], tmp_path)
    build._write(build.Cubin(unit, b"\x7fELF", {unit.symbols[0]: "f"}, 1.0), tmp_path)
    assert build.load([unit], tmp_path)[0].code == b"\x7fELF"


def test_a_key_follows_the_version_of_the_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    (unit,) = build.units(SPECS[:1], "sm_90a")
    before = unit.key
    monkeypatch.setitem(external.HEADERS, "cutlass", "sgl-deep-gemm==9.9.9")
    assert unit.key != before
    (ours,) = build.units([MANIFEST["sm80_begin_step"]], "sm_90a")
    assert not ours.extra


@pytest.mark.compile
def test_cutlass_kernels_compile_without_serialised_wgmma() -> None:
    """A small one with all that they have: the headers take most of the seconds."""
    if absent := external.missing_headers("cutlass"):
        pytest.skip(absent)
    try:
        build._nvrtc(), build._cuda_includes()
    except MissingKernelError as error:
        pytest.skip(str(error))
    (unit,) = build.units([spec for spec in SPECS if spec.name == "sm90_bf16_cutlass_r128_n64"], "sm_90a")
    cubin = build.compile_unit(unit)
    assert cubin.code.startswith(b"\x7fELF") and set(cubin.names) == set(unit.symbols)
    (made_of,) = (opcodes(cubin.code)[mangled] for mangled in cubin.names.values())
    assert {GRIDDEP_LAUNCH, GRIDDEP_WAIT} <= made_of, "it would run before what it reads is written"
    assert "C75" not in cubin.log, cubin.log  # wgmma serialised, setmaxnreg ignored
    assert [int(n) for n in re.findall(r"(\d+) bytes spill stores", cubin.log)] == [0]


def test_f16_has_the_tiles_that_bf16_has() -> None:
    for dtype in (DType.BF16, DType.F16):
        given = planner(program(dtype, num_hidden_layers=1), H100, EngineConfig(gemm_strategy="cutlass"))
        tag = "bf16" if dtype is DType.BF16 else "f16"
        used = {name for name in given.kernels() if "cutlass" in name}
        assert used and used <= {tile.kernel(tag) for tile in TILES}
