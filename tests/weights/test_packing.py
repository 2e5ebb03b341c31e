"""Checkpoint tensors become the weights a program declares."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from rvllm.errors import ModelError
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Part, Program, Weight
from rvllm.weights import packing
from rvllm.weights.checkpoint import Checkpoint, TensorType
from rvllm.weights.gguf.blocks import dequantise
from rvllm.weights.open import open_checkpoint
from rvllm.weights.packing import check_weights, dummy, pack, raw_parts, readable_parts
from support.models.fetched import model_path
from support.weights.model_files import (
    LLAMA,
    blocks,
    llama_tensors,
    safetensors_of,
    write_directory,
    write_gguf,
)


def arrays_in(folder: Path, **tensors: np.ndarray) -> Checkpoint:
    return open_checkpoint(write_directory(folder, tensors))


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def program_of(*weights: Weight) -> Program:
    return Program("Toy", DType.F32, 4, 8, (), (), weights, ())


def matrix(shape: tuple[int, ...], *parts: Part) -> Weight:
    return Weight("w", shape, parts, "matrix")


def test_parts_are_stacked(tmp_path: Path) -> None:
    a, b = random(3, 4), random(5, 4, seed=1)
    got = pack(matrix((8, 4), Part("a", (3, 4)), Part("b", (5, 4))), arrays_in(tmp_path, a=a, b=b), DType.F32)
    np.testing.assert_array_equal(got, np.concatenate([a, b]))


def test_layouts(tmp_path: Path) -> None:
    heads, dim, width = 3, 4, 8
    stored = random(heads * 3 * dim, width)
    grouped = random(2 * (3 + 2) * dim, width, seed=1)  # two kv heads of three queries each
    checkpoint = arrays_in(tmp_path, t=stored, g=grouped, bias=stored[:, 0].copy())
    whole = stored.shape
    got = pack(matrix(whole[::-1], Part("t", whole, "transposed")), checkpoint, DType.F32)
    np.testing.assert_array_equal(got, stored.T)
    split = stored.reshape(heads, 3, dim, width)
    wanted = np.concatenate([split[:, i].reshape(heads * dim, width) for i in range(3)])
    got = pack(matrix(whole, Part("t", whole, "head_qkv", heads)), checkpoint, DType.F32)
    np.testing.assert_array_equal(got, wanted)
    part = Part("bias", whole[:1], "head_qkv", heads)
    np.testing.assert_array_equal(pack(matrix(whole[:1], part), checkpoint, DType.F32), wanted[:, 0])
    groups = grouped.reshape(2, 5, dim, width)
    wanted = np.concatenate([p.reshape(-1, width) for p in (groups[:, :3], groups[:, 3], groups[:, 4])])
    part = Part("g", grouped.shape, "grouped_qkv", heads=2, head_dim=dim)
    np.testing.assert_array_equal(pack(matrix(grouped.shape, part), checkpoint, DType.F32), wanted)


def test_parts_of_heads_and_pairs(tmp_path: Path) -> None:
    heads, first, count, width = 3, 5, 4, 6
    stored, bias = random(heads * 9, width), random(10, seed=1)
    checkpoint = arrays_in(tmp_path, t=stored, bias=bias)
    each = stored.reshape(heads, 9, width)[:, first : first + count]
    for layout, wanted in (("head_rows", each), ("head_columns", each.swapaxes(1, 2))):
        part = Part("t", stored.shape, layout, heads, rows=(first, count), prepared="ready")  # type: ignore[arg-type]
        weight = Weight("w", wanted.shape, (part,), "stack")
        assert part.elements == weight.elements
        check_weights(program_of(weight), checkpoint)
        np.testing.assert_array_equal(pack(weight, checkpoint, DType.F32), wanted)
        np.testing.assert_array_equal(pack(weight, checkpoint, DType.F16), wanted.astype(np.float16))
        ready = arrays_in(tmp_path / layout, ready=np.ascontiguousarray(wanted))
        check_weights(program_of(weight), ready)
        np.testing.assert_array_equal(pack(weight, ready, DType.F32), wanted)
    pairs = Part("bias", bias.shape, "pairs")
    np.testing.assert_array_equal(
        pack(Weight("b", bias.shape, (pairs,), "vector"), checkpoint, DType.F32),
        np.concatenate([bias[::2], bias[1::2]]),
    )


@pytest.mark.parametrize("dtype", [DType.F32, DType.F16, DType.BF16])
def test_columns(dtype: DType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "TASK", 13)
    stored = random(11, 12)
    checkpoint = arrays_in(tmp_path, t=stored)
    parts = [Part("t", stored.shape, "columns", columns=(first, 4)) for first in (0, 4, 8)]
    weight = Weight("w", (3, 11, 4), tuple(parts), "stack")
    assert sum(p.elements for p in parts) == weight.elements
    check_weights(program_of(weight), checkpoint)
    wanted = stored.reshape(11, 3, 4).swapaxes(0, 1)
    np.testing.assert_array_equal(pack(weight, checkpoint, dtype), wanted.astype(dtype.numpy))
    raw = raw_parts(weight, checkpoint)
    np.testing.assert_array_equal([r.data.copy().view(np.float32) for r in raw], wanted)
    assert all(r.width == 4 for r in raw)
    shifted = Weight("w", (11, 4), (replace(parts[1], add=1.0),), "matrix")
    np.testing.assert_array_equal(
        pack(shifted, checkpoint, dtype), (wanted[1] + np.float32(1)).astype(dtype.numpy)
    )


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q6_K"])
def test_columns_of_quantised_tensors(kind: str, tmp_path: Path) -> None:
    """Whole blocks stay as they are; columns that cut a block come as the numbers they stand for."""
    rows, width = 9, 1024
    data = blocks(kind, rows, width)
    tensors = llama_tensors() | {"blk.0.ffn_down.weight": (kind, (rows, width), data)}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", LLAMA, tensors))
    name = "model.layers.0.mlp.down_proj.weight"
    wanted = dequantise(TensorType(kind), np.frombuffer(data, np.uint8), (rows, width))
    for first, count in ((0, 512), (512, 256), (256, 768), (96, 416), (24, 500)):
        weight = matrix((rows, count), Part(name, (rows, width), "columns", columns=(first, count)))
        cut = wanted[:, first : first + count]
        np.testing.assert_array_equal(pack(weight, checkpoint, DType.F32), cut)
        np.testing.assert_array_equal(
            pack(weight, checkpoint, DType.BF16).astype(np.float32),
            cut.astype(ml_dtypes.bfloat16).astype(np.float32),
        )
        (raw,) = readable_parts(weight, checkpoint)
        whole = first % TensorType(kind).block[0] == 0 == count % TensorType(kind).block[0]
        assert raw.type is (TensorType(kind) if whole else TensorType.F32) and raw.width == count
        back = dequantise(raw.type, np.ascontiguousarray(raw.data).reshape(-1), (rows, count))
        np.testing.assert_array_equal(back, cut)
        if not whole:
            with pytest.raises(ModelError, match=f"cannot be used in its stored form {kind}"):
                raw_parts(weight, checkpoint)


def test_alternatives_and_constants(tmp_path: Path) -> None:
    norm = random(6)
    weight = Weight("n", (6,), (Part("x", (6,), add=1.0, alternatives=("y", "norm")),), "vector")
    checkpoint = arrays_in(tmp_path, norm=norm)
    np.testing.assert_array_equal(pack(weight, checkpoint, DType.F32), norm + np.float32(1))
    got = pack(weight, checkpoint, DType.BF16)
    np.testing.assert_array_equal(got, (norm + np.float32(1)).astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("wanted", [DType.F32, DType.F16, DType.BF16])
@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_conversions(stored: Any, wanted: DType, tmp_path: Path) -> None:
    folder = write_directory(tmp_path, {})
    numbers = random(40, 1000).astype(stored)
    plain = numbers.view(np.uint16) if stored is ml_dtypes.bfloat16 else numbers
    (folder / "model.safetensors").write_bytes(safetensors_of({"a": plain}))
    got = pack(matrix((40, 1000), Part("a", (40, 1000))), open_checkpoint(folder), wanted)
    assert got.dtype == wanted.numpy
    np.testing.assert_array_equal(got, numbers.astype(np.float32).astype(wanted.numpy))


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    checkpoint = arrays_in(tmp_path, a=np.array([[1.0, 1e6]], dtype=np.float32))
    weight = matrix((1, 2), Part("a", (1, 2)))
    assert np.isfinite(pack(weight, checkpoint, DType.BF16).astype(np.float32)).all()
    with pytest.raises(ModelError, match="tensor a holds numbers too large for float16"):
        pack(weight, checkpoint, DType.F16)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_quantised_and_permuted(
    kind: str, dtype: DType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in many small pieces over threads, whose seams must not show."""
    monkeypatch.setattr(packing, "TASK", 700)
    rows, width = 36, 512
    data = blocks(kind, rows, width)
    metadata = LLAMA | {"llama.attention.head_count": 3, "llama.attention.head_count_kv": 1}
    tensors = llama_tensors() | {"blk.0.attn_q.weight": (kind, (rows, width), data)}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", metadata, tensors))
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = matrix((rows, width), Part(name, (rows, width)))
    stored = dequantise(TensorType(kind), np.frombuffer(data, np.uint8), (rows, width))
    wanted = stored.reshape(3, 6, 2, width).swapaxes(1, 2).reshape(rows, width)
    np.testing.assert_array_equal(pack(weight, checkpoint, dtype), wanted.astype(dtype.numpy))
    (raw,) = raw_parts(weight, checkpoint)
    assert raw.type is TensorType(kind) and raw.width == width and raw.data.shape[0] == rows
    back = dequantise(raw.type, raw.data.reshape(-1), (rows, width))
    np.testing.assert_array_equal(back, wanted)


def test_raw_parts_are_views_where_they_can_be(tmp_path: Path) -> None:
    checkpoint = arrays_in(tmp_path, a=random(3, 4))
    (raw,) = raw_parts(matrix((3, 4), Part("a", (3, 4))), checkpoint)
    assert np.shares_memory(raw.data, checkpoint.raw(checkpoint.tensors["a"]))
    with pytest.raises(ModelError, match="tensor a cannot be used in its stored form F32"):
        raw_parts(matrix((4, 3), Part("a", (3, 4), "transposed")), checkpoint)


def test_check_weights_names_what_is_wrong(tmp_path: Path) -> None:
    checkpoint = arrays_in(tmp_path, a=random(3, 4), i=np.arange(3), conv=random(3, 1, 4))
    good = matrix((3, 4), Part("a", (3, 4)))
    squeezed = matrix((3, 4), Part("conv", (3, 4)))
    check_weights(program_of(good, squeezed), checkpoint)
    bad = [matrix((1, 1), Part(f"m{i}", (1, 1))) for i in range(6)]
    with pytest.raises(ModelError) as caught:
        check_weights(
            program_of(matrix((4, 3), Part("a", (4, 3))), matrix((3,), Part("i", (3,))), *bad), checkpoint
        )
    message = str(caught.value)
    assert (
        "does not hold the weights of a Toy: a has shape [3, 4] instead of [4, 3]; i has type I64" in message
    )
    assert "m0 is missing" in message and "m3" not in message and message.endswith("and 3 more")
    assert str(tmp_path) in message and "\n" not in message


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_bias_that_nothing_reads_is_refused_unless_it_is_zero(dtype: Any, tmp_path: Path) -> None:
    zeros, odd = np.array([0.0, -0.0, 0.0], dtype), np.array([0.0, 0.0, 1e-4], dtype)
    weight = matrix((3, 4), Part("a.weight", (3, 4)))
    for name in ("fine", "odd"):
        (tmp_path / name).mkdir()
    given = {"a.weight": random(3, 4), "b.bias": odd}  # b is of a module that nothing reads
    check_weights(program_of(weight), arrays_in(tmp_path / "fine", **given, **{"a.bias": zeros}))
    checkpoint = arrays_in(tmp_path / "odd", **given, **{"a.bias": odd})
    with pytest.raises(ModelError, match=r"a\.bias is there, and the config asks for no bias$"):
        check_weights(program_of(weight), checkpoint)
    biased = Weight("bias", (3,), (Part("a.bias", (3,)),), "vector")
    check_weights(program_of(weight, biased), checkpoint)


def test_check_weights_names_a_tensor_of_several_parts_once(tmp_path: Path) -> None:
    parts = [Part("m", (4, 6), "columns", columns=(first, 3)) for first in (0, 3)]
    with pytest.raises(ModelError, match=r"of a Toy: m is missing$"):
        check_weights(
            program_of(Weight("w", (2, 4, 3), tuple(parts), "stack")), arrays_in(tmp_path, a=random(1))
        )


def test_check_weights_without_any(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds no weights that can be read.*--load-format dummy"):
        check_weights(program_of(), open_checkpoint(tmp_path))


@pytest.mark.models
def test_a_real_model_packs_fast() -> None:
    """All of SmolLM2's 135 million weights, dequantised, in a few times what writing as many takes."""
    checkpoint = open_checkpoint(model_path("smollm2-135m"))
    weights = [matrix(info.shape, Part(name, info.shape)) for name, info in checkpoint.tensors.items()]
    ratios = []
    for _ in range(3):
        start = time.perf_counter()
        written = [np.full(weight.shape, 0.5, np.float32) for weight in weights]
        floor = time.perf_counter() - start
        del written
        start = time.perf_counter()
        packed = [pack(weight, checkpoint, DType.F32) for weight in weights]
        ratios.append((time.perf_counter() - start) / floor)
        assert sum(p.size for p in packed) == 134_515_008
        del packed
    assert min(ratios) < 6  # 2 on two cores, quiet or not


def test_dummy_weights() -> None:
    weight = Weight("layers.0.qkv", (1200, 1000), (Part("q.weight", (1200, 1000)),), "matrix")
    first = dummy(weight, 1)
    assert first.shape == (1200, 1000) and abs(first.std() - 0.02) < 1e-3 and abs(first.mean()) < 1e-3
    np.testing.assert_array_equal(first, dummy(weight, 1))
    assert not np.array_equal(first, dummy(weight, 2))
    other = Weight("layers.1.qkv", weight.shape, weight.parts, "matrix")
    assert not np.array_equal(first, dummy(other, 1))
    assert len(np.unique(first[:, 0])) > 1000  # the run repeats, the rows do not
    norm = Weight("norm", (64,), (Part("model.norm.weight", (64,)),), "vector")
    assert abs(dummy(norm, 0).mean() - 1) < 0.05
    assert dummy(norm, 0, DType.BF16).dtype == DType.BF16.numpy
    gemma = Weight(
        "norm", (64,), (Part("model.norm.weight", (64,), add=1.0),), "vector"
    )  # 1 + w is what is packed
    heads = Weight(
        "q", (64,), tuple(Part(f"q_layernorm.norms.{i}.weight", (16,)) for i in range(4)), "vector"
    )
    assert abs(dummy(gemma, 0).mean() - 1) < 0.05 and abs(dummy(heads, 0).mean() - 1) < 0.05
    bias = Weight("b", (64,), (Part("model.norm.bias", (64,)),), "vector")
    assert abs(dummy(bias, 0).mean()) < 0.05
