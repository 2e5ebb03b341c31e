"""Matrix products by cuBLASLt, for `--gemm-strategy cublas`. The library comes with the extra `cublas`.

Called through its C interface; constants are those of cublasLt.h, named as there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rvllm.backends.cuda.device.driver import Grid, Stream
from rvllm.errors import MissingKernelError, RvllmError
from rvllm.extras import install_command

KERNEL = "cublaslt"  # how these products are named beside the catalog's kernels
WORKSPACE = 32 << 20  # bytes; what NVIDIA recommends for Hopper
_COMPUTE_32F, _R_32F, _R_16F, _R_16BF = 68, 0, 2, 14
_TRANSA, _TRANSB, _EPILOGUE, _BIAS_POINTER, _BIAS_DATA_TYPE = 3, 4, 7, 8, 26
_OP_N, _OP_T, _EPILOGUE_BIAS, _MAX_WORKSPACE_BYTES = 0, 1, 4, 1


class _Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algo", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


@dataclass(frozen=True)
class Matmul:
    """out [tokens, rows] = x [tokens, width] weight [rows, width]^T * scale + bias + residual.

    Device addresses, row-major; pitch: elements from row to row of out and residual. residual is 0 or `out`.
    """

    x: int
    weight: int
    out: int
    bias: int
    residual: int
    tokens: int
    rows: int
    width: int
    pitch: int
    scale: float
    bf16: bool
    float_out: bool
    workspace: int


@cache
def library() -> ctypes.CDLL:
    """libcublasLt; raises MissingKernelError naming the extra when it is not installed."""
    for path in _candidates():
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    raise MissingKernelError(
        f"cuBLAS is not installed: {install_command('cublas')}, or use --gemm-strategy native"
    )


def version() -> int:
    """Of the library, as cublasLtGetVersion numbers it."""
    function = library().cublasLtGetVersion
    function.restype = c_size_t
    return int(function())


def _candidates() -> Iterator[Path | str]:
    try:
        import nvidia

        for root in nvidia.__path__:
            for folder in ("cu13", "cublas"):
                yield from sorted((Path(root) / folder / "lib").glob("libcublasLt.so.1[3-9]"))
    except ImportError:
        pass
    yield "libcublasLt.so.13"


def _call(name: str, *arguments: object) -> None:
    status = getattr(library(), name)(*arguments)
    if status != 0:
        raise RvllmError(f"{name}: cuBLAS status {status}")


@cache
def _handle() -> c_void_p:
    handle = c_void_p()
    _call("cublasLtCreate", byref(handle))
    return handle


class MatmulLaunch:
    """A product with its descriptors and algorithm chosen once; `run` queues it."""

    def __init__(self, matmul: Matmul) -> None:
        self._matmul = matmul
        kind = _R_16BF if matmul.bf16 else _R_16F
        out_kind = _R_32F if matmul.float_out else kind
        self._operation = c_void_p()
        _call("cublasLtMatmulDescCreate", byref(self._operation), c_int(_COMPUTE_32F), c_int(_R_32F))
        # Row-major data read as column-major: out^T [rows, tokens] = (weight^T)^T x^T.
        self._set(_TRANSA, c_int(_OP_T))
        self._set(_TRANSB, c_int(_OP_N))
        if matmul.bias:
            self._set(_EPILOGUE, c_int(_EPILOGUE_BIAS))
            self._set(_BIAS_POINTER, c_void_p(matmul.bias))
            self._set(_BIAS_DATA_TYPE, c_int(kind))
        self._a = _layout(kind, matmul.width, matmul.rows, matmul.width)
        self._b = _layout(kind, matmul.width, matmul.tokens, matmul.width)
        self._c = _layout(out_kind, matmul.rows, matmul.tokens, matmul.pitch)
        self._alpha, self._beta = c_float(matmul.scale), c_float(1.0 if matmul.residual else 0.0)
        self._algorithm = self._choose()

    def run(self, stream: Stream, grid: Grid) -> None:
        """Queues the product (or records it, while the stream captures); the grid is cuBLAS's own."""
        m = self._matmul
        _call(
            "cublasLtMatmul",
            _handle(),
            self._operation,
            byref(self._alpha),
            c_void_p(m.weight),
            self._a,
            c_void_p(m.x),
            self._b,
            byref(self._beta),
            c_void_p(m.out),
            self._c,
            c_void_p(m.out),
            self._c,
            byref(self._algorithm.algo),
            c_void_p(m.workspace),
            c_size_t(WORKSPACE),
            c_void_p(int(stream.handle)),
        )

    def _set(self, attribute: int, value: ctypes.c_int | c_void_p) -> None:
        size = c_size_t(ctypes.sizeof(value))
        _call("cublasLtMatmulDescSetAttribute", self._operation, c_int(attribute), byref(value), size)

    def _choose(self) -> _Heuristic:
        preference, found, count = c_void_p(), _Heuristic(), c_int(0)
        _call("cublasLtMatmulPreferenceCreate", byref(preference))
        limit = c_size_t(WORKSPACE)
        _call(
            "cublasLtMatmulPreferenceSetAttribute",
            preference,
            c_int(_MAX_WORKSPACE_BYTES),
            byref(limit),
            c_size_t(ctypes.sizeof(limit)),
        )
        _call(
            "cublasLtMatmulAlgoGetHeuristic",
            _handle(),
            self._operation,
            self._a,
            self._b,
            self._c,
            self._c,
            preference,
            c_int(1),
            byref(found),
            byref(count),
        )
        _call("cublasLtMatmulPreferenceDestroy", preference)
        if count.value == 0:
            m = self._matmul
            raise MissingKernelError(
                f"cuBLAS has no kernel for [{m.tokens}, {m.width}] x [{m.rows}, {m.width}]"
            )
        return found


def _layout(kind: int, rows: int, columns: int, pitch: int) -> c_void_p:
    layout = c_void_p()
    shape = c_uint64(rows), c_uint64(columns), c_int64(pitch)
    _call("cublasLtMatrixLayoutCreate", byref(layout), c_int(kind), *shape)
    return layout
