"""Kernels as shared libraries for the CPU, built by g++ and cached under a hash of their text and flags."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rvllm.kernels import build
from rvllm.kernels.spec import KernelSpec

from .translate import SHIM, translate

FLAGS = ("-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing",
         "-fno-trapping-math", "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error", "-fwrapv", "-w",
         "-fno-stack-protector", "-fvisibility=hidden", "-fno-exceptions", "-fPIC", "-shared")  # fmt: skip
_TAIL = """
}}  // namespace
extern "C" {{
extern __attribute__((visibility("default"))) const emu::Listed emu_kernels[];
const emu::Listed emu_kernels[] = {{
{kernels}
}};
__attribute__((visibility("default"))) int emu_run(int which, emu::Launch* launch) {{
  return emu::run(emu_kernels[which].entry, *launch);
}}
}}
"""


class Launch(ctypes.Structure):
    """A launch; the same fields in state.hpp."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("smem", ctypes.c_uint),
        ("seconds", ctypes.c_uint),
        ("order", ctypes.c_ulonglong),
        ("arguments", ctypes.c_void_p),
        ("stacks", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("hidden_count", ctypes.c_ulonglong),
        ("saved", ctypes.c_void_p),
        ("fault", ctypes.c_ulonglong),
        ("waited", ctypes.c_uint),
        ("launched", ctypes.c_uint),
        ("early", ctypes.c_uint),
        ("message", ctypes.c_char * 2000),
    )


class EmulatorError(AssertionError):
    """A kernel does not compile for the emulator, or did something that a GPU would not forgive."""


def compiler() -> str | None:
    """The path of g++, or None where there is none."""
    return shutil.which("g++")


class Library:
    """A built translation unit: its kernels by symbol."""

    def __init__(self, path: Path, symbols: tuple[str, ...]) -> None:
        self.library = ctypes.CDLL(str(path))
        self.run = self.library.emu_run
        listed = ((ctypes.c_void_p * 2) * len(symbols)).in_dll(self.library, "emu_kernels")
        self.index = {symbol: i for i, symbol in enumerate(symbols)}
        self.sizes: dict[str, list[int]] = {}
        for i, symbol in enumerate(symbols):
            count = ctypes.c_uint.from_address(listed[i][1]).value
            sizes = (ctypes.c_uint * (count + 1)).from_address(listed[i][1])
            self.sizes[symbol] = list(sizes)[1:]


@dataclass(frozen=True)
class Kernel:
    """A kernel of the catalog in its library."""

    spec: KernelSpec
    library: Library

    @property
    def sizes(self) -> list[int]:
        """Bytes of each argument."""
        return self.library.sizes[self.spec.symbol]

    def run(self, launch: Launch) -> bool:
        """Runs it; False when `launch` says what went wrong."""
        return not self.library.run(self.library.index[self.spec.symbol], ctypes.byref(launch))


def load(units: list[build.Unit], sources: Path = build.SOURCES) -> list[Library]:
    """The libraries of translation units, compiled where they are not cached.

    sources: where the kernels are, for tests that change a copy of them.
    Raises EmulatorError with the compiler's words.
    """
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        paths = list(pool.map(lambda unit: _built(unit, sources), units))
    return [Library(path, unit.symbols) for path, unit in zip(paths, units, strict=True)]


def kernels_of(
    names: Iterable[str], catalog: Mapping[str, KernelSpec], sources: Path = build.SOURCES
) -> dict[str, Kernel]:
    """Kernels by name, and all that compile with them."""
    units: dict[build.Unit, list[KernelSpec]] = {}
    for name in names:
        one = catalog[name]
        key = (one.source, one.unit)
        together = [s for s in catalog.values() if (s.source, s.unit) == key]
        units[build.units(together, "emulated")[0]] = together
    found = {}
    for library, specs in zip(load(list(units), sources), units.values(), strict=True):
        found.update({spec.name: Kernel(spec, library) for spec in specs})
    return found


def cache_dir() -> Path:
    """Where libraries are kept: RVLLM_TEST_EMULATED, or a folder of this user among the temporary files."""
    given = os.environ.get("RVLLM_TEST_EMULATED")
    return Path(given) if given else Path(tempfile.gettempdir()) / f"rvllm-emulated-{os.getuid()}"


@cache
def _compiler_version() -> str:
    done = subprocess.run([compiler() or "g++", "--version"], capture_output=True, text=True, check=True)
    try:
        flags = re.search(r"^flags.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        flags = None
    return done.stdout + (flags[0] if flags else "")


def _files(source: str, sources: Path) -> dict[str, str]:
    """A kernel's source and every header of ours that it includes, translated."""
    found: dict[str, str] = {}
    todo = [source]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        text = (sources / name).read_text()
        found[name] = translate(text)
        todo += [
            n
            for n in re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE)
            if (sources / n).exists()
        ]
    return found


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; given back by the system when its holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _built(unit: build.Unit, sources: Path) -> Path:
    files = _files(unit.source, sources)
    kernels = ",\n".join(
        f"  {{&emu::Kernel<(&{s})>::entry, emu::Kernel<(&{s})>::sizes}}" for s in unit.symbols
    )
    main = f'#include "ptx.hpp"\nnamespace {{\n#include "{unit.source}"\n' + _TAIL.format(kernels=kernels)
    digest = hashlib.sha256(_compiler_version().encode())
    shim = [path.read_text() for path in sorted(SHIM.iterdir())]
    for part in (*FLAGS, main, *(t for item in sorted(files.items()) for t in item), *shim):
        digest.update(part.encode() + b"\0")
    folder = cache_dir()
    target = folder / f"{Path(unit.source).stem}-{digest.hexdigest()[:24]}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(target.with_suffix(".lock")), tempfile.TemporaryDirectory(dir=folder) as place:
        if target.exists():  # another process was at it
            return target
        for name, text in {**files, "main.cpp": main}.items():
            (Path(place) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(place) / name).write_text(text)
        command = [compiler() or "g++", *FLAGS, f"-I{place}", f"-I{SHIM}",
                   f"{place}/main.cpp", "-o", f"{place}/out.so", "-lm"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.replace(f"{place}/", "")
            raise EmulatorError(f"{unit.source} does not compile for the emulator:\n{said[:6000]}")
        os.replace(f"{place}/out.so", target)
    return target
