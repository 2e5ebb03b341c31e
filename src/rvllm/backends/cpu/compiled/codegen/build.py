"""Compiles the kernels ahead of time: a shared library for each kind of processor, when the package is built.

Needs llvmlite (compiler) and ziglang (linker): requirements of the build, not of the installed package.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, get_args

import llvmlite
from llvmlite import binding as llvm
from llvmlite import ir

from rvllm.backends.cpu.compiled.codegen import experts, matmul, mla, rowwise
from rvllm.backends.cpu.compiled.codegen.attention import attention
from rvllm.backends.cpu.compiled.codegen.emit import Write
from rvllm.backends.cpu.compiled.codegen.schedule import schedule
from rvllm.backends.cpu.compiled.formats import FORMATS
from rvllm.backends.cpu.compiled.library import MANIFEST, PREBUILT, Processor
from rvllm.program.ops.dense import Activation


def build_all(folder: Path = PREBUILT) -> list[Path]:
    """The libraries of all processors in `folder`, with a manifest of their hashes; built only when stale.

    Raises RuntimeError when a library cannot be linked.
    """
    digest = _sources_digest()
    wanted = [folder / f"{processor.value}.so" for processor in Processor]
    manifest = folder / MANIFEST
    if manifest.exists() and all(path.exists() for path in wanted):
        said = json.loads(manifest.read_text())
        if said["sources"] == digest and said["libraries"] == {p.name: _digest(p) for p in wanted}:
            return [*wanted, manifest]
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        for code, path in zip(pool.map(object_code, Processor), wanted, strict=True):
            link(code, path)
    libraries = {path.name: _digest(path) for path in wanted}
    manifest.write_text(json.dumps({"sources": digest, "libraries": libraries}, indent=1) + "\n")
    return [*wanted, manifest]


def kernels(processor: Processor) -> dict[str, Write]:
    """What writes each kernel for a processor, by the name that `lower` calls it by, in a fixed order."""
    found: dict[str, Write] = {"schedule": schedule(), "add": rowwise.add(), "gather": rowwise.gather()}
    for form in {form.name: form for form in FORMATS.values()}.values():
        found[f"product_{form.name}"] = matmul.product(form, processor.rows_across)
        found[f"embed_{form.name}"] = rowwise.embed(form)
    for activation in get_args(Activation):
        found[activation] = rowwise.activate(activation, False)
        found[f"gated_{activation}"] = rowwise.activate(activation, True)
    for suffix, capped in (("", False), ("_capped", True)):
        found[f"attention{suffix}"] = attention(capped)
        found[f"finish{suffix}"] = rowwise.finish(capped)
    for kind in ("rms", "layer"):
        found[f"norm_{kind}"] = rowwise.norm(kind == "layer")
    for scores in ("softmax", "sigmoid"):
        found[f"route_{scores}"] = experts.route(scores)
    found["assign"], found["combine"] = experts.assign(), experts.combine()
    for suffix, interleaved in (("", False), ("_interleaved", True)):
        found[f"rope{suffix}"] = rowwise.rope(interleaved)
        found[f"latent_rope{suffix}"] = mla.latent_rope(interleaved)
    found["latent_attention"], found["by_head"] = mla.latent_attention(), mla.by_head()
    found["tails"] = mla.tails()
    return dict(sorted(found.items()))


def object_code(processor: Processor) -> bytes:
    """Its kernels as an object file, position-independent."""
    machine = machine_of(processor)
    return bytes(machine.emit_object(optimised(kernels(processor), machine)))


def link(code: bytes, target: Path) -> None:
    """Makes a shared library of an object file. Raises RuntimeError with the linker's words."""
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "kernels.o"
        source.write_bytes(code)
        command = [sys.executable, "-m", "ziglang", "ld.lld", "-shared", "--strip-debug", "--build-id=none",
                   "-z", "noexecstack", "-soname", target.name, str(source), "-o", str(target)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{target.name} cannot be linked: {done.stderr.strip()[-2000:]}")


def machine_of(processor: Processor) -> Any:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple(processor.triple)
    return target.create_target_machine(
        cpu=processor.cpu, features=processor.features, opt=3, reloc="pic", codemodel="small"
    )


def optimised(written: Mapping[str, Write], machine: Any) -> Any:
    module = ir.Module("rvllm")
    module.triple = machine.triple
    for name, write in written.items():
        write(module, name)
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = False  # vectors are written out already
    options.slp_vectorization = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(parsed, builder)
    return parsed


def _sources_digest() -> str:
    digest = hashlib.sha256(llvmlite.__version__.encode())
    folder = Path(__file__).parent
    for source in sorted([*folder.glob("*.py"), *folder.parent.glob("*.py")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
