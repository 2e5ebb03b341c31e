"""Encoders and small ops of single architectures: their kernels."""

from __future__ import annotations

from collections.abc import Iterator

from rvllm.errors import MissingKernelError
from rvllm.kernels.attention.specs import PREFILL_SM90_DIMS, prefill_sm90_smem
from rvllm.kernels.spec import Folder, KernelSpec
from rvllm.kernels.types import SHORT, TYPES

TEXT_HEAD_DIMS = (32, 64, 80, 96, 128)
TEXT_ROWS = 64  # query rows of a block of text_attention
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


def _specs(dtype: str) -> Iterator[KernelSpec]:
    t, short, kernel = TYPES[dtype], SHORT[dtype], Folder("encoder").kernel
    yield kernel(f"sm80_{short}_add_positions", "rows", f"add_positions<{t}>")
    yield kernel(f"sm80_{short}_pool", "rows", f"pool<{t}>")
    for dim in TEXT_HEAD_DIMS:
        name, symbol = f"sm80_{short}_text_attn_d{dim}", f"text_attention<{t}, {dim}>"
        yield kernel(name, "text_attention", symbol, _text_smem(dim), unit=short)
    for dim in PREFILL_SM90_DIMS:
        name, symbol = f"sm90_{short}_text_attn_d{dim}", f"text_attention_sm90<{t}, {dim}>"
        yield kernel(name, "text_attention_sm90", symbol, prefill_sm90_smem(dim), 0, f"{short}_d{dim}")


SPECS: list[KernelSpec] = [
    Folder("encoder").kernel("sm80_hide_tokens", "rows", "hide_tokens"),
    *(spec for dtype in DTYPES for spec in _specs(dtype)),
]
