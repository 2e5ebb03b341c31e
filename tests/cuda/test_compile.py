"""Every kernel of the catalog compiles, without a GPU, into code that keeps its registers.

The default is a selection that touches every source file; RVLLM_TEST_COMPILE=all takes every
kernel that plans may choose, for sm_80 and sm_90a; =layouts, as CI has it, all but half of the products with
quantised weights (see `in_turn`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rvllm.backends.cuda.formats.fp8_plan import plan_fp8
from rvllm.backends.cuda.ops.gemm.integer import plan_integer
from rvllm.backends.cuda.ops.gemm.plan import plan_gemm
from rvllm.config import EngineConfig
from rvllm.errors import MissingKernelError, UsageError
from rvllm.kernels import build
from rvllm.kernels.attention import specs as attention
from rvllm.kernels.gemm.integer.specs import LAYOUTS
from rvllm.kernels.manifest import MANIFEST, released
from rvllm.kernels.rowwise import specs as rowwise
from rvllm.kernels.spec import KernelSpec
from support.kernels.machine_code import GRIDDEP_WAIT, arrivals_before_loads, opcodes
from support.kernels.planned import H100, planner, program

TARGETS = {"sm_80": 80, "sm_90a": 90}
INTEGER_SPILLS = 4096  # tiles of 128 tokens and more of integer weights spill; theirs are to be mended
SPILL_LIMIT = 384  # bytes: seldom taken paths may spill a little
TIGHT_LIMIT = 128  # of these: a little, and in the epilogue only
TIGHT = {"sm80_bf16_gemm_r64_n16", "sm80_f16_gemm_r128_n256", "sm80_bf16_gemm_pack_f32",
         "sm90_bf16_gemm_split_n256", "sm90_bf16_gemm_walk_n8", "sm90_f16_gemm_sum_n192",
         "sm90_f16_gemm_flow_n256", "sm90_bf16_gemm_tall_n192", "sm90_f16_gemm_pair_n192",
         "sm90_f16_gemm_wide_n256", "sm90_bf16_fp8_gemm_tall_n128",
         "sm90_bf16_fp8_gemm_tall_sum_n128"}  # fmt: skip
# sm_90a has wgmma kernels in their place.
NOT_ON_HOPPER = {"gemm/gemm_sm80.cu", "gemm/fp8/gemm_sm80.cu", "gemm/integer/gemm_sm80.cu"}
# Kernels of loading, of measurements and of a step's metadata are launched without programmatic dependence.
WITHOUT_WAIT = re.compile(
    r"checksum|copy_words|(dequant|fill_random|rvllm::(stream_read|fp8::(fill_\w+|pack_bytes|quantise_rows))).*"
)
CHOSEN = {
    "sm_80": {"sm80_f16_text_attn_d64", "sm80_f16_attn_decode_d64", "sm80_f16_attn_prefill_d64_small",
              "sm80_sample_pick", "sm80_f16_latent_prefill", "sm80_f16_latent_merge",
              "sm80_f16_latent_prepare_n8",
              "sm80_bf16_norm_layer_add_wide", "sm80_f16_dequant_q5_k", "sm80_bf16_gemm_r64_n16",
              "sm80_f16_experts_r64_n64", "sm80_f16_state_scan_s256", "sm80_f16_gated_norm",
              "sm80_f16_fp8_gemm_n16", "sm80_f16_experts_q4_n16", "sm80_f16_attn_decode_fp8_d64",
              "sm80_f16_integer_int4_n16", "sm80_bf16_integer_pack_int4", "sm80_bf16_text_attn_d64"},
    "sm_90a": {"sm80_bf16_attn_decode_d128", "sm80_sample_scan", "sm90_bf16_one_token_split",
               "sm80_sample_pick", "sm80_slot_start", "sm80_logprobs", "sm80_checksum",
               "sm80_bf16_fill_random", "sm80_bf16_embed", "sm80_bf16_embed_q4_k",
               "sm80_bf16_gather_rows", "sm80_bf16_add",
               "sm80_bf16_rope_kv", "sm80_bf16_rope_kv_interleaved", "sm80_bf16_norm_rms",
               "sm80_bf16_norm_rms_add", "sm80_bf16_norm_groups_rms", "sm80_bf16_gated_silu",
               "sm80_bf16_act_gelu", "sm80_bf16_dequant_q4_1", "sm80_f32_dequant_q6_k",
               "sm80_bf16_route_e128", "sm80_experts_sort", "sm80_bf16_experts_one_up_s4",
               "sm80_bf16_experts_e4m3_one_up",
               "sm80_bf16_experts_combine_norm", "sm80_bf16_chain_s3",
               "sm90_bf16_moe_grouped_n8", "sm90_bf16_moe_grouped_n192", "sm90_bf16_moe_int4_n96",
               "sm80_bf16_experts_r128_n128", "sm80_bf16_experts_int4_n64",
               "sm80_bf16_gemm_pack_f32", "sm80_stream_read", "sm80_begin_step", "sm90_bf16_gemm_split_n8",
               "sm80_copy_words",
               "sm80_bf16_rope_kv_rms", "sm80_bf16_norm_add_norm", "sm80_bf16_gated_clamped",
               "sm80_bf16_state_scan_s128_conv", "sm80_bf16_scan_keep", "sm80_bf16_causal_conv_k4_silu",
               "sm90_bf16_text_attn_d64", "sm80_bf16_pool", "sm80_bf16_attn_decode_sparse_d128",
               "sm90_bf16_attn_prefill_d128", "sm90_bf16_attn_decode_d128", "sm90_bf16_gemm_tall_n192",
               "sm90_f16_gemm_wide_n256", "sm90_bf16_latent_prefill",
               "sm90_bf16_fp8_gemm_split_n16", "sm90_bf16_fp8_gemm_tall_n128",
               "sm90_bf16_fp8_gemm_tall_sum_n128", "sm80_bf16_fp8_quantise", "sm80_fp8_pack",
               "sm90_bf16_attn_prefill_fp8_d128", "sm90_bf16_attn_decode_fp8_d128",
               "sm80_bf16_rope_kv_fp8_rows",
               "sm90_bf16_integer_int4_split_n8", "sm80_integer_pack_q4_k", "sm80_integer_quantise_f32"},
}  # fmt: skip


def nvrtc_missing() -> str:
    try:
        build._nvrtc()
        build._cuda_includes()
    except MissingKernelError as error:
        return str(error)
    return ""


def in_turn(units: list[build.Unit]) -> list[build.Unit]:
    """Of the products with quantised weights, and of chains of one token, each unit in one 16-bit type,
    by turns: their code differs in a few conversions only, and each of those is compiled with half of the
    units."""
    layouts: dict[tuple[str, str], list[build.Unit]] = {}
    for unit in units:
        if unit.source.startswith(("gemm/integer/gemm_", "moe/quantised_", "decode/chain")):
            layout = unit.symbols[0].replace("bf16", "f16")
            layouts.setdefault((unit.source, layout), []).append(unit)
    left = {
        unit
        for number, group in enumerate(layouts.values())
        for at, unit in enumerate(group)
        if at % 2 != number % 2 and len(group) > 1
    }
    return [unit for unit in units if unit not in left and not _elsewhere(unit)]


def _elsewhere(unit: build.Unit) -> bool:
    """Whether a unit is attention over an FP8 cache that has its turn with another GPU or 16-bit type."""
    found = re.search(r"attn_(decode|prefill)_fp8<(\w+), (\d+)", unit.symbols[0])
    if found is None:
        return False
    turn = attention.HEAD_DIMS.index(int(found[3])) + (found[1] == "prefill")
    return (turn % 2 == 0, turn // 2 % 2 == 0) != (unit.target == "sm_80", found[2] == "bf16")


def wanted(target: str) -> list[build.Unit]:
    asked = os.environ.get("RVLLM_TEST_COMPILE", "")
    everything = asked in ("all", "layouts")
    specs = [
        s for s in MANIFEST.values() if s.runs_on(TARGETS[target]) and not s.extra
    ]  # see test_strategies
    if target == "sm_90a":
        specs = [s for s in specs if s.source not in NOT_ON_HOPPER]
    units = build.units([s for s in specs if everything or s.name in CHOSEN[target]], target)
    return in_turn(units) if asked == "layouts" else units


CASES = [(target, unit) for target in TARGETS for unit in wanted(target)]


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[Callable[[build.Unit], build.Cubin]]:
    """Compiles what this run asks for on all cores; gives a unit's cubin when it is there."""
    asked = [item.callspec.params.get("unit") for item in request.session.items if hasattr(item, "callspec")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        cubins = {u: pool.submit(build.compile_unit, u) for u in asked if isinstance(u, build.Unit)}
        yield lambda unit: cubins[unit].result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.compile
@pytest.mark.skipif(bool(nvrtc_missing()), reason=f"needs the cuda extra: {nvrtc_missing()}")
@pytest.mark.parametrize(
    ("target", "unit"), CASES, ids=[f"{t}-{u.source}-{u.symbols[0].replace(' ', '')}" for t, u in CASES]
)
def test_compiles_within_its_registers(
    target: str, unit: build.Unit, compiled: Callable[[build.Unit], build.Cubin]
) -> None:
    cubin = compiled(unit)
    assert set(cubin.names) == set(unit.symbols)
    assert cubin.code.startswith(b"\x7fELF")
    assert b"_INTERNAL_" not in cubin.code, "holds a process id: say inline constexpr"
    assert "warning" not in cubin.log, cubin.log
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", cubin.log)]
    assert len(spills) >= len(unit.symbols)
    specs = {s.symbol: s for s in MANIFEST.values() if s.source == unit.source}
    if target == "sm_90a":
        made_of = opcodes(cubin.code)
        for symbol, mangled in cubin.names.items():
            waits = GRIDDEP_WAIT in made_of[mangled]
            assert waits or WITHOUT_WAIT.fullmatch(symbol), f"{symbol} does not wait for the kernel before"
        if "gemm/fp8/" in unit.source:
            assert not arrivals_before_loads(cubin.code), "a stage is given back before it has been read"
    assert max(spills) <= (INTEGER_SPILLS if "gemm/integer" in unit.source else SPILL_LIMIT), cubin.log
    for symbol, mangled in cubin.names.items():
        said = cubin.log.split(f"Compiling entry function '{mangled}'")[1].split("Compiling entry function")[
            0
        ]
        found = re.search(r"(\d+) bytes smem", said)
        spec = specs[symbol]
        if spec.name in TIGHT:
            spilled = re.search(r"(\d+) bytes spill stores", said)
            assert spilled and int(spilled[1]) <= TIGHT_LIMIT, (spec.name, spilled)
            slow = [line for line in cubin.log.splitlines() if "C75" in line and mangled in line]
            assert not slow, slow  # wgmma serialised or setmaxnreg ignored
        declared = spec.static_smem if spec.smem else 48 << 10
        assert not found or int(found[1]) <= declared, (spec.name, found[0])


def test_hopper_is_given_no_gemm_of_other_gpus() -> None:
    """What is left out of its compile cannot be chosen there."""
    for n, k in ((64, 128), (4096, 4096), (28672, 4096), (1024, 28672)):
        for tokens in (1, 8, 33, 64, 300, 4096):
            plans = [
                plan_gemm(n, k, tokens, "bf16", 132).kernel,
                plan_fp8(n, k, tokens, "bf16", 132, tokens > 16).kernel,
                *(plan_integer(n, k, tokens, "bf16", layout, 132).kernel for layout in LAYOUTS.values()),
            ]
            assert not {MANIFEST[name].source for name in plans} & NOT_ON_HOPPER


def test_names_say_what_they_are() -> None:
    assert all(re.fullmatch(r"sm[89]0_(bf16_|f16_|f32_)?[a-z0-9_]+", name) for name in MANIFEST)


def test_the_selection_touches_every_source() -> None:
    chosen = CHOSEN["sm_80"] | CHOSEN["sm_90a"]
    assert chosen <= MANIFEST.keys()
    ours = {s.source for s in MANIFEST.values() if not s.extra}
    assert ours == {MANIFEST[n].source for n in chosen}
    assert all((build.SOURCES / s.source).exists() for s in MANIFEST.values())
    assert {s.name for s in (*attention.SPECS, *rowwise.SPECS)} <= MANIFEST.keys()


def test_a_key_follows_sources_headers_and_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.cu").write_text('#include "b.cuh"\n')
    (tmp_path / "b.cuh").write_text("// one\n")
    monkeypatch.setattr(build, "SOURCES", tmp_path)

    def key(target: str = "sm_80", symbol: str = "f") -> str:
        build.source_hash.cache_clear()
        (unit,) = build.units([KernelSpec("k", "a.cu", symbol)], target)
        return unit.key

    first = key()
    assert key() == first
    assert key(target="sm_90a") != first
    assert key(symbol="g") != first
    (tmp_path / "b.cuh").write_text("// two\n")
    assert key() != first
    build.source_hash.cache_clear()


def test_a_missing_cubin_is_named_not_compiled_behind_ones_back(tmp_path: Path) -> None:
    with pytest.raises(MissingKernelError, match="rvllm kernels build"):
        build.load(wanted("sm_80")[:2], tmp_path, compile_missing=False)


@pytest.mark.parametrize("seqs", [1, 8, 256])
def test_a_release_serves_without_a_compiler(
    seqs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has whole units; a model wants some of their kernels."""
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    for unit in build.units([s for s in MANIFEST.values() if s.runs_on(90)], "sm_90a"):
        build._write(build.Cubin(unit, b"\x7fELF", {s: s for s in unit.symbols}, 1.0), tmp_path)
    build.write_manifest(tmp_path)
    names = planner(program(num_hidden_layers=1), H100, EngineConfig(max_num_seqs=seqs)).kernels()
    wanted = build.units([MANIFEST[name] for name in names], "sm_90a")
    found = build.load(released(wanted, 90), tmp_path / "none", compile_missing=False)
    held = {(c.unit.source, symbol) for c in found for symbol in c.names}
    assert {(u.source, symbol) for u in wanted for symbol in u.symbols} <= held
    (tmp_path / build.MANIFEST_FILE).unlink()
    assert released(wanted, 90) == wanted


def kept(folder: Path) -> tuple[build.Unit, Path]:
    (unit,) = build.units([MANIFEST["sm80_begin_step"]], "sm_80")
    build._write(build.Cubin(unit, b"\x7fELF" + bytes(500), {"begin_step": "begin_step"}, 1.0), folder)
    found = build.find(unit, folder)
    assert found is not None
    return unit, found[0]


@pytest.mark.parametrize("keep", [0, 10, 200, -1])
def test_a_cubin_that_was_cut_short_counts_as_absent(keep: int, tmp_path: Path) -> None:
    unit, path = kept(tmp_path)
    (whole,) = build.load([unit], tmp_path, compile_missing=False)
    assert len(whole.code) == 504
    path.write_bytes(path.read_bytes()[:keep])
    assert build.find(unit, tmp_path) is None
    with pytest.raises(MissingKernelError, match="rvllm kernels build"):
        build.load([unit], tmp_path, compile_missing=False)


def test_a_cache_that_cannot_be_written_is_one_line_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(
        UsageError, match=r"cannot be kept in .*file.kernels: Not a directory; set RVLLM_CACHE_DIR"
    ):
        kept(tmp_path / "file" / "kernels")
