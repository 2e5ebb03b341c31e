"""Every compiled kernel there is, under the name that `lower` calls it by."""

from __future__ import annotations

from typing import get_args

from rvllm.backends.cpu.compiled.codegen import matmul, rowwise
from rvllm.backends.cpu.compiled.codegen.attention import attention
from rvllm.backends.cpu.compiled.codegen.emit import Write
from rvllm.backends.cpu.compiled.codegen.schedule import schedule
from rvllm.backends.cpu.compiled.formats import FORMATS
from rvllm.backends.cpu.compiled.library import Processor
from rvllm.program.ops.dense import Activation


def kernels(processor: Processor) -> dict[str, Write]:
    """What writes each kernel for a processor, by name, in a fixed order."""
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
    found["rope"], found["rope_interleaved"] = rowwise.rope(False), rowwise.rope(True)
    return dict(sorted(found.items()))
