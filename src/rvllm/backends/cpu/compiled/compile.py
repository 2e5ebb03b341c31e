"""Turns kernels into machine code for this processor, once: the object code is kept in the cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import llvmlite
from llvmlite import binding as llvm

Write = Callable[[Any, str], None]  # (module, name): writes one kernel


class Library:
    """Compiled kernels; `address[name]` is the machine address of each, valid while this object lives."""

    def __init__(self, engine: Any, names: list[str]) -> None:
        self._engine = engine
        self.address: dict[str, int] = {name: engine.get_function_address(name) for name in names}

    def function(self, name: str) -> Any:
        """The kernel as a callable (args address, thread, threads); the GIL is released while it runs."""
        kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
        function = kind(self.address[name])
        function.library = self  # type: ignore[attr-defined]  # the code lives as long as who may call it
        return function


def build(kernels: Mapping[str, Write], folder: Path | None) -> Library:
    """Compiles the kernels, or takes them from `folder`, where an earlier start has left them.

    The cached file is named by everything it depends on: the sources of this package, the kernels' names,
    the processor and the version of llvmlite. A folder that cannot be written to costs compiling again.
    """
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name = llvm.get_host_cpu_name()
    features = _features()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=name, features=features, opt=3, jit=True
    )
    path = None if folder is None else folder / f"{_key(kernels, name, features)}.o"
    code = _read(path)
    if code is None:
        code = _compile(kernels, machine)
        _write(path, code)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return Library(engine, list(kernels))


def source_of(kernels: Mapping[str, Write]) -> str:
    """The kernels as LLVM IR."""
    from llvmlite import ir

    module = ir.Module("rvllm")
    module.triple = llvm.get_default_triple()
    for name, write in kernels.items():
        write(module, name)
    return str(module)


def assembly_of(kernels: Mapping[str, Write]) -> str:
    """The kernels as assembly for this processor, to be read."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=_features(), opt=3)
    return str(machine.emit_assembly(_optimised(kernels, machine)))


def _compile(kernels: Mapping[str, Write], machine: Any) -> bytes:
    return bytes(machine.emit_object(_optimised(kernels, machine)))


def _optimised(kernels: Mapping[str, Write], machine: Any) -> Any:
    module = llvm.parse_assembly(source_of(kernels))
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = False  # vectors are written out already
    options.slp_vectorization = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return module


def _features() -> str:
    """This processor's features; where it has registers of 512 bits, they are to be used."""
    features = llvm.get_host_cpu_features()
    return str(features.flatten()) + (",-prefer-256-bit" if features.get("avx512f") else "")


def _key(kernels: Mapping[str, Write], cpu: str, features: str) -> str:
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    for text in (llvmlite.__version__, cpu, features, *kernels):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:32]


def _read(path: Path | None) -> bytes | None:
    """The cached object code, if it is whole."""
    if path is None:
        return None
    try:
        content = path.read_bytes()
    except OSError:
        return None
    code, check = content[:-32], content[-32:]
    return code if hashlib.sha256(code).digest() == check else None


def _write(path: Path | None, code: bytes) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code + hashlib.sha256(code).digest())
        os.replace(file.name, path)
    except OSError:
        return
