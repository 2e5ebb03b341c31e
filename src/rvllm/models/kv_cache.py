"""The type of a program's cached keys and values, as --kv-cache-dtype asks for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rvllm.errors import UsageError
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import BlockSparseAttention, KVCache, LatentAttention, Program
from rvllm.program.ops.encoder import embedding_size

_PLAIN = {"bf16": DType.BF16, "fp16": DType.F16}


def with_kv_cache(program: Program, kv_cache_dtype: str) -> Program:
    """The program with caches of that type: auto, bf16, fp16 or fp8.

    Raises UsageError where the type is another 16-bit one than the model's, and where the program has
    caches that no kernel reads in FP8, with what it can have instead.
    """
    if kv_cache_dtype == "auto":
        return program
    flag = f"--kv-cache-dtype {kv_cache_dtype}"
    if kv_cache_dtype != "fp8":
        if program.dtype is not _PLAIN[kv_cache_dtype]:
            raise UsageError(
                f"{flag}: keys and values are cached in the model's type, {program.dtype.value}, or in fp8; "
                f"use auto or fp8, or --dtype {_PLAIN[kv_cache_dtype].value}"
            )
        return program
    if (reason := _without_fp8(program)) is not None:
        raise UsageError(f"{flag}: {program.architecture} {reason}; use --kv-cache-dtype auto")

    def of(value: Any) -> Any:
        return replace(value, fp8=True) if isinstance(value, KVCache) else value

    return replace(
        program, caches=tuple(map(of, program.caches)), ops=tuple(op.mapped(of) for op in program.ops)
    )


def _without_fp8(program: Program) -> str | None:
    if embedding_size(program) is not None:
        return "computes whole texts here, and caches nothing between steps"
    if any(isinstance(op, LatentAttention) for op in program.ops):
        return "caches latents, which are read in 16 bits only"
    if program.states:
        return "has recurrent layers, and attention beside them reads 16 bits only"
    if any(isinstance(op, BlockSparseAttention) for op in program.ops):
        return "has block-sparse attention, which reads 16 bits only"
    return None
