"""Kernels compile, without a GPU, into code that keeps its registers.

The default is a selection that touches every source file; RVLLM_COMPILE=all takes every kernel there is.
"""

from __future__ import annotations

import os
import re

import pytest

from rvllm.kernels import build
from rvllm.kernels.ops_manifest import SPECS
from rvllm.kernels.spec import KernelSpec

pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC comes with the cuda extra")

TARGETS = ("sm_80", "sm_90a")
SPILL_LIMIT = 256  # bytes: seldom taken paths may spill a little
CHOSEN = {
    "sm_80": {"sm80_f16_attn_decode_d64", "sm80_f16_attn_prefill_d64_small", "sm80_sample_pick",
              "sm80_bf16_norm_layer_add_wide", "sm80_f16_dequant_q5_k"},
    "sm_90a": {"sm80_bf16_attn_decode_d128", "sm80_bf16_attn_prefill_d128", "sm80_sample_scan",
               "sm80_sample_pick", "sm80_slot_start", "sm80_logprobs", "sm80_checksum",
               "sm80_bf16_fill_random", "sm80_bf16_embed", "sm80_bf16_gather_rows", "sm80_bf16_add",
               "sm80_bf16_rope_kv", "sm80_bf16_rope_kv_interleaved", "sm80_bf16_norm_rms",
               "sm80_bf16_norm_rms_add", "sm80_bf16_norm_groups_rms", "sm80_bf16_gated_silu",
               "sm80_bf16_act_gelu", "sm80_bf16_dequant_q4_1", "sm80_f32_dequant_q6_k"},
}  # fmt: skip


def wanted(target: str) -> list[build.Unit]:
    specs = [s for s in SPECS if os.environ.get("RVLLM_COMPILE") == "all" or s.name in CHOSEN[target]]
    return build.units(specs, target)


CASES = [(target, unit) for target in TARGETS for unit in wanted(target)]


@pytest.mark.parametrize(
    ("target", "unit"), CASES, ids=[f"{t}-{u.source}-{u.symbols[0].replace(' ', '')}" for t, u in CASES]
)
def test_compiles_within_its_registers(target: str, unit: build.Unit) -> None:
    cubin = build.compile_unit(unit)
    assert set(cubin.names) == set(unit.symbols)
    assert cubin.code.startswith(b"\x7fELF")
    assert "warning" not in cubin.log, cubin.log
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", cubin.log)]
    assert len(spills) >= len(unit.symbols)
    assert max(spills) <= SPILL_LIMIT, cubin.log


def test_names_say_what_they_are() -> None:
    names = [spec.name for spec in SPECS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"sm80_(bf16_|f16_|f32_)?[a-z0-9_]+", name) for name in names)


def test_every_source_is_there() -> None:
    assert {s.source for s in SPECS} == {s.source for s in SPECS if (build.SOURCES / s.source).exists()}


def test_chosen_kernels_exist() -> None:
    known: dict[str, KernelSpec] = {spec.name: spec for spec in SPECS}
    assert CHOSEN["sm_80"] | CHOSEN["sm_90a"] <= known.keys()
    assert {s.source for s in SPECS} == {known[n].source for n in CHOSEN["sm_80"] | CHOSEN["sm_90a"]}
