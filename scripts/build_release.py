"""Builds a release: a wheel whose CUDA kernels and CPU kernels are compiled, and a list of what is in it.

    PYTHONPATH=src python scripts/build_release.py --out dist [--arch sm_80,sm_90a,...]

Needs the extras `cuda` and `compiler` (NVRTC), no GPU. Cubins that are built from the present sources stay as
they are. Prints the size of each architecture; writes dist/*.whl and dist/sbom.json (CycloneDX 1.6). Kernels
built from CUTLASS are left out: a cubin of theirs holds thousands of names with the compiling process's id,
so no two builds are equal, and who asks for them has that extra's headers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import zlib
from functools import partial
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from rvllm.cli.kernels import TARGETS
from rvllm.kernels import build
from rvllm.kernels.manifest import MANIFEST
from rvllm.version import __version__

ROOT = Path(__file__).parents[1]
LARGEST_WHEEL = 100e6  # what the Python index takes without asking


def build_kernels(targets: list[str]) -> None:
    """Fills the package's folder of cubins with exactly these targets, and prints what each takes."""
    kept: set[str] = set()
    for target in targets:
        capability = int("".join(filter(str.isdigit, target)))
        specs = [spec for spec in MANIFEST.values() if spec.runs_on(capability) and not spec.extra]
        units = build.units(specs, target)
        cubins = build.load(units, build.PREBUILT, progress=partial(show, target))
        code = b"".join(cubin.code for cubin in cubins)
        kept |= {f"{unit.key}.cubin" for unit in units}
        packed = len(zlib.compress(code, 9)) / 1e6
        print(f"{target:8} {len(units):4} units {len(code) / 1e6:6.1f} MB, packed {packed:5.1f} MB")
    for path in build.PREBUILT.glob("*.cubin"):
        if path.name not in kept:
            path.unlink()
    build.write_manifest(build.PREBUILT)


def show(target: str, done: int, total: int) -> None:
    """A line for every tenth of the kernels compiled."""
    if done == total or done % max(1, total // 10) == 0:
        print(f"  {target}: {done} of {total} compiled", flush=True)


def build_wheel(out: Path) -> Path:
    """The wheel of the source tree as it is; the same tree gives the same bytes."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out)]
    subprocess.run([*command, str(ROOT)], check=True)
    return max(out.glob(f"rvllm-{__version__}-*.whl"), key=lambda path: path.stat().st_mtime)


def needed() -> dict[str, str]:
    """Name and installed version of all that `pip install rvllm` brings, whatever brings it.

    Raises PackageNotFoundError when the package is not installed with what it needs.
    """
    found: dict[str, str] = {}
    todo, seen = [("rvllm", "")], set()
    while todo:
        name, extra = wanted = todo.pop()
        if wanted in seen:
            continue
        seen.add(wanted)
        for need in map(Requirement, metadata.requires(name) or []):
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                found[need.name.lower().replace("_", "-")] = metadata.version(need.name)
                todo += [(need.name, more) for more in ("", *need.extras)]
    return found


def write_sbom(wheel: Path, path: Path) -> None:
    """What the wheel needs at run time, with the versions installed here, as CycloneDX."""
    components = [
        {"type": "library", "name": name, "version": version, "purl": f"pkg:pypi/{name}@{version}"}
        for name, version in sorted(needed().items())
    ]
    digest = {"alg": "SHA-256", "content": hashlib.sha256(wheel.read_bytes()).hexdigest()}
    main = {"type": "application", "name": "rvllm", "version": __version__, "hashes": [digest]}
    bill = {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1,
            "metadata": {"component": main}, "components": components}  # fmt: skip
    path.write_text(json.dumps(bill, indent=1) + "\n")


def main() -> int:
    """Builds, reports, and fails when the wheel is too large for the index."""
    parser = argparse.ArgumentParser(description="Builds a release.")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--arch", default=",".join(TARGETS))
    args = parser.parse_args()
    targets = [name.strip() for name in args.arch.split(",") if name.strip()]
    unknown = set(targets) - set(TARGETS)
    if unknown:
        parser.error(f"--arch: {min(unknown)} is not one of {', '.join(TARGETS)}")
    build_kernels(targets)
    wheel = build_wheel(args.out)
    write_sbom(wheel, args.out / "sbom.json")
    size = wheel.stat().st_size
    print(f"{wheel.name}: {size / 1e6:.1f} MB, SHA-256 {hashlib.sha256(wheel.read_bytes()).hexdigest()}")
    if size > LARGEST_WHEEL:
        print(f"larger than {LARGEST_WHEEL / 1e6:.0f} MB: leave architectures out by --arch", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
