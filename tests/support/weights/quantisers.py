"""Quantises matrices the way published checkpoints store them, and says what they are worth.

Each quantiser gives the tensors of a module and the float32 matrix that they stand for, computed element by
element from the formula: nothing is shared with the code under test.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from support.weights.model_files import safetensors_bytes

Tensors = dict[str, tuple[str, np.ndarray]]  # by name: safetensors' type and the array
Quantiser = Callable[[str, np.ndarray, np.random.Generator], tuple[Tensors, np.ndarray]]

E4M3_LARGEST = 448.0
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def file_of(tensors: Tensors) -> bytes:
    """A safetensors file."""
    header, data = {}, b""
    for name, (kind, array) in tensors.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    return safetensors_bytes(header, data)


def save_quantised(
    folder: Path,
    config: dict[str, Any],
    numbers: Mapping[str, np.ndarray],
    quantisation: dict[str, Any],
    quantise: Quantiser,
    wanted: Callable[[str, np.ndarray], bool],
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Writes a checkpoint whose `wanted` matrices are quantised, the rest float32.

    Returns the numbers that the file stands for, by their names in a plain one.
    """
    rng, stored, plain = np.random.default_rng(seed), dict[str, Any](), dict[str, np.ndarray]()
    for name, tensor in numbers.items():
        plain[name] = tensor
        if wanted(name, tensor):
            more, plain[name] = quantise(name.removesuffix(".weight"), tensor, rng)
            stored |= more
        else:
            stored[name] = ("F32", tensor)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
    (folder / "model.safetensors").write_bytes(file_of(stored))
    return plain


def in_layers(name: str, numbers: np.ndarray) -> bool:
    """Whether a tensor is a matrix of the model's layers."""
    return numbers.ndim == 2 and "layers" in name


def _e4m3(numbers: np.ndarray) -> np.ndarray:
    return np.clip(numbers, -E4M3_LARGEST, E4M3_LARGEST).astype(ml_dtypes.float8_e4m3fn)


def _byte_value(code: int) -> np.float32:
    return np.float32(np.array([code], np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)[0])


def _scaled(codes: np.ndarray, scale_at: Callable[[int, int], np.float32]) -> np.ndarray:
    rows, columns = codes.shape
    out = np.empty((rows, columns), np.float32)
    for n in range(rows):
        for k in range(columns):
            out[n, k] = _byte_value(int(codes[n, k])) * scale_at(n, k)
    return out


def fp8_blocks(height: int, width: int, kind: str = "F32") -> Quantiser:
    """FP8 with a factor for each block, as DeepSeek-V3 and Qwen3 have it."""

    def quantise(name: str, matrix: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        rows, columns = matrix.shape
        scales = np.empty((-(-rows // height), -(-columns // width)), np.float32)
        codes = np.empty(matrix.shape, np.uint8)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                here = np.s_[i * height : (i + 1) * height, j * width : (j + 1) * width]
                scale = np.abs(matrix[here]).max() / E4M3_LARGEST
                if kind == "BF16":
                    scale = scale.astype(ml_dtypes.bfloat16).astype(np.float32)
                if kind == "F8_E8M0":
                    scale = np.exp2(np.ceil(np.log2(scale))).astype(np.float32)
                scales[i, j] = scale
                codes[here] = _e4m3(matrix[here] / scale).view(np.uint8)
        stored = {
            "F32": scales,
            "BF16": scales.astype(ml_dtypes.bfloat16).view(np.uint16),
            "F8_E8M0": (np.log2(scales) + 127).astype(np.uint8),
        }[kind]
        tensors = {f"{name}.weight": ("F8_E4M3", codes), f"{name}.weight_scale_inv": (kind, stored)}
        return tensors, _scaled(codes, lambda n, k: scales[n // height, k // width])

    return quantise


def four_dimensional(quantise: Quantiser) -> Quantiser:
    """The same with ModelOpt's shape of a block's scales, [rows, 1, columns, 1], and their name."""

    def stored(name: str, matrix: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        tensors, worth = quantise(name, matrix, rng)
        kind, scales = tensors.pop(f"{name}.weight_scale_inv")
        return tensors | {f"{name}.weight_scale": (kind, scales[:, None, :, None])}, worth

    return stored


def fp8_rows(name: str, matrix: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
    """FP8 with a scale a row, [N, 1]; one row of zeros and subnormals among them."""
    matrix = matrix.copy()
    scales = (np.abs(matrix).max(axis=1, keepdims=True) / E4M3_LARGEST).astype(np.float32)
    codes = _e4m3(matrix / scales).view(np.uint8)
    codes[0, :4] = (0x00, 0x80, 0x01, 0x87)  # zero, minus zero, the smallest and the largest subnormal
    tensors = {f"{name}.weight": ("F8_E4M3", codes), f"{name}.weight_scale": ("F32", scales)}
    return tensors, _scaled(codes, lambda n, k: scales[n, 0])


def fp8_whole(shape: tuple[int, ...]) -> Quantiser:
    """FP8 with one scale, stored with this shape."""

    def quantise(name: str, matrix: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        scale = np.float32(np.abs(matrix).max() / E4M3_LARGEST)
        codes = _e4m3(matrix / scale).view(np.uint8)
        stored = np.full(shape, scale, np.float32)
        tensors = {
            f"{name}.weight": ("F8_E4M3", codes),
            f"{name}.weight_scale": ("F32", stored),
            f"{name}.input_scale": ("F32", stored),
        }
        return tensors, _scaled(codes, lambda n, k: scale)

    return quantise


def int8_groups(size: int) -> Quantiser:
    """INT8 with a bfloat16 scale a group of a row."""

    def quantise(name: str, matrix: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        rows, columns = matrix.shape
        cut = matrix.reshape(rows, columns // size, size)
        scales = (np.abs(cut).max(axis=2) / 127).astype(ml_dtypes.bfloat16)
        wide = scales.astype(np.float32)
        levels = np.clip(np.rint(cut / wide[:, :, None]), -128, 127).astype(np.int8).reshape(rows, columns)
        out = np.empty_like(matrix)
        for n in range(rows):
            for k in range(columns):
                out[n, k] = np.float32(levels[n, k]) * wide[n, k // size]
        tensors = {
            f"{name}.weight": ("I8", levels),
            f"{name}.weight_scale": ("BF16", scales.view(np.uint16)),
        }
        return tensors, out

    return quantise


def int8_zeros(shifted: bool) -> Quantiser:
    """INT8 with a scale and a zero point a row; not shifted: all of them 0, as of symmetric checkpoints."""

    def quantise(name: str, matrix: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        low, high = matrix.min(axis=1, keepdims=True), matrix.max(axis=1, keepdims=True)
        scales = ((high - low) / 254 if shifted else np.abs(matrix).max(axis=1, keepdims=True) / 127).astype(
            np.float32
        )
        zeros = np.rint(-127 - low / scales).astype(np.int8) if shifted else np.zeros(scales.shape, np.int8)
        levels = np.clip(np.rint(matrix / scales) + zeros, -128, 127).astype(np.int8)
        out = np.empty_like(matrix)
        for n in range(matrix.shape[0]):
            for k in range(matrix.shape[1]):
                out[n, k] = np.float32(int(levels[n, k]) - int(zeros[n, 0])) * scales[n, 0]
        return {
            f"{name}.weight": ("I8", levels),
            f"{name}.weight_scale": ("F32", scales),
            f"{name}.weight_zero_point": ("I8", zeros),
            f"{name}.input_zero_point": ("I8", np.full(1, 7, np.int8)),
            f"{name}.input_scale": ("F32", np.full(1, 0.1, np.float32)),
        }, out

    return quantise


def _grouped(
    matrix: np.ndarray, group: np.ndarray, bits: int, symmetric: bool, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levels [N, K], zeros [groups, N] and float16 scales [groups, N]; zeros within 1 .. 2^bits - 1."""
    rows, _ = matrix.shape
    groups = int(group.max()) + 1
    levels = np.zeros(matrix.shape, np.int64)
    zeros = np.zeros((groups, rows), np.int64)
    scales = np.zeros((groups, rows), np.float16)
    top = (1 << bits) - 1
    for g in range(groups):
        columns = np.flatnonzero(group == g)
        for n in range(rows):
            part = matrix[n, columns]
            low, high = min(part.min(), 0), max(part.max(), 0)
            if symmetric:
                high = max(-low, high)
                low = -high
            scale = np.float16(max((high - low) / top, 1e-4))
            zero = 1 << (bits - 1) if symmetric else int(np.clip(np.rint(-low / scale), 1, top))
            levels[n, columns] = np.clip(np.rint(part / np.float32(scale)) + zero, 0, top)
            zeros[g, n], scales[g, n] = zero, scale
    return levels, zeros, scales


def _worth(levels: np.ndarray, zeros: np.ndarray, scales: np.ndarray, group: np.ndarray) -> np.ndarray:
    out = np.empty(levels.shape, np.float32)
    for n in range(levels.shape[0]):
        for k in range(levels.shape[1]):
            g = group[k]
            out[n, k] = np.float32(levels[n, k] - zeros[g, n]) * np.float32(scales[g, n])
    return out


def _words(levels: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Packs along the last axis, padded with zeros; place i of a word holds element order[i] of its run."""
    each = 32 // bits
    padded = np.concatenate([levels, np.zeros((*levels.shape[:-1], -levels.shape[-1] % each), np.int64)], -1)
    runs = padded.reshape(*levels.shape[:-1], -1, each)
    out = np.zeros(runs.shape[:-1], np.uint64)
    for place in range(each):
        element = runs[..., order[place] if order else place]
        out |= element.astype(np.uint64) << np.uint64(bits * place)
    return np.ascontiguousarray(out.astype(np.uint32).view(np.int32))


def gptq(
    bits: int, size: int, *, desc_act: bool = False, symmetric: bool = False, v2: bool = False
) -> Quantiser:
    """GPTQ; size -1: one group."""

    def quantise(name: str, matrix: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        columns = matrix.shape[1]
        group = np.arange(columns) // (columns if size == -1 else size)
        if desc_act:
            group = rng.permutation(group)
        levels, zeros, scales = _grouped(matrix, group, bits, symmetric, rng)
        tensors: Tensors = {
            f"{name}.qweight": ("I32", np.ascontiguousarray(_words(levels, bits).T)),
            f"{name}.qzeros": ("I32", _words(zeros if v2 else zeros - 1, bits)),
            f"{name}.scales": ("F16", scales),
            f"{name}.g_idx": ("I32", group.astype(np.int32)),
        }
        return tensors, _worth(levels, zeros, scales, group)

    return quantise


def awq(size: int) -> Quantiser:
    """AWQ in its gemm layout."""

    def quantise(name: str, matrix: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        group = np.arange(matrix.shape[1]) // (matrix.shape[1] if size == -1 else size)
        levels, zeros, scales = _grouped(matrix, group, 4, False, rng)
        tensors: Tensors = {
            f"{name}.qweight": ("I32", _words(np.ascontiguousarray(levels.T), 4, AWQ_ORDER)),
            f"{name}.qzeros": ("I32", _words(zeros, 4, AWQ_ORDER)),
            f"{name}.scales": ("F16", scales),
        }
        return tensors, _worth(levels, zeros, scales, group)

    return quantise


def packed(bits: int, size: int, *, symmetric: bool = True, by_order: bool = False) -> Quantiser:
    """llm-compressor's pack-quantized."""

    def quantise(name: str, matrix: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        group = np.arange(matrix.shape[1]) // size
        if by_order:
            group = rng.permutation(group)
        levels, zeros, scales = _grouped(matrix, group, bits, symmetric, rng)
        tensors: Tensors = {
            f"{name}.weight_packed": ("I32", _words(levels, bits)),
            f"{name}.weight_scale": ("F16", np.ascontiguousarray(scales.T)),
            f"{name}.weight_shape": ("I64", np.array(matrix.shape, np.int64)),
        }
        if not symmetric:
            tensors[f"{name}.weight_zero_point"] = ("I32", np.ascontiguousarray(_words(zeros, bits).T))
        if by_order:
            tensors[f"{name}.weight_g_idx"] = ("I32", group.astype(np.int32))
        return tensors, _worth(levels, zeros, scales, group)

    return quantise


def _groups(**weights: object) -> dict[str, object]:
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


def compressed(form: str, **weights: object) -> dict[str, object]:
    """A quantization_config of compressed-tensors."""
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": _groups(**weights)}


MIXED_BITS = {  # packed to 4 bits, or to 8
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        f"group_{bits}": {"targets": [f"re:.*{bits}"], "weights": {"type": "int", "num_bits": bits}}
        for bits in (4, 8)
    },
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
GPTQ = {"quant_method": "gptq", "sym": False, "desc_act": False}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 16, "sym": False, "data_type": "int"}
AWQ = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}

CASES: dict[str, tuple[dict[str, object], Quantiser]] = {
    "fp8_blocks": (FP8 | {"weight_block_size": [16, 32]}, fp8_blocks(16, 32)),
    "fp8_blocks_bf16": (FP8 | {"weight_block_size": [128, 128]}, fp8_blocks(128, 128, "BF16")),
    "fp8_blocks_e8m0": (FP8 | {"weight_block_size": [8, 8]}, fp8_blocks(8, 8, "F8_E8M0")),
    "fp8_scalar": (FP8, fp8_whole(())),
    "fp8_one": (FP8, fp8_whole((1,))),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8_whole(())),
    "modelopt_nested": ({"quant_method": "modelopt", "quantization": {"quant_algo": "FP8"}}, fp8_whole(())),
    "modelopt_rows": ({"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, fp8_rows),
    "modelopt_blocks": (
        {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8_PB_WO"}},
        four_dimensional(fp8_blocks(128, 128)),
    ),
    "fbgemm_fp8": ({"quant_method": "fbgemm_fp8", "modules_to_not_convert": []}, fp8_rows),
    "compressed_fp8_rows": (
        compressed("float-quantized", type="float", num_bits=8, strategy="channel"),
        fp8_rows,
    ),
    "compressed_fp8_blocks": (
        compressed("float-quantized", type="float", num_bits=8, strategy="block", block_structure=[16, 16]),
        fp8_blocks(16, 16),
    ),
    "compressed_fp8_text": (
        compressed("float-quantized", type="float", num_bits=8, strategy="block", block_structure="16x16"),
        fp8_blocks(16, 16),
    ),
    "compressed_int8": (
        compressed("int-quantized", type="int", num_bits=8, strategy="group"),
        int8_groups(8),
    ),
    "compressed_int8_zero": (compressed("int-quantized", type="int", num_bits=8), int8_zeros(False)),
    "compressed_int8_shifted": (compressed("int-quantized", type="int", num_bits=8), int8_zeros(True)),
    "gptq": (GPTQ | {"bits": 4, "group_size": 16}, gptq(4, 16)),
    "gptq_null": (GPTQ | {"bits": 4, "group_size": 16, "desc_act": None, "pack_dtype": "int32"}, gptq(4, 16)),
    "gptq_one_group": (GPTQ | {"bits": 4, "group_size": -1, "sym": True}, gptq(4, -1, symmetric=True)),
    "gptq_desc_act": (GPTQ | {"bits": 4, "group_size": 8, "desc_act": True}, gptq(4, 8, desc_act=True)),
    "gptq_v2": (GPTQ | {"bits": 4, "group_size": 16, "checkpoint_format": "gptq_v2"}, gptq(4, 16, v2=True)),
    "gptq_8_bit": (GPTQ | {"bits": 8, "group_size": 16}, gptq(8, 16)),
    "awq": (AWQ | {"group_size": 16}, awq(16)),
    "awq_one_group": (AWQ | {"group_size": -1}, awq(-1)),
    "autoround_gptq": (AUTO_ROUND | {"packing_format": "auto_round:auto_gptq"}, gptq(4, 16)),
    "autoround_awq": (AUTO_ROUND | {"packing_format": "auto_round:auto_awq"}, awq(16)),
    "packed": (compressed("pack-quantized", type="int", num_bits=4), packed(4, 16)),
    "packed_asymmetric": (
        compressed("pack-quantized", type="int", num_bits=4),
        packed(4, 8, symmetric=False),
    ),
    "packed_by_order": (compressed("pack-quantized", type="int", num_bits=4), packed(4, 8, by_order=True)),
    "packed_8_bit": (compressed("pack-quantized", type="int", num_bits=8), packed(8, 16, symmetric=False)),
}
