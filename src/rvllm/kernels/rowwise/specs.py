"""Ops on single rows: embedding, norms, activations, residuals, rope with the cache write: their kernels."""

from __future__ import annotations

from collections.abc import Iterator

from rvllm.errors import MissingKernelError
from rvllm.kernels.gemm.integer.specs import GGUF_LAYOUTS
from rvllm.kernels.spec import Folder, KernelSpec
from rvllm.kernels.types import SHORT, TYPES

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
_NORMS = {"rms": "false", "layer": "true"}  # whether they subtract the mean
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


def _specs(dtype: str) -> Iterator[KernelSpec]:
    t = TYPES[dtype]

    def kernel(name: str, source: str, symbol: str) -> KernelSpec:
        return Folder("rowwise").kernel(f"sm80_{SHORT[dtype]}_{name}", source, symbol)

    yield kernel("embed", "embed", f"embed<{t}>")
    yield kernel("gather_rows", "gather", f"gather_rows<{t}>")
    yield kernel("add", "gather", f"add<{t}>")
    yield kernel("rope_kv_rows", "rope", f"rope_kv_rows<{t}>")
    yield kernel("rope_kv_fp8_rows", "rope", f"rope_kv_fp8_rows<{t}>")
    yield kernel("gated_clamped", "activation", f"clamped<{t}>")
    for kind in GGUF_LAYOUTS:
        yield kernel(f"embed_{kind.lower()}", "embed_blocks", f"embed_blocks<{t}, rvllm::gguf::{kind}>")
    for end, flag in (("", "false"), ("_interleaved", "true")):
        yield kernel(f"rope_kv{end}", "rope", f"rope_kv<{t}, {flag}>")
        yield kernel(f"rope_kv_fp8{end}", "rope", f"rope_kv_fp8<{t}, {flag}>")
        for kind, layer in _NORMS.items():
            for of, element in (("", t), ("_fp8", "u8")):
                symbol = f"rope_kv_normed<{t}, {flag}, {layer}, {element}>"
                yield kernel(f"rope_kv{of}_{kind}{end}", "rope", symbol)
    for kind, layer in _NORMS.items():
        yield kernel(f"norm_groups_{kind}", "norm", f"norm_groups<{t}, {layer}>")
    for suffix, vectors in NORM_VECTORS.items():
        yield kernel(f"norm_add_norm{suffix}", "norm", f"norm_add_norm<{t}, {vectors}>")
        for kind, layer in _NORMS.items():
            for add, flag in (("", "false"), ("_add", "true")):
                name, arguments = f"norm_{kind}{add}{suffix}", f"<{t}, {layer}, {flag}, {vectors}>"
                yield kernel(name, "norm", f"norm{arguments}")
                yield kernel(f"fp8_{name}", "norm", f"norm_e4m3{arguments}")
    for act in ACTIVATIONS:
        yield kernel(f"gated_{act}", "activation", f"activate<{t}, Act::{act.upper()}, true>")
        yield kernel(f"act_{act}", "activation", f"activate<{t}, Act::{act.upper()}, false>")


SPECS: list[KernelSpec] = [spec for dtype in ("bfloat16", "float16") for spec in _specs(dtype)]
