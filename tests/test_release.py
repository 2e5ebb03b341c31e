"""A release: which kernels it holds, and what its bill of materials lists."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from rvllm.kernels import build
from rvllm.kernels.manifest import MANIFEST

SCRIPT = Path(__file__).parent.parent / "scripts" / "build_release.py"


@pytest.fixture(scope="module")
def release() -> ModuleType:
    pytest.importorskip("packaging", reason="needs packaging")
    spec = importlib.util.spec_from_file_location("build_release", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_holds_the_kernels_of_its_architectures_and_no_others(
    release: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cutlass = next(spec for spec in MANIFEST.values() if spec.extra)
    wgmma = next(spec for spec in MANIFEST.values() if spec.exact and not spec.extra)
    chosen = [MANIFEST["sm80_begin_step"], cutlass, wgmma]
    monkeypatch.setattr(release, "MANIFEST", {spec.name: spec for spec in chosen})
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    monkeypatch.setattr(build, "_nvrtc", lambda: None)

    def compiled(unit: build.Unit) -> build.Cubin:
        return build.Cubin(unit, b"\x7fELF" + unit.target.encode(), {s: s for s in unit.symbols}, 1.0)

    monkeypatch.setattr(build, "compile_unit", compiled)
    (tmp_path / "of_other_sources.cubin").write_bytes(b"")
    release.build_kernels(["sm_80", "sm_90a"])
    units = [*build.units(chosen[:1], "sm_80"), *build.units([chosen[0], wgmma], "sm_90a")]
    assert {path.stem for path in tmp_path.glob("*.cubin")} == {unit.key for unit in units}
    assert set(json.loads((tmp_path / build.MANIFEST_FILE).read_text())) == {f"{u.key}.cubin" for u in units}
    assert build.damaged(tmp_path) == []
    said = capsys.readouterr().out
    assert "sm_80       1 units" in said and "sm_90a      2 units" in said


def test_the_bill_lists_what_the_dependencies_bring(
    release: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    needs = {
        "rvllm": ["A_b>=1", "c[more]", 'other; extra == "cuda"', 'old; python_version < "3"'],
        "A_b": ["c"],
        "c": ['d; extra == "more"', 'e; extra == "less"'],
        "d": ["A_b"],  # a circle
    }
    monkeypatch.setattr(release.metadata, "requires", needs.get)
    monkeypatch.setattr(release.metadata, "version", lambda name: f"1.{len(name)}")
    assert release.needed() == {"a-b": "1.3", "c": "1.1", "d": "1.1"}
    (tmp_path / "x.whl").write_bytes(b"wheel")
    release.write_sbom(tmp_path / "x.whl", tmp_path / "sbom.json")
    bill = json.loads((tmp_path / "sbom.json").read_text())
    assert [part["purl"] for part in bill["components"]] == [
        "pkg:pypi/a-b@1.3",
        "pkg:pypi/c@1.1",
        "pkg:pypi/d@1.1",
    ]
    assert len(bill["metadata"]["component"]["hashes"][0]["content"]) == 64
