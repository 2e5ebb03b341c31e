"""Quantised safetensors checkpoints: which tensors make up each matrix, by what the config says.

    fp8, fbgemm_fp8      X.weight in FP8 with X.weight_scale_inv or X.weight_scale
    modelopt             the same, with quant_algo FP8, FP8_PER_CHANNEL_PER_TOKEN or FP8_PB_WO
    gptq                 X.qweight, X.qzeros, X.scales, X.g_idx, 4 or 8 bits
    awq                  X.qweight, X.qzeros, X.scales, 4 bits, version gemm
    auto-round           as gptq or awq, which packing_format says
    compressed-tensors   X.weight in FP8 or INT8 with X.weight_scale; X.weight_packed, 4 or 8 bits

Each matrix appears as X.weight, like that of a model that is not quantised, and is dequantised to float32
when it is read. How activations were meant to be quantised is left aside: they keep the model's type. Modules
that the quantiser passed over are there as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from rvllm.errors import ModelError
from rvllm.weights.checkpoint import Quantised, TensorInfo, TensorType
from rvllm.weights.safetensors.grouped import (
    AWQ_BITS,
    BITS,
    GptqSettings,
    awq_matrix,
    gptq_matrix,
    packed_matrix,
)
from rvllm.weights.safetensors.scaled import NUMBER_KINDS, scaled_matrix
from rvllm.weights.safetensors.stored import StoredTensor

Stored = dict[str, StoredTensor]
Found = tuple[tuple[int, int], Quantised]

OTHER_NAMES = {"intel/auto-round": "auto-round", "auto_round": "auto-round"}
MODELOPT_BLOCKS = {"fp8": None, "fp8_per_channel_per_token": None, "fp8_pb_wo": (128, 128)}
GPTQ_FORMATS = ("gptq", "gptq_v2")
COMPRESSED_FORMATS = ("float-quantized", "naive-quantized", "int-quantized", "pack-quantized", "dense",
                      "mixed-precision")  # fmt: skip


class Settings:
    """quantization_config with the checks that its fields need; errors name file and field."""

    def __init__(self, values: dict[str, Any], origin: str) -> None:
        self.values = values
        self.origin = origin

    def refuse(self, field: str, value: object, wanted: str) -> ModelError:
        """The error for a field whose value is not supported."""
        shown = repr(value)[:60]
        return ModelError(f"{self.origin}: quantization_config.{field} {shown} is not supported; {wanted}")

    def integer(self, *names: str) -> int:
        """The first of these fields that is there."""
        for name in names:
            value = self.values.get(name)
            if value is not None:
                if type(value) is not int:
                    raise self.refuse(name, value, "it must be a whole number")
                return value
        raise ModelError(f"{self.origin}: quantization_config has no {names[0]}")

    def flag(self, name: str) -> bool:
        """A switch, off where it is not there."""
        value = self.values.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.refuse(name, value, "it must be true or false")
        return value

    def word(self, *names: str, default: str) -> str:
        """The first of these fields that is there, in lower case."""
        found = next((self.values[n] for n in names if self.values.get(n) is not None), default)
        return str(found).lower()

    def choice(self, *names: str, default: str, supported: Iterable[str]) -> str:
        """As `word`; raises ModelError, naming the first field, for what is not supported."""
        if (found := self.word(*names, default=default)) not in supported:
            raise self.refuse(names[0], found, f"supported: {', '.join(supported)}")
        return found


def quantised_tensors(values: dict[str, Any], origin: str, stored: Stored) -> dict[str, TensorInfo]:
    """The quantised matrices of a checkpoint, by the name they have in a model that is not quantised.

    values: quantization_config, empty where there is none; origin: the config's path, for errors. Reads no
    tensor. Raises ModelError for a method, a number of bits or a layout that is not supported, and for
    matrices whose scales are missing or do not fit.
    """
    if not values:
        return _scaled_tensors(stored, None, {"F8_E4M3"})
    settings = Settings(values, origin)
    method = settings.word("quant_method", default=_older_method(values))
    method = OTHER_NAMES.get(method, method)
    readers: dict[str, Callable[[Settings, Stored], dict[str, TensorInfo]]] = {
        "fp8": _fp8,
        "fbgemm_fp8": _fp8,
        "modelopt": _modelopt,
        "gptq": _gptq,
        "awq": _awq,
        "auto-round": _auto_round,
        "compressed-tensors": _compressed,
    }
    if method not in readers:
        raise settings.refuse("quant_method", method, f"supported: {', '.join(readers)}")
    return readers[method](settings, stored)


def _older_method(values: dict[str, Any]) -> str:
    """Which method a config without quant_method means, by the names of its fields."""
    if "w_bit" in values or "q_group_size" in values:
        return "awq"
    if "quant_algo" in values or isinstance(values.get("quantization"), dict):
        return "modelopt"  # hf_quant_config.json
    return "gptq" if "desc_act" in values or "bits" in values else "none"


def _fp8(settings: Settings, stored: Stored) -> dict[str, TensorInfo]:
    if (fmt := settings.word("fmt", "weight_dtype", default="e4m3")) not in (
        "e4m3",
        "e4m3fn",
        "float8_e4m3fn",
    ):
        raise settings.refuse("fmt", fmt, "supported: e4m3")
    block = _block(settings, "weight_block_size", settings.values.get("weight_block_size"))
    return _scaled_tensors(stored, block, {"F8_E4M3"})


def _modelopt(settings: Settings, stored: Stored) -> dict[str, TensorInfo]:
    nested = settings.values.get("quantization")
    values = nested if isinstance(nested, dict) else settings.values
    if values.get("quant_algo", "none") is None:
        return {}  # keys and values alone were quantised
    inner = Settings(values, settings.origin)
    algorithm = inner.choice("quant_algo", default="none", supported=MODELOPT_BLOCKS)
    return _scaled_tensors(stored, MODELOPT_BLOCKS[algorithm], {"F8_E4M3"})


def _block(settings: Settings, field: str, value: object) -> tuple[int, int] | None:
    if isinstance(value, str) and "x" in value:  # "128x128"
        value = [int(n) if n.isdecimal() else 0 for n in value.split("x")]
    if value is None or value == "":
        return None
    good = isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)
    if not good or not isinstance(value, list):
        raise settings.refuse(field, value, "it must be two positive numbers, rows and columns of a block")
    return value[0], value[1]


def _scaled_tensors(stored: Stored, block: tuple[int, int] | None, kinds: set[str]) -> dict[str, TensorInfo]:
    names = [n for n, t in stored.items() if t.kind in kinds and n.endswith(".weight")]
    return {name: _info(name, stored[name], scaled_matrix(stored, name, block)) for name in names}


def _gptq(settings: Settings, stored: Stored) -> dict[str, TensorInfo]:
    if (bits := settings.integer("bits")) not in BITS:
        raise settings.refuse("bits", bits, f"supported: {' and '.join(map(str, BITS))}")
    form = settings.choice("checkpoint_format", "format", default="gptq", supported=GPTQ_FORMATS)
    settings.choice("pack_dtype", default="int32", supported=("int32",))
    ruled = bool(settings.values.get("dynamic") or settings.values.get("extra_config"))
    chosen = GptqSettings(settings.integer("group_size"), settings.flag("desc_act"), form == "gptq", ruled)
    return _modules(stored, ".qweight", lambda module: gptq_matrix(stored, module, chosen))


def _auto_round(settings: Settings, stored: Stored) -> dict[str, TensorInfo]:
    """AutoRound's own configs, which hold the tensors of GPTQ (its first version) or of AWQ."""
    packings = {"auto_round:auto_gptq": _gptq, "auto_round:auto_awq": _awq}
    packing = settings.choice("packing_format", default="auto_round:auto_gptq", supported=packings)
    return packings[packing](settings, stored)


def _awq(settings: Settings, stored: Stored) -> dict[str, TensorInfo]:
    if (bits := settings.integer("bits", "w_bit")) != AWQ_BITS:
        raise settings.refuse("bits", bits, f"supported: {AWQ_BITS}")
    settings.choice("version", "format", default="gemm", supported=("gemm",))
    size = settings.integer("group_size", "q_group_size")
    return _modules(stored, ".qweight", lambda module: awq_matrix(stored, module, size))


def _compressed(settings: Settings, stored: Stored) -> dict[str, TensorInfo]:
    groups = settings.values.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        raise settings.refuse("config_groups", groups, "it must be an object of groups")
    forms = {str(g["format"]) for g in groups.values() if g.get("format")}
    for form in sorted({settings.word("format", default="dense"), *forms}):
        if form not in COMPRESSED_FORMATS:
            raise settings.refuse("format", form, f"supported: {', '.join(COMPRESSED_FORMATS)}")
    sparsity = settings.values.get("sparsity_config") or {}
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise settings.refuse("sparsity_config.format", sparsity["format"], "supported: dense")
    weights = [g["weights"] for g in groups.values() if isinstance(g.get("weights"), dict)]
    blocks = {_block(settings, "config_groups.weights.block_structure", w.get("block_structure"))
              for w in weights} - {None}  # fmt: skip
    block = blocks.pop() if len(blocks) == 1 else None
    found = _scaled_tensors(stored, block, set(NUMBER_KINDS))
    packed = [name for name in stored if name.endswith(".weight_packed")]
    if packed:
        bits = _packed_bits(settings, weights)
        for name in packed:
            weight = name.removesuffix("_packed")
            found[weight] = _info(weight, stored[name], packed_matrix(stored, name, bits))
    return found


def _packed_bits(settings: Settings, weights: list[dict[str, Any]]) -> tuple[int, ...]:
    """Bits of packed levels; modules of several groups may have several."""
    bits = {w.get("num_bits") for w in weights if str(w.get("type", "int")) == "int"}
    if not bits or not bits <= set(BITS):
        shown = ", ".join(sorted(map(str, bits))) or "absent"
        raise settings.refuse("config_groups.weights.num_bits", shown, f"packed weights need one of {BITS}")
    return tuple(b for b in BITS if b in bits)


def _modules(stored: Stored, end: str, read: Callable[[str], Found]) -> dict[str, TensorInfo]:
    modules = [name.removesuffix(end) for name in stored if name.endswith(end)]
    return {f"{m}.weight": _info(f"{m}.weight", stored[m + end], read(m)) for m in modules}


def _info(name: str, levels: StoredTensor, found: Found) -> TensorInfo:
    shape, quantised = found
    nbytes = 4 * math.prod(shape)
    return TensorInfo(name, shape, TensorType.F32, levels.file, levels.offset, nbytes, quantised=quantised)
