"""Compiles kernels with NVRTC into cubins, cached under a hash of everything that goes into them.

Needs no GPU. A cubin's key is the SHA-256 of its source with all headers of ours it includes, its
instantiations, the target and the compiler's options, so one of other sources cannot be
loaded; the compiler's version is not in it, as cubins are found where there is no compiler. A file that is
not what was written (cut short by a full disk, say) counts as absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rvllm.errors import MissingKernelError, RvllmError, UsageError
from rvllm.extras import install_command
from rvllm.kernels.external import HEADERS, include_of
from rvllm.kernels.spec import KernelSpec

SOURCES = Path(__file__).parent
PREBUILT = SOURCES / "prebuilt"  # cubins that a release wheel ships
MANIFEST_FILE = "manifest.json"  # of a release: the SHA-256 of each of its files
OPTIONS = ("--std=c++17", "-default-device", "-DNDEBUG")
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


class CompileError(RvllmError):
    """NVRTC refused a kernel; the message carries its log."""


@dataclass(frozen=True)
class Unit:
    """One translation unit for one target: `sm_90a`, `sm_80`, ...; extra: see `KernelSpec`."""

    source: str
    symbols: tuple[str, ...]
    target: str
    extra: str = ""

    @property
    def key(self) -> str:
        """Content hash: file name of the cached cubin."""
        digest = hashlib.sha256()
        others = (HEADERS[self.extra],) if self.extra else ()
        for part in (*OPTIONS, self.target, *self.symbols, *others, source_hash(self.source)):
            digest.update(part.encode() + b"\0")
        return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Cubin:
    """Machine code of a unit and the mangled name of each of its symbols."""

    unit: Unit
    code: bytes
    names: dict[str, str]
    seconds: float  # compile time, 0 when it came from a cache
    log: str = ""


@cache
def source_hash(source: str) -> str:
    """SHA-256 over a source file and, in order, every header of ours that it includes."""
    digest, seen, todo = hashlib.sha256(), set(), [source]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        text = (SOURCES / name).read_text()
        digest.update(name.encode() + b"\0" + text.encode() + b"\0")
        todo.extend(reversed([n for n in _INCLUDE.findall(text) if (SOURCES / n).exists()]))
    return digest.hexdigest()


def target_of(capability: int) -> str:
    """`sm_80`, `sm_89`, `sm_90a`, `sm_100a`: the target with all of a chip's own instructions."""
    return f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"


def units(specs: Iterable[KernelSpec], target: str) -> list[Unit]:
    """The translation units that hold the given specs, each once, in a stable order."""
    groups: dict[tuple[str, str, str], set[str]] = {}
    for spec in specs:
        groups.setdefault((spec.source, spec.unit, spec.extra), set()).add(spec.symbol)
    return list(
        dict.fromkeys(  # two kernels may be one function with other limits of shared memory
            Unit(source, tuple(sorted(symbols)), target, extra)
            for (source, _, extra), symbols in sorted(groups.items())
        )
    )


def load(
    wanted: Sequence[Unit],
    cache_dir: Path,
    compile_missing: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[Cubin]:
    """The cubins of `wanted`, from the wheel, from the cache, or compiled now on all cores.

    Raises MissingKernelError when something would have to be compiled and may not or cannot be, UsageError
    when the cache cannot be written.
    """
    found = {unit: there[1] for unit in wanted if (there := find(unit, cache_dir)) is not None}
    missing = [unit for unit in wanted if unit not in found]
    if missing and not compile_missing:
        names = ", ".join(sorted({u.source for u in missing}))
        raise MissingKernelError(
            f"kernels not built for {missing[0].target}: {names}; run `rvllm kernels build`"
        )
    if missing:
        _nvrtc()  # says what is missing before threads start
        for extra in {unit.extra for unit in missing if unit.extra}:
            include_of(extra)
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            for done, cubin in enumerate(pool.map(compile_unit, missing), start=1):
                _write(cubin, cache_dir)
                found[cubin.unit] = cubin
                if progress:
                    progress(done, len(missing))
    return [found[unit] for unit in wanted]


def compile_unit(unit: Unit) -> Cubin:
    """Compiles one unit; raises CompileError with NVRTC's log."""
    nvrtc = _nvrtc()
    started = time.perf_counter()
    text = (SOURCES / unit.source).read_text()
    options = [
        *OPTIONS,
        f"-arch={unit.target}",
        f"-I{SOURCES}",
        *((f"-I{include_of(unit.extra)}", "-w") if unit.extra else ()),  # their warnings are not ours to mend
        *(f"-I{path}" for path in _cuda_includes()),
        "--ptxas-options=-v",
    ]
    status, program = nvrtc.nvrtcCreateProgram(text.encode(), unit.source.encode(), 0, [], [])
    _check(status, "nvrtcCreateProgram")
    try:
        for symbol in unit.symbols:
            (status,) = nvrtc.nvrtcAddNameExpression(program, symbol.encode())
            _check(status, "nvrtcAddNameExpression")
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = bytearray(size)
        nvrtc.nvrtcGetProgramLog(program, log)
        report = bytes(log).rstrip(b"\0").decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"{unit.source} does not compile for {unit.target}:\n{report}")
        status, size = nvrtc.nvrtcGetCUBINSize(program)
        _check(status, "nvrtcGetCUBINSize")
        code = bytearray(size)
        nvrtc.nvrtcGetCUBIN(program, code)
        names = {}
        for symbol in unit.symbols:
            status, lowered = nvrtc.nvrtcGetLoweredName(program, symbol.encode())
            _check(status, f"nvrtcGetLoweredName({symbol})")
            names[symbol] = lowered.decode()
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Cubin(unit, bytes(code), names, time.perf_counter() - started, report)


def find(unit: Unit, cache_dir: Path) -> tuple[Path, Cubin] | None:
    """The unit's cubin in the wheel or the cache, if it has been built from the present sources."""
    for path in (folder / f"{unit.key}.cubin" for folder in (PREBUILT, cache_dir)):
        try:
            header, _, code = path.read_bytes().partition(b"\n")
            said = json.loads(header)
            names, digest = said["names"], said.get("sha256")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if digest in (None, hashlib.sha256(code).hexdigest()) and set(names) == set(unit.symbols):
            return path, Cubin(unit, code, names, 0.0)
    return None


def write_manifest(folder: Path) -> None:
    """Lists what a release ships: the SHA-256 of every cubin in `folder`."""
    hashes = {path.name: _sha256(path) for path in sorted(folder.glob("*.cubin"))}
    (folder / MANIFEST_FILE).write_text(json.dumps(hashes, indent=0) + "\n")


def damaged(folder: Path) -> list[str]:
    """Files of a release's folder that are absent, or not what its manifest says."""
    said: dict[str, str] = json.loads((folder / MANIFEST_FILE).read_text())
    return [n for n, digest in said.items() if not (folder / n).exists() or _sha256(folder / n) != digest]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write(cubin: Cubin, cache_dir: Path) -> None:
    said = {"source": cubin.unit.source, "target": cubin.unit.target, "names": cubin.names}
    header = json.dumps(said | {"sha256": hashlib.sha256(cubin.code).hexdigest()})
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache_dir, delete=False) as file:
            file.write(header.encode() + b"\n" + cubin.code)
        os.replace(file.name, cache_dir / f"{cubin.unit.key}.cubin")
    except OSError as error:
        raise UsageError(
            f"compiled kernels cannot be kept in {cache_dir}: {error.strerror}; set RVLLM_CACHE_DIR"
        ) from None


@cache
def _nvrtc():  # type: ignore[no-untyped-def]  # the module has no types
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise MissingKernelError(
            f"kernels have to be compiled and NVRTC is not there ({error}): "
            f"{install_command('cuda', 'compiler')}"
        ) from None
    return nvrtc


def _check(status: object, what: str) -> None:
    if getattr(status, "value", 0) != 0:
        raise CompileError(f"{what}: {status}")


@cache
def _cuda_includes() -> tuple[str, ...]:
    """Where cuda_bf16.h is: the pip packages' folder, CUDA_HOME, or the usual place."""
    candidates: list[Path] = []
    try:
        import nvidia

        for root in nvidia.__path__:
            candidates += [Path(root) / "cu13" / "include", Path(root) / "cuda_runtime" / "include"]
    except ImportError:
        pass
    candidates += [
        Path(os.environ.get(name, "")) / "include"
        for name in ("CUDA_HOME", "CUDA_PATH")
        if name in os.environ
    ]
    candidates.append(Path("/usr/local/cuda/include"))
    for path in candidates:
        if (path / "cuda_bf16.h").exists():
            cccl = path / "cccl"
            return (str(path), str(cccl)) if cccl.exists() else (str(path),)
    raise MissingKernelError(f"CUDA headers (cuda_bf16.h) are not there: {install_command('compiler')}")
