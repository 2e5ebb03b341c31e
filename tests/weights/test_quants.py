"""Every stored type becomes the same float32 numbers as with the `gguf` package, bit for bit."""

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from rvllm.weights.checkpoint import TensorType
from rvllm.weights.gguf.blocks import PIECE, dequantise, dequantise_into, stored_nbytes
from support.weights.random_blocks import random_blocks

BLOCKED = [t for t in TensorType if t.block[0] > 1]
QUANTISED = [t for t in BLOCKED if not t.value.endswith("K") and not t.value.startswith("IQ")]


def test_random_blocks_have_awkward_scales() -> None:
    scales = random_blocks(TensorType.Q8_0, 64, 256, seed=0)[:, :2].copy().view(np.float16)
    small = np.abs(scales) < np.finfo(np.float16).smallest_normal
    assert (small & (scales != 0)).sum() > 50 and (scales == 0).sum() > 50 and (scales < 0).sum() > 50


@pytest.mark.parametrize("kind", BLOCKED, ids=lambda k: k.value)
@pytest.mark.parametrize("rows,width", [(1, 256), (3, 512), (7, PIECE // 4)])
def test_blocks_match_gguf(kind: TensorType, rows: int, width: int) -> None:
    blocks = random_blocks(kind, rows, width, seed=rows)
    wanted = dequantize(blocks.reshape(rows, -1), gguf.GGMLQuantizationType[kind.value])
    got = dequantise(kind, blocks.reshape(-1), (rows, width))
    assert got.shape == (rows, width)
    np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda k: k.value)
def test_quantised_numbers_come_back(kind: TensorType) -> None:
    numbers = np.random.default_rng(0).normal(size=(5, 256)).astype(np.float32)
    stored = quantize(numbers, gguf.GGMLQuantizationType[kind.value])
    assert stored.nbytes == stored_nbytes(kind, numbers.shape)
    error = np.abs(dequantise(kind, stored.reshape(-1), numbers.shape) - numbers).max()
    assert error < (1.0 if kind is TensorType.MXFP4 else 0.5)  # its numbers near 6 are 2 apart


@pytest.mark.parametrize("kind", BLOCKED, ids=lambda k: k.value)
def test_block_sizes_are_ggmls(kind: TensorType) -> None:
    assert kind.block == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.value]]


def test_plain_types() -> None:
    import ml_dtypes

    numbers = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)
    for kind, dtype in (("F32", np.float32), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16)):
        stored = numbers.astype(dtype)
        got = dequantise(TensorType(kind), stored.reshape(-1).view(np.uint8), (3, 5))
        np.testing.assert_array_equal(got, stored.astype(np.float32))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [t for t in BLOCKED if t is not TensorType.MXFP4], ids=lambda k: k.value)
def test_a_scale_that_is_no_number(kind: TensorType) -> None:
    blocks = np.full(2 * kind.block[1], 0xFF, dtype=np.uint8)  # 0xFFFF is a float16 nan
    assert np.isnan(dequantise(kind, blocks, (2, kind.block[0]))).all()


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="Q4_0"):
        dequantise_into(TensorType.Q4_0, np.zeros(17, np.uint8), np.zeros(32, np.float32))
    with pytest.raises(ValueError, match="whole Q4_K blocks"):
        stored_nbytes(TensorType.Q4_K, (2, 128))
