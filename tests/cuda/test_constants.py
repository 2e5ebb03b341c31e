"""Sizes that the CUDA sources define are read from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from rvllm.backends.base import KV_BLOCK
from rvllm.kernels import constants as module
from rvllm.kernels.constants import constants


def test_constants_are_those_of_the_file_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SOURCES", tmp_path)
    (tmp_path / "a.cuh").write_text(
        "inline constexpr int TILE = 64;  // rows\n"
        "inline constexpr int HALF = TILE / 2, BYTES = (HALF + 8) * 2 - 1, LOST = -2;\n"
        "inline constexpr int OTHERS = ELSEWHERE + 1;\n"
        "__device__ constexpr int twice(int x) { return 2 * x; }\n"
        "inline constexpr int CALLED = twice(2);\n"
        "struct Inner {\n  constexpr int HIDDEN = 5;\n};\n"
    )
    assert constants("a.cuh") == {"TILE": 64, "HALF": 32, "BYTES": 79, "LOST": -2}


def test_every_device_has_the_blocks_that_the_kernels_read() -> None:
    assert constants("attention/kv_block.cuh") == {"KV_BLOCK": KV_BLOCK} == {"KV_BLOCK": 16}
    sizes = constants("attention/attention.cuh")
    assert (sizes["TILE"], sizes["SPLIT"], sizes["PAD"]) == (64, 256, 8)
