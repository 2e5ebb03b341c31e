"""Quantised safetensors checkpoints: numbers are what their formulas say, wrong files are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rvllm.errors import ModelError
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Part, Weight
from rvllm.weights.checkpoint import Checkpoint
from rvllm.weights.open import open_checkpoint
from rvllm.weights.packing import pack, raw_parts
from support.weights.model_files import refused
from support.weights.quantisers import (
    AUTO_ROUND,
    AWQ,
    CASES,
    FP8,
    GPTQ,
    MIXED_BITS,
    Quantiser,
    Tensors,
    awq,
    compressed,
    file_of,
    fp8_blocks,
    fp8_whole,
    gptq,
    packed,
)


def write(folder: Path, quantisation: dict[str, Any] | None, tensors: Tensors) -> Path:
    folder.mkdir(exist_ok=True)
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"]}
    if quantisation is not None:
        config["quantization_config"] = quantisation
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(file_of(tensors))
    return folder


def opened(folder: Path, quantisation: dict[str, Any] | None, tensors: Tensors) -> Checkpoint:
    return open_checkpoint(write(folder, quantisation, tensors))


def numbers(checkpoint: Checkpoint, name: str) -> np.ndarray:
    info = checkpoint.tensors[name]
    raw = checkpoint.raw(info)
    assert raw.nbytes == info.nbytes
    return raw.view(np.float32).reshape(info.shape)


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_the_formulas(case: str, tmp_path: Path) -> None:
    quantisation, quantise = CASES[case]
    rng = np.random.default_rng(len(case))
    wide = rng.normal(size=(136, 48)).astype(np.float32) * np.float32(
        0.1
    )  # several threads' rows, odd blocks
    tall = rng.normal(size=(24, 160)).astype(np.float32)
    tensors, wanted = quantise("a", wide, rng)
    more, other = quantise("m.b", tall, rng)
    checkpoint = opened(tmp_path, quantisation, {**tensors, **more, "n.weight": ("F32", tall[0])})
    np.testing.assert_array_equal(numbers(checkpoint, "a.weight"), wanted)
    np.testing.assert_array_equal(numbers(checkpoint, "m.b.weight"), other)
    np.testing.assert_array_equal(numbers(checkpoint, "n.weight"), tall[0])
    close = 0.2 if "one_group" in case else 0.12
    assert (
        np.abs(wanted - wide)[1:].max() < close * np.abs(wide).max()
    )  # the quantiser itself is none too bad
    info = checkpoint.tensors["a.weight"]
    stored = sum(
        t.nbytes
        for n, (_, t) in tensors.items()
        if not n.endswith(("g_idx", "shape", "input_scale", "input_zero_point"))
        and (t.any() or not n.endswith("weight_zero_point"))
    )
    assert info.stored_nbytes == stored < wide.nbytes * 0.45
    assert ("GPTQ" in info.stored_as, "AWQ" in info.stored_as) == ("gptq" in case, "awq" in case)


def test_all_codes_of_e4m3(tmp_path: Path) -> None:
    import ml_dtypes

    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    one = np.ones((), np.float32)
    checkpoint = opened(tmp_path, FP8, {"a.weight": ("F8_E4M3", codes), "a.weight_scale": ("F32", one)})
    wanted = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(numbers(checkpoint, "a.weight"), wanted)
    assert np.isnan(wanted).sum() == 2


def test_fp8_without_a_config_goes_by_its_tensors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors, wanted = CASES["fp8_scalar"][1]("a", rng.normal(size=(8, 16)).astype(np.float32), rng)
    np.testing.assert_array_equal(numbers(opened(tmp_path, None, tensors), "a.weight"), wanted)


@pytest.mark.parametrize(
    ("name", "settings", "quantise"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 16, "desc_act": False, "sym": True}, gptq(4, 16)),
        (
            "quant_config.json",
            {"zero_point": True, "q_group_size": 16, "w_bit": 4, "version": "GEMM"},
            awq(16),
        ),
        (
            "hf_quant_config.json",
            {
                "producer": {"name": "modelopt"},
                "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]},
            },
            fp8_whole(()),
        ),
    ],
)
def test_older_checkpoints_have_a_file_of_their_own(
    name: str, settings: dict[str, Any], quantise: Any, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    tensors, wanted = quantise("a", rng.normal(size=(16, 32)).astype(np.float32), rng)
    folder = write(tmp_path, None, tensors)
    (folder / name).write_text(json.dumps(settings))
    np.testing.assert_array_equal(numbers(open_checkpoint(folder), "a.weight"), wanted)


RULED = GPTQ | {"bits": 4, "group_size": 16, "dynamic": {r"+:.*\.b$": {"bits": 8, "group_size": 8}}}


@pytest.mark.parametrize(
    ("quantisation", "first", "second"),
    [
        (RULED, gptq(4, 16), gptq(8, 8)),
        (RULED, gptq(4, 16), gptq(4, -1)),
        (AUTO_ROUND | {"extra_config": {"m.b": {"bits": 8, "group_size": 8}}}, gptq(4, 16), gptq(8, 8)),
        (MIXED_BITS, packed(4, 16), packed(8, 8, symmetric=False)),
        (MIXED_BITS, packed(8, 32), packed(4, 4)),
    ],
    ids=["bits_and_group", "one_group", "extra_config", "packed_4_8", "packed_8_4"],
)
def test_modules_may_have_bits_and_groups_of_their_own(
    quantisation: dict[str, Any], first: Quantiser, second: Quantiser, tmp_path: Path
) -> None:
    rng = np.random.default_rng(6)
    tensors, wanted = first("a", rng.normal(size=(16, 32)).astype(np.float32), rng)
    more, other = second("m.b", rng.normal(size=(24, 64)).astype(np.float32), rng)
    checkpoint = opened(tmp_path, quantisation, tensors | more)
    np.testing.assert_array_equal(numbers(checkpoint, "a.weight"), wanted)
    np.testing.assert_array_equal(numbers(checkpoint, "m.b.weight"), other)


def test_packed_rows_may_end_within_a_word(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    tensors, wanted = packed(4, 12)("a", rng.normal(size=(16, 36)).astype(np.float32), rng)
    assert tensors["a.weight_packed"][1].shape == (16, 5)
    checkpoint = opened(tmp_path, compressed("pack-quantized", type="int", num_bits=4), tensors)
    np.testing.assert_array_equal(numbers(checkpoint, "a.weight"), wanted)


def test_scales_of_keys_and_values_are_left_aside(tmp_path: Path) -> None:
    """ModelOpt's and llm-compressor's ways of saying that the cache was calibrated, and nothing else."""
    plain: Tensors = {
        "a.weight": ("F32", np.ones((4, 8), np.float32)),
        "a.k_scale": ("F32", np.ones(1, np.float32)),
    }
    only_cache = {
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"},
        "quant_method": "modelopt",
    }
    scheme = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {},
              "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"}}  # fmt: skip
    for place, quantisation in (("modelopt", only_cache), ("compressed", scheme)):
        assert opened(tmp_path / place, quantisation, plain).tensors["a.weight"].quantised is None


def test_a_module_may_lie_in_several_shards(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    tensors, wanted = gptq(4, 16)("a", rng.normal(size=(16, 32)).astype(np.float32), rng)
    folder = write(tmp_path, GPTQ | {"bits": 4, "group_size": 16}, {})
    (folder / "model.safetensors").unlink()
    where = {name: f"model-{i + 1:05d}-of-{len(tensors):05d}.safetensors" for i, name in enumerate(tensors)}
    for name, file in where.items():
        (folder / file).write_bytes(file_of({name: tensors[name]}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    np.testing.assert_array_equal(numbers(open_checkpoint(folder), "a.weight"), wanted)


def test_a_config_alone_needs_no_format_that_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path, {"quant_method": "bitsandbytes"}, {})
    (folder / "model.safetensors").unlink()
    assert open_checkpoint(folder).tensors == {}


def test_a_zero_of_nought_in_the_first_version(tmp_path: Path) -> None:
    """Stored as -1 modulo 16; it must come back as 0, not 16."""
    tensors: Tensors = {
        "a.qweight": ("I32", np.full((1, 8), 0x33333333, np.int32)),
        "a.qzeros": ("I32", np.full((1, 1), 0xFFFFFFFF, np.uint32).view(np.int32)),
        "a.scales": ("F16", np.full((1, 8), 0.5, np.float16)),
    }
    checkpoint = opened(tmp_path, GPTQ | {"bits": 4, "group_size": -1}, tensors)
    np.testing.assert_array_equal(numbers(checkpoint, "a.weight"), np.full((8, 8), 1.5, np.float32))


def test_parts_are_packed_like_those_of_a_plain_model(tmp_path: Path) -> None:
    quantisation, quantise = CASES["gptq"]
    rng = np.random.default_rng(2)
    tensors, first = quantise("a", rng.normal(size=(16, 32)).astype(np.float32), rng)
    more, second = quantise("b", rng.normal(size=(8, 32)).astype(np.float32), rng)
    checkpoint = opened(tmp_path, quantisation, {**tensors, **more})
    both = Weight("w", (24, 32), (Part("a.weight", (16, 32)), Part("b.weight", (8, 32))), "matrix")
    np.testing.assert_array_equal(pack(both, checkpoint, DType.F32), np.concatenate([first, second]))
    half = pack(both, checkpoint, DType.F16)
    np.testing.assert_array_equal(half, np.concatenate([first, second]).astype(np.float16))
    rows = np.concatenate([p.data.reshape(-1).view(np.float32) for p in raw_parts(both, checkpoint)])
    np.testing.assert_array_equal(rows.reshape(24, 32), np.concatenate([first, second]))
    turned = Weight("t", (32, 16), (Part("a.weight", (16, 32), "transposed"),), "matrix")
    np.testing.assert_array_equal(pack(turned, checkpoint, DType.F32), first.T)


@pytest.mark.parametrize(
    ("quantisation", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "quant_method 'bitsandbytes' is not supported; supported: fp8",
        ),
        ({"load_in_4bit": True}, "quant_method 'none' is not supported"),
        (GPTQ | {"bits": 3, "group_size": 16}, "bits 3 is not supported; supported: 4 and 8"),
        (GPTQ | {"bits": "4", "group_size": 16}, "bits '4' is not supported; it must be a whole number"),
        (GPTQ | {"bits": 4}, "quantization_config has no group_size"),
        (GPTQ | {"bits": 4, "group_size": 16, "desc_act": "no"}, "desc_act 'no' is not supported"),
        (GPTQ | {"bits": 4, "group_size": 16, "checkpoint_format": "marlin"}, "'marlin' is not supported"),
        (AWQ | {"bits": 8, "group_size": 16}, "bits 8 is not supported; supported: 4"),
        (AWQ | {"group_size": 16, "version": "gemv"}, "version 'gemv' is not supported; supported: gemm"),
        (GPTQ | {"bits": 4, "group_size": 16, "pack_dtype": "int8"}, "pack_dtype 'int8' is not supported"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo 'nvfp4' is not supported"),
        (
            {"quantization": {"quant_algo": "MIXED_PRECISION"}},
            "quant_algo 'mixed_precision' is not supported",
        ),
        ({"quant_method": "mxfp4"}, "quant_method 'mxfp4' is not supported"),
        (AUTO_ROUND | {"packing_format": "auto_round:exllamav2"}, "packing_format 'auto_round:exllamav2'"),
        (AUTO_ROUND | {"bits": 2}, "bits 2 is not supported; supported: 4 and 8"),
        (FP8 | {"fmt": "e5m2"}, "fmt 'e5m2' is not supported; supported: e4m3"),
        (FP8 | {"weight_block_size": [128]}, "weight_block_size"),
        (FP8 | {"weight_block_size": [0, 128]}, "weight_block_size"),
        (FP8 | {"weight_block_size": "128xmany"}, "weight_block_size"),
        (compressed("nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized' is not supported"),
        ({"quant_method": "compressed-tensors", "config_groups": []} | {"format": "marlin-24"}, "marlin-24"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": 1}}, "config_groups"),
        (
            compressed("dense") | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config.format",
        ),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(quantisation: dict[str, Any], message: str, tmp_path: Path) -> None:
    tensors: Tensors = {"n.weight": ("F32", np.ones(3, np.float32))}
    assert message in refused(write(tmp_path, quantisation, tensors), r"config\.json: quantization_config")


def test_quantisation_must_be_an_object(tmp_path: Path) -> None:
    folder = write(tmp_path, None, {"n.weight": ("F32", np.ones(3, np.float32))})
    (folder / "config.json").write_text('{"quantization_config": "fp8"}')
    refused(folder, "quantization_config must be an object")


def without(tensors: Tensors, name: str) -> Tensors:
    return {n: t for n, t in tensors.items() if n != name}


def broken() -> list[Any]:
    """(id, quantization_config, tensors, message)"""
    rng = np.random.default_rng(3)
    matrix = rng.normal(size=(16, 32)).astype(np.float32)
    block = FP8 | {"weight_block_size": [8, 8]}
    group = GPTQ | {"bits": 4, "group_size": 16}
    four = compressed("pack-quantized", type="int", num_bits=4)
    f, g, g8, a, p = (
        q("a", matrix, rng)[0] for q in (fp8_blocks(8, 8), gptq(4, 16), gptq(4, 8), awq(16), packed(4, 16))
    )
    ordered = gptq(4, 16, desc_act=True)("a", matrix, rng)[0]
    wrong_order = ordered | {"a.g_idx": ("I32", np.full(32, 2, np.int32))}
    rows = np.ones((16, 1), np.float32)
    int8: Tensors = {
        "a.weight": ("I8", np.ones((16, 32), np.int8)),
        "a.weight_scale": ("F32", rows),
        "a.weight_zero_point": ("I8", np.ones((16, 2), np.int8)),
    }
    two_bits = g | {"a.qzeros": ("I32", np.ones((2, 1), np.int32))}
    return [
        ("fp8_no_scale", block, without(f, "a.weight_scale_inv"), "a.weight is F8_E4M3 and has no scales"),
        ("fp8_misfit", FP8 | {"weight_block_size": [8, 4]}, f, "blocks? of 8 x 4|a block of 8 x 4"),
        (
            "fp8_integers",
            block,
            f | {"a.weight_scale_inv": ("I32", np.ones((2, 4), np.int32))},
            "must be F32 or",
        ),
        ("fp8_vector", block, f | {"a.weight": ("F8_E4M3", np.ones(4, np.uint8))}, "not that of a matrix"),
        ("gptq_no_scales", group, without(g, "a.scales"), "a.scales is missing, a.qweight cannot be read"),
        ("gptq_no_zeros", group, without(g, "a.qzeros"), "a.qzeros is missing"),
        ("gptq_no_order", group | {"desc_act": True}, without(ordered, "a.g_idx"), "a.g_idx is missing"),
        ("gptq_zeros", group, g | {"a.qzeros": ("I32", np.ones((1, 3), np.int32))}, "must be I32 of shape"),
        ("gptq_groups", group, g8, "scales of a are of 4 groups, but 32 inputs in groups of 16 are 2"),
        (
            "gptq_apart",
            group,
            g | {"a.scales": ("F16", np.ones((2, 8), np.float16))},
            "do not belong together",
        ),
        (
            "gptq_empty",
            group,
            g | {"a.scales": ("F16", np.ones((0, 16), np.float16))},
            "do not belong together",
        ),
        (
            "gptq_odd",
            group,
            g
            | {
                "a.qweight": ("I32", np.ones((4, 6), np.int32)),
                "a.scales": ("F16", np.ones((2, 6), np.float16)),
            },
            "zeros of 6 outputs do not fill",
        ),
        ("gptq_floats", group, g | {"a.qweight": ("F32", np.ones((4, 16), np.float32))}, "a.qweight is F32"),
        ("gptq_order", group | {"desc_act": True}, wrong_order, "names a group that is not there"),
        ("awq_no_scales", AWQ | {"group_size": 16}, without(a, "a.scales"), "a.scales is missing"),
        ("awq_groups", AWQ | {"group_size": 8}, a, r"a.scales is F16 of shape \[2, 16\].* \[4, 16\]"),
        (
            "awq_vector",
            AWQ | {"group_size": 8},
            a | {"a.qweight": ("I32", np.ones(4, np.int32))},
            "of a matrix",
        ),
        ("packed_no_scale", four, without(p, "a.weight_scale"), "a.weight_scale is missing"),
        (
            "packed_bits",
            compressed("pack-quantized", type="int", num_bits=3),
            p,
            "num_bits '3' is not supported",
        ),
        (
            "packed_zero",
            four,
            p | {"a.weight_zero_point": ("I32", np.ones((9, 2), np.int32))},
            "zero_point is I32",
        ),
        ("int8_zero", compressed("int-quantized", type="int", num_bits=8), int8, "weight_zero_point is I8"),
        ("gptq_two_bits", RULED, two_bits, "module a is quantised to 2 bits; supported: 4 and 8"),
        (
            "gptq_ruled",
            RULED,
            g | {"a.scales": ("F16", np.ones((3, 16), np.float16))},
            "qzeros is I32 of shape",
        ),
        (
            "mixed_no_shape",
            MIXED_BITS,
            without(p, "a.weight_shape"),
            "a.weight_shape is missing; .* 4 or 8 bits",
        ),
        (
            "packed_shape",
            four,
            p | {"a.weight_shape": ("I64", np.array([16, 40], np.int64))},
            r"says \[16, 40\], which words of shape \[16, 4\] do not hold with 4 bits",
        ),
        (
            "shape_floats",
            four,
            p | {"a.weight_shape": ("F32", np.ones(2, np.float32))},
            "integers must be there",
        ),
    ]


@pytest.mark.parametrize(
    ("quantisation", "tensors", "message"), [pytest.param(*c, id=i) for i, *c in broken()]
)
def test_what_is_missing_or_does_not_fit_is_named(
    quantisation: dict[str, Any], tensors: Tensors, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        numbers(opened(tmp_path, quantisation, tensors), "a.weight")
    assert "model.safetensors" in str(caught.value) or "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)
