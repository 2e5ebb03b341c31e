"""How near a model with weights rounded as a GPU keeps them is to float32, computed on the CPU.

    PYTHONPATH=src:tests:scripts/gpu python scripts/kept_weights_cpu.py MODEL TEXT [--activations 128 256]

Matrices of layers are rounded, everything else stays float32. So do activations, and what is measured is the
format of the weights alone; unless --activations says of how many columns those share a scale that are
rounded to E4M3 too (0: all of a token's; several numbers: one after the other). bf16: to the 16-bit type;
stored: GGUF's blocks as our kernels decode them (float16 scales, numbers rounded to bfloat16); fp8: E4M3 with
a scale a row; int4: groups of 128, as `--quantization int4` makes them. Prints what
`scripts/gpu/kept_weights.py` prints.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from kept_weights import report, rows_of

from rvllm.backends.cpu.backend import CpuBackend
from rvllm.backends.cpu.reference import interpreter
from rvllm.backends.cpu.reference.run import Run
from rvllm.backends.cuda.ops.gemm.integer import multiplied
from rvllm.kernels.gemm.integer.specs import GGUF_LAYOUTS, LAYOUTS
from rvllm.program.ops.dense import Linear
from rvllm.weights.checkpoint import Checkpoint, TensorInfo, TensorType
from rvllm.weights.gguf.blocks import dequantise
from support.kernels.integer_checks import unpacked_blocks

BF16 = np.dtype(ml_dtypes.bfloat16)
GROUP, E4M3_LARGEST = 128, 448.0


def bf16(numbers: np.ndarray) -> np.ndarray:
    return numbers.astype(BF16).astype(np.float32)


def fp8(numbers: np.ndarray) -> np.ndarray:
    largest = np.maximum(np.abs(numbers).max(axis=1, keepdims=True), 1e-30)
    codes = (numbers * (E4M3_LARGEST / largest)).astype(ml_dtypes.float8_e4m3fn)
    return codes.astype(np.float32) * (largest / E4M3_LARGEST).astype(np.float32)


def int4(numbers: np.ndarray) -> np.ndarray:
    rows, k = numbers.shape
    groups = np.pad(numbers, [(0, 0), (0, -k % GROUP)]).reshape(rows, -1, GROUP)
    low = np.minimum(groups.min(axis=2, keepdims=True), 0)
    step = (np.maximum(groups.max(axis=2, keepdims=True), 0) - low) / 15
    step = np.maximum(step.astype(np.float16).astype(np.float32), 2.0**-24)
    zero = np.rint(-low / step)
    levels = np.clip(np.rint(groups / step) + zero, 0, 15)
    return ((levels - zero) * step).reshape(rows, -1)[:, :k].astype(np.float32)


def stored(info: TensorInfo, raw: np.ndarray) -> np.ndarray:
    kind = info.type.value
    if kind not in GGUF_LAYOUTS:
        return dequantise(info.type, raw, info.shape)
    levels, words = unpacked_blocks(kind, raw.reshape(info.shape[0], -1), info.shape[1])
    return multiplied(levels, words, LAYOUTS[GGUF_LAYOUTS[kind]], BF16)


MODES: dict[str, Callable[[np.ndarray], np.ndarray] | None] = {
    "bf16": bf16, "stored": None, "fp8": fp8, "int4": int4,
}  # fmt: skip


def round_activations(columns: int) -> None:
    """Has the reference round what it multiplies with layers' matrices."""

    def linear(op: Linear, run: Run) -> None:
        exact = run[op.x]
        whole = columns or exact.shape[1]
        run[op.x] = fp8(np.pad(exact, [(0, 0), (0, -exact.shape[1] % whole)]).reshape(-1, whole)).reshape(
            len(exact), -1
        )[:, : exact.shape[1]]
        interpreter.linear(op, run)
        run[op.x] = exact

    interpreter.KERNELS[Linear] = linear


class Rounded:
    """A checkpoint whose matrices of layers are rounded as they are read."""

    def __init__(self, checkpoint: Checkpoint, mode: str) -> None:
        self._checkpoint, self._mode = checkpoint, mode
        self.tensors = {name: self._as_read(info) for name, info in checkpoint.tensors.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def _as_read(self, info: TensorInfo) -> TensorInfo:
        if len(info.shape) != 2 or ".layers." not in info.name:
            return info
        return replace(info, type=TensorType.F32, nbytes=4 * info.shape[0] * info.shape[1])

    def raw(self, info: TensorInfo) -> np.ndarray:
        """The bytes of float32 numbers, rounded; of other tensors as they are."""
        own = self._checkpoint.tensors[info.name]
        data, rounding = self._checkpoint.raw(own), MODES[self._mode]
        if own.type is info.type and len(info.shape) != 2:
            return data
        if ".layers." not in info.name:
            return data
        numbers = stored(own, data) if rounding is None else rounding(dequantise(own.type, data, own.shape))
        return np.ascontiguousarray(numbers).reshape(-1).view(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--positions", type=int, default=2000)
    parser.add_argument("--only", nargs="*", default=list(MODES), choices=list(MODES))
    parser.add_argument("--activations", type=int, nargs="*", default=[])
    args = parser.parse_args()
    text = args.text.read_text()
    exact = rows_of(args.model, text, args.positions, device="cpu")
    report("float32", exact, exact)
    load = CpuBackend.load
    for mode in args.only:

        def rounded(program: Any, checkpoint: Any, *rest: Any, mode: str = mode) -> CpuBackend:
            return load(program, Rounded(checkpoint, mode), *rest)

        CpuBackend.load = staticmethod(rounded)  # type: ignore[method-assign, assignment]
        for columns in args.activations or [None]:
            if columns is not None:
                round_activations(columns)
            name = mode if columns is None else f"{mode} {columns}"
            report(name, exact, rows_of(args.model, text, args.positions, device="cpu"))


if __name__ == "__main__":
    main()
