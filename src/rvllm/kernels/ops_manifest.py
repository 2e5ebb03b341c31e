"""The kernels that are not matrix products, and the shared memory each may ask for."""

from __future__ import annotations

from rvllm.errors import MissingKernelError
from rvllm.kernels.spec import KernelSpec

TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "float"}
SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
HEAD_DIMS = (32, 64, 80, 96, 128, 160, 256)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
FORMATS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
DECODE_SEQS = 2048  # sequences a launch of attn_decode can list
NORM_VECTORS = {"": 1, "_wide": 2}  # 16-byte vectors a thread of `norm` holds
_PAD = 8  # elements after each row of a tile, as in attention.cuh
_TILE = 64


def decode_smem(head_dim: int, separate: bool, max_seqs: int = DECODE_SEQS) -> int:
    """Dynamic shared memory of attn_decode in bytes: four tiles, the queries, and a word a sequence.

    separate: four more tiles, so that keys and values do not take turns.
    """
    tiles = 2 * 4 * _TILE * (head_dim + _PAD)
    return tiles * (2 if separate else 1) + 2 * 16 * (head_dim + _PAD) + 4 * (-(-max_seqs // 32) * 32)


def prefill_rows(head_dim: int, small: bool) -> int:
    """Query rows a block of attn_prefill has."""
    return (128 if head_dim <= 128 else 64) // (2 if small else 1)


def prefill_smem(head_dim: int, rows: int) -> int:
    """Dynamic shared memory of attn_prefill in bytes."""
    return 2 * (rows + 2 * _TILE) * (head_dim + _PAD) + 4 * rows * head_dim


def norm_kernel(dtype: str, kind: str, width: int, add: bool) -> tuple[str, int]:
    """(kernel, threads) that normalises rows of `width`; kind is rms or layer.

    Raises MissingKernelError for a width that is not a multiple of 8 or too large.
    """
    for suffix, vectors in NORM_VECTORS.items():
        threads = -(-width // (8 * vectors * 32)) * 32
        if width % 8 == 0 and threads <= 1024:
            return f"sm80_{SHORT[dtype]}_norm_{kind}{'_add' if add else ''}{suffix}", threads
    raise MissingKernelError(f"no norm kernel for rows of {width} elements")


def norm_add_norm_kernel(dtype: str, width: int) -> tuple[str, int]:
    """(kernel, threads) of the RMS norm, residual add and RMS norm in one; raises as `norm_kernel` does."""
    kernel, threads = norm_kernel(dtype, "rms", width, False)
    return kernel.replace("norm_rms", "norm_add_norm"), threads


def decode_kernel(dtype: str, head_dim: int, smem_per_block: int) -> str:
    """The decode attention kernel that fits; raises MissingKernelError when none does."""
    return _fitting("decode", dtype, head_dim, smem_per_block)


def prefill_kernel(dtype: str, head_dim: int, smem_per_block: int) -> str:
    """The prefill attention kernel that fits; raises MissingKernelError when none does."""
    return _fitting("prefill", dtype, head_dim, smem_per_block)


def _fitting(phase: str, dtype: str, head_dim: int, smem_per_block: int) -> str:
    base = f"sm80_{SHORT[dtype]}_attn_{phase}_d{head_dim}"
    static = 1024 if phase == "decode" else 0  # what the kernel declares besides
    for name in (base, f"{base}_small"):
        if name in _BY_NAME and _BY_NAME[name].smem + static <= smem_per_block:
            return name
    raise MissingKernelError(
        f"no {phase} attention kernel for {dtype}, head size {head_dim} "
        f"and {smem_per_block // 1024} KB of shared memory; head sizes are {', '.join(map(str, HEAD_DIMS))}"
    )


def _attention(dtype: str, dim: int) -> list[KernelSpec]:
    t, short = TYPES[dtype], SHORT[dtype]
    specs = []
    for small in (False, True) if dim <= 160 else (False,):
        suffix, rows = "_small" if small else "", prefill_rows(dim, small)
        if dim <= 128 or not small:
            specs.append(
                KernelSpec(
                    name=f"sm80_{short}_attn_decode_d{dim}{suffix}",
                    source="attention_decode.cu",
                    symbol=f"attn_decode<{t}, {dim}, {dim}>",
                    smem=decode_smem(dim, separate=not small and dim <= 128),
                    unit=f"{short}_d{dim}{suffix}",
                )
            )
        specs.append(
            KernelSpec(
                name=f"sm80_{short}_attn_prefill_d{dim}{suffix}",
                source="attention_prefill.cu",
                symbol=f"attn_prefill<{t}, {dim}, {dim}, {rows // 16}>",
                smem=prefill_smem(dim, rows),
                unit=f"{short}_d{dim}{suffix}",
            )
        )
    return specs


def _elementwise(dtype: str) -> list[KernelSpec]:
    t, short = TYPES[dtype], SHORT[dtype]

    def spec(name: str, source: str, symbol: str) -> KernelSpec:
        return KernelSpec(name=f"sm80_{short}_{name}", source=source, symbol=symbol)

    specs = [
        spec("embed", "embed.cu", f"embed<{t}>"),
        spec("gather_rows", "gather.cu", f"gather_rows<{t}>"),
        spec("add", "gather.cu", f"add<{t}>"),
        spec("rope_kv", "rope.cu", f"rope_kv<{t}, false>"),
        spec("rope_kv_interleaved", "rope.cu", f"rope_kv<{t}, true>"),
        spec("norm_groups_rms", "norm.cu", f"norm_groups<{t}, false>"),
        spec("norm_groups_layer", "norm.cu", f"norm_groups<{t}, true>"),
    ]
    for suffix, vectors in NORM_VECTORS.items():
        specs.append(spec(f"norm_add_norm{suffix}", "norm.cu", f"norm_add_norm<{t}, {vectors}>"))
    for interleaved in (False, True):
        for kind in ("rms", "layer"):
            suffix = "_interleaved" if interleaved else ""
            flags = f"{str(interleaved).lower()}, {str(kind == 'layer').lower()}"
            specs.append(spec(f"rope_kv_{kind}{suffix}", "rope.cu", f"rope_kv_normed<{t}, {flags}>"))
    for kind in ("rms", "layer"):
        for add in (False, True):
            for suffix, vectors in NORM_VECTORS.items():
                flags = f"{str(kind == 'layer').lower()}, {str(add).lower()}"
                name = f"norm_{kind}{'_add' if add else ''}{suffix}"
                specs.append(spec(name, "norm.cu", f"norm<{t}, {flags}, {vectors}>"))
    specs.append(spec("gated_clamped", "activation.cu", f"clamped<{t}>"))
    for act in ACTIVATIONS:
        specs.append(spec(f"gated_{act}", "activation.cu", f"activate<{t}, Act::{act.upper()}, true>"))
        specs.append(spec(f"act_{act}", "activation.cu", f"activate<{t}, Act::{act.upper()}, false>"))
    return specs


def _loading(dtype: str) -> list[KernelSpec]:
    t, short = TYPES[dtype], SHORT[dtype]
    fill = KernelSpec(name=f"sm80_{short}_fill_random", source="fill.cu", symbol=f"fill_random<{t}>")
    return [fill] + [
        KernelSpec(
            name=f"sm80_{short}_dequant_{kind.lower()}",
            source="dequant.cu",
            symbol=f"dequant<{kind}, {t}>",
        )
        for kind in FORMATS
    ]


def _specs() -> list[KernelSpec]:
    specs = [
        KernelSpec(name=f"sm80_{name}", source="sample.cu", symbol=name)
        for name in ("sample_scan", "sample_pick", "slot_start")
    ]
    specs.append(KernelSpec(name="sm80_logprobs", source="logprobs.cu", symbol="logprobs"))
    specs.append(KernelSpec(name="sm80_checksum", source="fill.cu", symbol="checksum"))
    for dtype in ("bfloat16", "float16"):
        specs += _elementwise(dtype)
        for dim in HEAD_DIMS:
            specs += _attention(dtype, dim)
    for dtype in TYPES:
        specs += _loading(dtype)
    return specs


SPECS: list[KernelSpec] = _specs()
_BY_NAME = {spec.name: spec for spec in SPECS}
