"""`rvllm kernels`: list the catalog, compile it ahead of time, check what is built; tune for this GPU."""

from __future__ import annotations

import argparse
import fnmatch
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rvllm.config import kernel_cache_dir
from rvllm.errors import MissingKernelError, UsageError

if TYPE_CHECKING:
    from rvllm.kernels.build import Cubin, Unit
    from rvllm.kernels.spec import KernelSpec

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "kernels",
        help="list, compile, check and tune the CUDA kernels",
        description="Lists the kernels of the catalog, compiles them ahead of time (NVRTC, no GPU) and "
        "checks what is built; times those of --gemm-strategy auto for a model on this GPU (tune) and shows "
        "what was timed (show-tuning).",
    )
    parser.add_argument("action", choices=("list", "build", "check", "tune", "show-tuning"))
    parser.add_argument("--model", metavar="MODEL", help="tune: the model whose products are timed")
    parser.add_argument("--dtype", metavar="TYPE", help="tune: bfloat16 or float16 [the checkpoint's]")
    parser.add_argument(
        "--arch",
        default=None,
        metavar="LIST",
        help=f"targets, of {', '.join(TARGETS)} [this machine's GPU, else sm_90a]",
    )
    parser.add_argument("--match", default="*", metavar="PATTERN", help="only kernels named like this [*]")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="where to put cubins [the cache]; --output wheel puts them in the package",
    )
    parser.add_argument("--all", action="store_true", help="list: also sources, shared memory and hashes")


def main(args: argparse.Namespace) -> int:
    """Runs `rvllm kernels`; raises RvllmError."""
    from rvllm.cli import tuning
    from rvllm.kernels import build

    if args.action == "tune":
        return tuning.tune(args)
    if args.action == "show-tuning":
        return tuning.show(args)
    targets = _targets(args.arch)
    specs = _matching(args.match)
    folder = kernel_cache_dir() if args.output is None else Path(args.output)
    if args.action == "check" and args.output is None and (build.PREBUILT / build.MANIFEST_FILE).exists():
        folder = build.PREBUILT  # of a release: what it came with is what is to be checked
    if args.output == "wheel":
        folder = build.PREBUILT
    if args.action == "list":
        return _list(specs, targets[0], folder, everything=args.all)
    released = args.action == "check" and (folder / build.MANIFEST_FILE).exists()
    work = {
        target: _possible(build.units(_for_target(specs, target), target), folder, released)
        for target in targets
    }
    return _build(work, folder) if args.action == "build" else _check(work, folder)


def _targets(text: str | None) -> list[str]:
    if text is None:
        return [_own_target()]
    targets = [name.strip() for name in text.split(",")]
    for target in targets:
        if target not in TARGETS:
            raise UsageError(f"--arch: {target!r} is not one of {', '.join(TARGETS)}")
    return targets


def _own_target() -> str:
    from rvllm.backends.cuda.device.driver import Device, device_count
    from rvllm.kernels.build import target_of

    return target_of(Device().facts().capability) if device_count() else "sm_90a"


def _matching(pattern: str) -> list[KernelSpec]:
    from rvllm.kernels.manifest import MANIFEST

    specs = [spec for name, spec in sorted(MANIFEST.items()) if fnmatch.fnmatch(name, pattern)]
    if not specs:
        raise UsageError(f"--match: no kernel is named like {pattern!r}; see `rvllm kernels list`")
    return specs


def _for_target(specs: list[KernelSpec], target: str) -> list[KernelSpec]:
    capability = int(re.sub(r"\D", "", target))
    return [spec for spec in specs if spec.runs_on(capability)]


def _possible(units: list[Unit], folder: Path, released: bool) -> list[Unit]:
    """The units that are built or can be; of those that want the headers of an extra, which a release comes
    without, a line where the headers are absent or a release is looked at."""
    from rvllm.kernels import build
    from rvllm.kernels.external import missing_headers

    absent = [
        u for u in units if u.extra and (released or missing_headers(u.extra)) and not build.find(u, folder)
    ]
    if absent:
        why = missing_headers(absent[0].extra) or f"a release is made without those of {absent[0].extra}"
        print(f"{absent[0].target}: {len(absent)} units are left out: {why}")
    return [unit for unit in units if unit not in absent]


def _list(specs: list[KernelSpec], target: str, folder: Path, *, everything: bool) -> int:
    """Every kernel and whether it is built for one target.

    everything: also its source and instantiation (dtype and tile sizes), shared memory and content hash.
    """
    from rvllm.cli.common.tables import table
    from rvllm.kernels import build

    units = {
        (unit.source, symbol): unit
        for unit in build.units(_for_target(specs, target), target)
        for symbol in unit.symbols
    }
    rows = []
    for spec in specs:
        unit = units.get((spec.source, spec.symbol))
        lowest = f"sm_{spec.arch}" + (" only" if spec.exact else "+")
        state = "-" if unit is None else "built" if build.find(unit, folder) else "not built"
        key = "" if unit is None else unit.key[:12]
        row = (spec.name, lowest, state, spec.source, spec.symbol, f"{spec.smem or ''}", key)
        rows.append(row if everything else row[:3])
    heading = ("kernel", "runs on", f"for {target}", "source", "instantiation", "smem", "hash")
    print(table(heading if everything else heading[:3], rows, right=(5,)))
    print(f"{len(rows)} kernels; cubins in {folder}")
    return 0


def _build(work: dict[str, list[Unit]], folder: Path) -> int:
    """Compiles what is missing; prints what the compiler says of each."""
    from rvllm.kernels import build

    for target, units in work.items():
        began = time.perf_counter()
        cubins = build.load(units, folder, progress=partial(_progress, target))
        seconds = time.perf_counter() - began
        fresh = [cubin for cubin in cubins if cubin.seconds]
        for cubin in fresh:
            print(f"{target}  {cubin.seconds:5.1f} s  {cubin.unit.source:22} {_report(cubin)}")
        size = sum(len(cubin.code) for cubin in cubins)
        print(f"{target}: {len(units)} units, {len(fresh)} compiled, {size / 1e6:.1f} MB, {seconds:.1f} s")
    return 0


def _progress(target: str, done: int, total: int) -> None:
    """How far compiling has come: one line on a terminal that is written over, nothing in a log."""
    if sys.stderr.isatty():
        print(f"\r{target}: {done} of {total} compiled", end="\n" if done == total else "", file=sys.stderr)


def _report(cubin: Cubin) -> str:
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", cubin.log)]
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", cubin.log))
    return f"{len(cubin.names)} kernels, up to {max(registers, default=0)} registers, {spills} bytes spilled"


def _check(work: dict[str, list[Unit]], folder: Path) -> int:
    """Fails with the list of units that are not built from the present sources."""
    from rvllm.kernels import build

    missing = [
        f"{unit.source} ({target}, {len(unit.symbols)} kernels)"
        for target, units in work.items()
        for unit in units
        if not build.find(unit, folder)
    ]
    total = sum(len(units) for units in work.values())
    wrong = build.damaged(folder) if (folder / build.MANIFEST_FILE).exists() else []
    if wrong:
        shown = ", ".join(wrong[:5])
        raise MissingKernelError(f"{len(wrong)} files of {folder} are not what the release had: {shown}")
    if missing:
        shown = "; ".join(missing[:5]) + (f"; and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise MissingKernelError(
            f"{len(missing)} of {total} units are not built: {shown}; run `rvllm kernels build`"
        )
    print(f"all {total} units are built from the present sources ({', '.join(work)}) in {folder}")
    return 0
