"""Mamba-2: the short convolution, the scan and the gated norm: their kernels."""

from __future__ import annotations

from collections.abc import Iterator

from rvllm.errors import MissingKernelError
from rvllm.kernels.constants import constants
from rvllm.kernels.rowwise.specs import ACTIVATIONS
from rvllm.kernels.spec import Folder, KernelSpec
from rvllm.kernels.types import SHORT, TYPES

TAPS = (2, 3, 4)  # of the convolution
SCAN_TAPS = 4  # of a convolution within the scan, which is followed by silu
STATE_SIZES = (64, 128, 256)
LARGEST_DIM = 128  # of a head
_NARROW = 64  # heads up to this have a kernel of their own, with more blocks at a time
_CHUNK, _PAD = constants("mamba2/scan.cuh")["CHUNK"], 8  # as in mamba2/scan.cu


def scan_smem(dim: int, size: int) -> int:
    """Dynamic shared memory of state_scan in bytes: two chunks of x, B and C."""
    return 2 * 2 * _CHUNK * (dim + 2 * size + 3 * _PAD)


def scan_convolves(taps: int, activation: str) -> bool:
    """Whether the scan can compute this convolution itself, where every sequence has one token."""
    return taps == SCAN_TAPS and activation == "silu"


def scan_kernel(dtype: str, dim: int, size: int, conv: bool = False) -> str:
    """The scan for heads of `dim` and states of `size`; raises MissingKernelError where there is none.

    conv: the one that computes the convolution itself.
    """
    if size not in STATE_SIZES or dim % 16 or not 16 <= dim <= LARGEST_DIM:
        raise MissingKernelError(
            f"no scan kernel for heads of {dim} and states of {size} elements; heads are multiples of 16 up "
            f"to {LARGEST_DIM}, states {', '.join(map(str, STATE_SIZES))}"
        )
    name = f"sm80_{SHORT[dtype]}_state_scan_s{size}{'' if dim <= _NARROW else '_wide'}"
    return f"{name}_conv" if conv else name


def conv_kernel(dtype: str, taps: int, activation: str) -> str:
    """The convolution of `taps` taps; raises MissingKernelError where there is none."""
    if taps not in TAPS:
        raise MissingKernelError(f"no convolution kernel for {taps} taps; there are {TAPS[0]} to {TAPS[-1]}")
    return f"sm80_{SHORT[dtype]}_causal_conv_k{taps}_{activation}"


def gated_norm_kernel(dtype: str, group: int) -> tuple[str, int]:
    """(kernel, threads) that norms groups of `group` columns; raises MissingKernelError where none does."""
    threads = -(-group // 8 // 32) * 32
    if group % 8 or threads > 1024:
        raise MissingKernelError(f"no gated norm kernel for groups of {group} elements")
    return f"sm80_{SHORT[dtype]}_gated_norm", threads


def _specs(dtype: str) -> Iterator[KernelSpec]:
    t, short, kernel = TYPES[dtype], SHORT[dtype], Folder("mamba2").kernel
    for taps in TAPS:
        for act in ACTIVATIONS:
            symbol = f"causal_conv<{t}, {taps}, Act::{act.upper()}>"
            yield kernel(conv_kernel(dtype, taps, act), "conv", symbol)
    for size in STATE_SIZES:
        for dim in (_NARROW, LARGEST_DIM):
            for conv in (False, True):
                symbol = f"state_scan<{t}, {size}, {2 * dim}, {str(conv).lower()}>"
                name, smem = scan_kernel(dtype, dim, size, conv), scan_smem(dim, size)
                yield kernel(name, "scan", symbol, smem, unit=f"{short}_s{size}")
    unit = f"{short}_s{STATE_SIZES[0]}"
    yield kernel(f"sm80_{short}_scan_keep", "scan", f"scan_keep<{t}>", unit=unit)
    yield kernel(f"sm80_{short}_gated_norm", "gated_norm", f"gated_norm<{t}>")


SPECS: list[KernelSpec] = [spec for dtype in ("bfloat16", "float16") for spec in _specs(dtype)]
