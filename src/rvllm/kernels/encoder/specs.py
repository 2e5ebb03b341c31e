"""Encoders, block-sparse attention and small ops of single architectures: their kernels."""

from __future__ import annotations

from rvllm.errors import MissingKernelError
from rvllm.kernels.attention.specs import (
    PREFILL_SM90_DIMS,
    decode_smem,
    prefill_rows,
    prefill_sm90_smem,
    prefill_smem,
)
from rvllm.kernels.spec import KernelSpec
from rvllm.kernels.types import SHORT, TYPES

TEXT_HEAD_DIMS = (32, 64, 80, 96, 128)
TEXT_ROWS = 64  # query rows of a block of text_attention
SPARSE_HEAD_DIMS = (64, 128)
HIDDEN_TOKENS = 256  # ids a launch of hide_tokens takes
POOL_THREADS = 512
POOLINGS = ("mean", "cls", "last")  # in the order of `Pooling` in encoder/rows.cu
DTYPES = ("bfloat16", "float16")


def text_attention_kernel(dtype: str, head_dim: int) -> tuple[str, int]:
    """(kernel, dynamic shared memory in bytes); raises MissingKernelError for other head sizes."""
    if head_dim not in TEXT_HEAD_DIMS:
        sizes = ", ".join(map(str, TEXT_HEAD_DIMS))
        raise MissingKernelError(f"no text attention kernel for head size {head_dim}; there are {sizes}")
    return f"sm80_{SHORT[dtype]}_text_attn_d{head_dim}", _text_smem(head_dim)


def text_attention_sm90_kernel(dtype: str, head_dim: int) -> tuple[str, int] | None:
    """The kernel for Hopper, where one has this head size; its blocks are those of attn_prefill_sm90."""
    if head_dim not in PREFILL_SM90_DIMS:
        return None
    return f"sm90_{SHORT[dtype]}_text_attn_d{head_dim}", prefill_sm90_smem(head_dim)


def _text_smem(head_dim: int) -> int:
    return 2 * 3 * TEXT_ROWS * (head_dim + 8)


def _encoder(dtype: str) -> list[KernelSpec]:
    t, short = TYPES[dtype], SHORT[dtype]
    specs = [
        KernelSpec(f"sm80_{short}_add_positions", "encoder/rows.cu", f"add_positions<{t}>"),
        KernelSpec(f"sm80_{short}_pool", "encoder/rows.cu", f"pool<{t}>"),
    ]
    for dim in TEXT_HEAD_DIMS:
        specs.append(
            KernelSpec(
                name=f"sm80_{short}_text_attn_d{dim}",
                source="encoder/text_attention.cu",
                symbol=f"text_attention<{t}, {dim}>",
                smem=_text_smem(dim),
                unit=short,
            )
        )
    for dim in PREFILL_SM90_DIMS:
        specs.append(
            KernelSpec(
                name=f"sm90_{short}_text_attn_d{dim}",
                source="encoder/text_attention_sm90.cu",
                symbol=f"text_attention_sm90<{t}, {dim}>",
                arch=90,
                exact=True,
                smem=prefill_sm90_smem(dim),
                static_smem=0,
                unit=f"{short}_d{dim}",
            )
        )
    return specs


def _sparse(dtype: str, dim: int) -> list[KernelSpec]:
    t, short = TYPES[dtype], SHORT[dtype]
    specs = []
    for small in (False, True):
        suffix, rows = "_small" if small else "", prefill_rows(dim, small)
        unit = f"{short}_sparse_d{dim}{suffix}"
        decode = f"attn_decode_sparse<{t}, {dim}, {dim}>"
        prefill = f"attn_prefill_sparse<{t}, {dim}, {dim}, {rows // 16}>"
        specs += [
            KernelSpec(
                name=f"sm80_{short}_attn_decode_sparse_d{dim}{suffix}",
                source="attention/decode.cu",
                symbol=decode,
                smem=decode_smem(dim, separate=not small),
                unit=unit,
            ),
            KernelSpec(
                name=f"sm80_{short}_attn_prefill_sparse_d{dim}{suffix}",
                source="attention/prefill.cu",
                symbol=prefill,
                smem=prefill_smem(dim, rows),
                unit=unit,
            ),
        ]
    return specs


def sparse_kernel(dense: str, head_dim: int) -> str:
    """The block-sparse kernel beside a dense one; raises MissingKernelError where there is none."""
    if head_dim not in SPARSE_HEAD_DIMS:
        sizes = ", ".join(map(str, SPARSE_HEAD_DIMS))
        raise MissingKernelError(
            f"no block-sparse attention kernel for head size {head_dim}; there are {sizes}"
        )
    return dense.replace(f"_d{head_dim}", f"_sparse_d{head_dim}")


def _specs() -> list[KernelSpec]:
    specs = [KernelSpec("sm80_hide_tokens", "encoder/rows.cu", "hide_tokens")]
    for dtype in DTYPES:
        specs += _encoder(dtype)
        for dim in SPARSE_HEAD_DIMS:
            specs += _sparse(dtype, dim)
    return specs


SPECS: list[KernelSpec] = _specs()
