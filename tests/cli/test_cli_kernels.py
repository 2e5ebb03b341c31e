"""`rvllm kernels`: the catalog as people see it; compiling needs NVRTC, the rest nothing."""

from pathlib import Path

import pytest

from rvllm.cli.main import main
from rvllm.errors import MissingKernelError
from rvllm.kernels import build
from rvllm.kernels.manifest import MANIFEST

STEP = ["--match", "sm80_begin_step"]


def compiler_missing() -> str:
    try:
        build._nvrtc()
        build._cuda_includes()
    except MissingKernelError as error:
        return str(error)
    return ""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RVLLM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


def test_the_list_holds_every_kernel_with_what_makes_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "list", "--all", "--arch", "sm_80"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == sorted(MANIFEST)
    assert lines[-1].startswith(f"{len(MANIFEST)} kernels; cubins in ")
    (row,) = (line for line in lines if line.startswith("sm80_bf16_attn_prefill_d128 "))
    spec = MANIFEST["sm80_bf16_attn_prefill_d128"]
    for part in (spec.symbol, spec.source, str(spec.smem), "sm_80+", "not built"):
        assert part in row
    (only_hopper,) = (line for line in lines if line.startswith("sm90_bf16_gemm_split_n8 "))
    assert "sm_90 only" in only_hopper and " -  " in only_hopper
    assert main(["kernels", "list", "--arch", "sm_80"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 80, "without --all it fits a terminal"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["list", "--match", "nothing*"], "--match: no kernel is named like 'nothing*'"),
        (["build", "--arch", "sm_70"], "--arch: 'sm_70' is not one of sm_80, "),
        (["list", "--arch", ""], "--arch: '' is not one of"),
        (
            ["check", *STEP],
            "1 of 1 units are not built: common/begin_step.cu (sm_90a, 1 kernels); run `rvllm kernels build`",
        ),
        (["shuffle"], "invalid choice: 'shuffle'"),
    ],
)
def test_refusals_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.compile
@pytest.mark.skipif(bool(compiler_missing()), reason=f"needs the cuda extra: {compiler_missing()}")
def test_what_is_built_is_checked_and_not_built_again(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kernels", "build", *STEP, "--arch", "sm_80,sm_90a"]) == 0
    out = capsys.readouterr().out
    assert "sm_80: 1 units, 1 compiled" in out and "sm_90a: 1 units, 1 compiled" in out
    assert "0 bytes spilled" in out and len(list(cache.glob("*.cubin"))) == 2
    assert main(["kernels", "check", *STEP, "--arch", "sm_80,sm_90a"]) == 0
    assert "all 2 units are built" in capsys.readouterr().out
    assert main(["kernels", "build", *STEP, "--arch", "sm_90a"]) == 0
    assert "1 units, 0 compiled" in capsys.readouterr().out
    for path in cache.glob("*.cubin"):
        path.write_bytes(path.read_bytes()[:300])
    assert main(["kernels", "check", *STEP, "--arch", "sm_90a"]) == 2
    assert main(["kernels", "build", *STEP, "--arch", "sm_90a"]) == 0
    assert "1 units, 1 compiled" in capsys.readouterr().out


def test_a_release_is_checked_by_its_manifest(tmp_path: Path) -> None:
    (tmp_path / "a.cubin").write_bytes(b"code")
    (tmp_path / "b.cubin").write_bytes(b"more")
    build.write_manifest(tmp_path)
    assert build.damaged(tmp_path) == []
    (tmp_path / "a.cubin").write_bytes(b"coda")
    (tmp_path / "b.cubin").unlink()
    assert build.damaged(tmp_path) == ["a.cubin", "b.cubin"]


def test_kernels_of_an_absent_extra_are_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rvllm.kernels.external.find_spec", lambda name: None)
    assert main(["kernels", "check", "--arch", "sm_90a", "--match", "*cutlass*"]) == 0
    out = capsys.readouterr().out
    assert "sm_90a: 18 units are left out: kernels built from CUTLASS need its headers: pip install" in out


def test_a_release_is_made_without_kernels_of_an_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rvllm.kernels.external.missing_headers", lambda extra: "")
    words = ["kernels", "check", "--arch", "sm_90a", "--match", "*cutlass*", "--output", str(tmp_path)]
    assert main(words) == 2  # of a cache that is no release they can be asked for
    build.write_manifest(tmp_path)
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "sm_90a: 18 units are left out: a release is made without those of cutlass" in out
