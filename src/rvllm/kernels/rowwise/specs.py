"""Ops on single rows: embedding, norms, activations, residuals, rope with the cache write: their kernels."""

from __future__ import annotations

from rvllm.errors import MissingKernelError
from rvllm.kernels.gemm.integer.specs import GGUF_LAYOUTS
from rvllm.kernels.spec import KernelSpec
from rvllm.kernels.types import SHORT, TYPES

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
NORM_VECTORS = {"": 1, "_wide": 2}  # 16-byte vectors a thread of `norm` holds


def norm_kernel(dtype: str, kind: str, width: int, add: bool) -> tuple[str, int]:
    """(kernel, threads) that normalises rows of `width`; kind is rms or layer.

    Raises MissingKernelError for a width that is not a multiple of 8 or too large.
    """
    for suffix, vectors in NORM_VECTORS.items():
        threads = -(-width // (8 * vectors * 32)) * 32
        if width % 8 == 0 and threads <= 1024:
            return f"sm80_{SHORT[dtype]}_norm_{kind}{'_add' if add else ''}{suffix}", threads
    raise MissingKernelError(f"no norm kernel for rows of {width} elements")


def quantised_norm_kernel(dtype: str, kind: str, width: int, add: bool) -> tuple[str, int]:
    """The same for a norm that writes E4M3."""
    kernel, threads = norm_kernel(dtype, kind, width, add)
    return kernel.replace("_norm_", "_fp8_norm_"), threads


def norm_add_norm_kernel(dtype: str, width: int) -> tuple[str, int]:
    """(kernel, threads) of the RMS norm, residual add and RMS norm in one; raises as `norm_kernel` does."""
    kernel, threads = norm_kernel(dtype, "rms", width, False)
    return kernel.replace("norm_rms", "norm_add_norm"), threads


def _elementwise(dtype: str) -> list[KernelSpec]:
    t, short = TYPES[dtype], SHORT[dtype]

    def spec(name: str, source: str, symbol: str) -> KernelSpec:
        return KernelSpec(name=f"sm80_{short}_{name}", source=source, symbol=symbol)

    specs = [
        spec("embed", "rowwise/embed.cu", f"embed<{t}>"),
        spec("gather_rows", "rowwise/gather.cu", f"gather_rows<{t}>"),
        spec("add", "rowwise/gather.cu", f"add<{t}>"),
        spec("rope_kv", "rowwise/rope.cu", f"rope_kv<{t}, false>"),
        spec("rope_kv_rows", "rowwise/rope.cu", f"rope_kv_rows<{t}>"),
        spec("rope_kv_fp8_rows", "rowwise/rope.cu", f"rope_kv_fp8_rows<{t}>"),
        spec("rope_kv_interleaved", "rowwise/rope.cu", f"rope_kv<{t}, true>"),
        spec("rope_kv_fp8", "rowwise/rope.cu", f"rope_kv_fp8<{t}, false>"),
        spec("rope_kv_fp8_interleaved", "rowwise/rope.cu", f"rope_kv_fp8<{t}, true>"),
        spec("norm_groups_rms", "rowwise/norm.cu", f"norm_groups<{t}, false>"),
        spec("norm_groups_layer", "rowwise/norm.cu", f"norm_groups<{t}, true>"),
    ]
    specs += [
        spec(f"embed_{kind.lower()}", "rowwise/embed_blocks.cu", f"embed_blocks<{t}, rvllm::gguf::{kind}>")
        for kind in GGUF_LAYOUTS
    ]
    for suffix, vectors in NORM_VECTORS.items():
        specs.append(spec(f"norm_add_norm{suffix}", "rowwise/norm.cu", f"norm_add_norm<{t}, {vectors}>"))
    for interleaved in (False, True):
        for kind in ("rms", "layer"):
            suffix = "_interleaved" if interleaved else ""
            flags = f"{str(interleaved).lower()}, {str(kind == 'layer').lower()}"
            for of, element in (("", t), ("_fp8", "u8")):
                symbol = f"rope_kv_normed<{t}, {flags}, {element}>"
                specs.append(spec(f"rope_kv{of}_{kind}{suffix}", "rowwise/rope.cu", symbol))
    for kind in ("rms", "layer"):
        for add in (False, True):
            for suffix, vectors in NORM_VECTORS.items():
                flags = f"{str(kind == 'layer').lower()}, {str(add).lower()}"
                name = f"norm_{kind}{'_add' if add else ''}{suffix}"
                specs.append(spec(name, "rowwise/norm.cu", f"norm<{t}, {flags}, {vectors}>"))
                specs.append(spec(f"fp8_{name}", "rowwise/norm.cu", f"norm_e4m3<{t}, {flags}, {vectors}>"))
    specs.append(spec("gated_clamped", "rowwise/activation.cu", f"clamped<{t}>"))
    for act in ACTIVATIONS:
        specs.append(
            spec(f"gated_{act}", "rowwise/activation.cu", f"activate<{t}, Act::{act.upper()}, true>")
        )
        specs.append(spec(f"act_{act}", "rowwise/activation.cu", f"activate<{t}, Act::{act.upper()}, false>"))
    return specs


SPECS: list[KernelSpec] = [spec for dtype in ("bfloat16", "float16") for spec in _elementwise(dtype)]
