"""Every kernel of the catalog compiles for the targets CI stands for; no GPU needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rvllm.errors import MissingKernelError
from rvllm.kernels import build
from rvllm.kernels.build import Unit
from rvllm.kernels.manifest import MANIFEST
from rvllm.kernels.spec import KernelSpec


def nvrtc_missing() -> str:
    try:
        build._nvrtc()
        build._cuda_includes()
    except MissingKernelError as error:
        return str(error)
    return ""


def units_of(target: str, capability: int) -> list[Unit]:
    return build.units([s for s in MANIFEST.values() if s.runs_on(capability)], target)


# sm_90a also runs what is written for sm_80: only what exists for Hopper alone is compiled twice.
HOPPER = [
    u for u in units_of("sm_90a", 90) if any(s.exact and s.source == u.source for s in MANIFEST.values())
]
REST = [u for u in units_of("sm_90a", 90) if u not in HOPPER]
UNITS = [*units_of("sm_80", 80), *HOPPER, *REST]


@pytest.mark.compile
@pytest.mark.skipif(bool(nvrtc_missing()), reason=f"needs the cuda extra: {nvrtc_missing()}")
@pytest.mark.parametrize("unit", UNITS, ids=lambda u: f"{u.target}-{u.source}-{u.key[:6]}")
def test_compiles_without_spilling_much(unit: Unit) -> None:
    cubin = build.compile_unit(unit)
    assert set(cubin.names) == set(unit.symbols)
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", cubin.log)]
    assert max(spilled, default=0) <= 256, cubin.log
    assert "C7508" not in cubin.log, "setmaxnreg is ignored"


def test_a_key_follows_sources_headers_and_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.cu").write_text('#include "b.cuh"\n')
    (tmp_path / "b.cuh").write_text("// one\n")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    spec = KernelSpec("k", "a.cu", "f")

    def key(target: str = "sm_80", **changes: object) -> str:
        build.source_hash.cache_clear()
        (unit,) = build.units([KernelSpec(**{**spec.__dict__, **changes})], target)  # type: ignore[arg-type]
        return unit.key

    first = key()
    assert key() == first
    assert key(target="sm_90a") != first
    assert key(defines=("X=1",)) != first
    (tmp_path / "b.cuh").write_text("// two\n")
    assert key() != first
    build.source_hash.cache_clear()


def test_a_missing_cubin_is_named_not_compiled_behind_ones_back(tmp_path: Path) -> None:
    with pytest.raises(MissingKernelError, match="rvllm kernels build"):
        build.load(units_of("sm_80", 80)[:2], tmp_path, compile_missing=False)
