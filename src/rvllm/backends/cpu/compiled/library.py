"""The compiled kernels as they come with the package: a shared library for each kind of processor.

Nothing is compiled here; see `codegen` for how they are made.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import platform
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

PREBUILT = Path(__file__).parent / "prebuilt"
MANIFEST = "manifest.json"
# Of x86-64-v3 and v4 (the psABI's microarchitecture levels), as /proc/cpuinfo spells them.
_V3 = frozenset(("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"))
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


class Processor(Enum):
    """A kind of processor there is a library for; the best one first."""

    X86_64_V4 = "x86-64-v4"
    X86_64_V3 = "x86-64-v3"
    AARCH64 = "aarch64"

    @property
    def triple(self) -> str:
        """LLVM's name of the platform."""
        return f"{'aarch64' if self is Processor.AARCH64 else 'x86_64'}-unknown-linux-gnu"

    @property
    def cpu(self) -> str:
        """LLVM's name of the processor."""
        return "generic" if self is Processor.AARCH64 else self.value

    @property
    def features(self) -> str:
        """What to use beyond that: where there are registers of 512 bits, they are to be used."""
        return "-prefer-256-bit" if self is Processor.X86_64_V4 else ""

    @property
    def rows_across(self) -> int:
        """Rows whose sums of 16 float32 each its vector registers hold beside a level and a factor.

        32 registers of 64 bytes, 16 of 32, 32 of 16: of 8 rows the latter two would spill.
        """
        return 8 if self is Processor.X86_64_V4 else 4


@cache
def processor() -> Processor | None:
    """The best kind that this machine is, None for others."""
    machine = platform.machine()
    if machine == "aarch64":
        return Processor.AARCH64
    if machine != "x86_64":
        return None
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    return Processor.X86_64_V4 if flags >= _V4 else Processor.X86_64_V3 if flags >= _V3 else None


def missing(folder: Path = PREBUILT) -> str | None:
    """Why there are no compiled kernels for this machine; None when there are."""
    kind = processor()
    if kind is None:
        known = ", ".join(kind.value for kind in Processor)
        return f"there are none for this processor ({platform.machine()}), only for {known}"
    if not (folder / f"{kind.value}.so").exists():
        return "this copy was not built: run scripts/build_cpu_kernels.py, or install it by pip"
    return None


def in_use(setting: str, fp8_cache: bool = False) -> str:
    """Which kernels `--cpu-kernels` comes to on this machine, and why: `compiled for x86-64-v4`."""
    absent, kind = missing(), processor()
    if setting == "numpy":
        return "NumPy, as --cpu-kernels asks"
    if fp8_cache:
        return "NumPy, since compiled ones read keys and values in float32"
    return (
        f"NumPy, since of compiled ones {absent}" if absent or kind is None else f"compiled for {kind.value}"
    )


class Library:
    """Loaded kernels; `address(name)` is where a kernel's code is, valid while this object lives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._code = ctypes.CDLL(str(path))

    def address(self, name: str) -> int:
        """A kernel's address. Raises AttributeError for one that the library does not have."""
        return ctypes.cast(getattr(self._code, name), ctypes.c_void_p).value or 0

    def function(self, name: str) -> Any:
        """The kernel as a callable (args address, thread, threads); the GIL is released while it runs."""
        kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
        function = kind(self.address(name))
        function.library = self  # type: ignore[attr-defined]  # the code lives as long as who may call it
        return function


@cache
def load(folder: Path = PREBUILT) -> Library:
    """This machine's library, once a process. Raises OSError when it is absent, damaged or refused."""
    kind = processor()
    if kind is None:
        raise OSError(missing(folder))
    path = folder / f"{kind.value}.so"
    said = json.loads((folder / MANIFEST).read_text())["libraries"]
    if hashlib.sha256(path.read_bytes()).hexdigest() != said.get(path.name):
        raise OSError(f"{path} is not what was built")
    return Library(path)
