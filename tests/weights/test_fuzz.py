"""Both readers on damaged files: ModelError or success, never anything else, and no large allocation."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rvllm.errors import ModelError
from rvllm.weights.open import open_checkpoint
from support.weights.model_files import LLAMA, gguf_bytes, llama_tensors, safetensors_of, write_directory
from support.weights.quantisers import CASES, file_of

GGUF = gguf_bytes(LLAMA | {"numbers": [1, 2, 3], "flag": True}, llama_tensors())
GGUF_HEADER = GGUF.index(b"blk.0.ffn_down.weight") + 60
SAFETENSORS = safetensors_of(
    {"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float16), "c": np.ones(1, np.int64)}
)
_RNG = np.random.default_rng(0)
QUANTISED = {  # small modules of each format: (config, file)
    name: (
        CASES[name][0],
        file_of(CASES[name][1]("a", _RNG.normal(size=(8, 32)).astype(np.float32), _RNG)[0]),
    )
    for name in ("fp8_blocks", "fp8_scalar", "gptq_desc_act", "awq", "packed_asymmetric")
}
SAFETENSORS_HEADER = 8 + int.from_bytes(SAFETENSORS[:8], "little")

INTERESTING = [0, 1, 0x7F, 0x80, 0xFF]

BUDGET = settings(
    max_examples=120,
    deadline=2000,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes, header: int) -> bytes:
    """A valid file with a few bytes changed, cut out or put in, and perhaps cut short."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(header, len(data)) - 1))
        kind = draw(st.sampled_from(["byte", "word", "delete", "insert", "copy"]))
        if kind == "byte":
            data[at] = draw(st.sampled_from(INTERESTING) | st.integers(0, 255))
        elif kind == "word":
            word = draw(st.sampled_from([0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 40, 1 << 32]))
            data[at : at + 8] = word.to_bytes(8, "little")
        elif kind == "delete":
            del data[at : at + draw(st.integers(1, 40))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=40))
        else:
            other = draw(st.integers(0, min(header, len(data)) - 1))
            data[at : at + 8] = data[other : other + 8]
        if not data:
            break
    if draw(st.booleans()):
        data = data[: draw(st.integers(0, len(data)))]
    return bytes(data)


def open_and_read(path: Path, size: int) -> None:
    """Opens the model and looks at everything in it, within a memory bound."""
    tracemalloc.start()
    try:
        checkpoint = open_checkpoint(path)
        for info in checkpoint.tensors.values():
            assert len(checkpoint.raw(info)) == info.nbytes
        for value in checkpoint.metadata.values():
            len(list(value)) if hasattr(value, "__len__") else value
    except ModelError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 100 * size + (1 << 20)


def test_the_seeds_are_valid(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(GGUF)
    assert len(open_checkpoint(tmp_path / "m.gguf").tensors) == 11
    (write_directory(tmp_path / "d", {}) / "model.safetensors").write_bytes(SAFETENSORS)
    assert len(open_checkpoint(tmp_path / "d").tensors) == 2


@BUDGET
@given(data=damaged(GGUF, GGUF_HEADER))
def test_gguf(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    open_and_read(path, len(data))


@BUDGET
@given(data=damaged(SAFETENSORS, SAFETENSORS_HEADER))
def test_safetensors(data: bytes, tmp_path: Path) -> None:
    write_directory(tmp_path / "d", {})
    (tmp_path / "d" / "model.safetensors").write_bytes(data)
    open_and_read(tmp_path / "d", len(data))


@settings(BUDGET, max_examples=40)
@pytest.mark.parametrize("name", QUANTISED)
@given(source=st.data())
def test_quantised(name: str, source: st.DataObject, tmp_path: Path) -> None:
    config, whole = QUANTISED[name]
    data = source.draw(damaged(whole, 8 + int.from_bytes(whole[:8], "little")))
    write_directory(tmp_path / "d", {}, {"quantization_config": config})
    (tmp_path / "d" / "model.safetensors").write_bytes(data)
    open_and_read(tmp_path / "d", len(data))


@pytest.mark.parametrize("whole", [GGUF[:GGUF_HEADER], SAFETENSORS], ids=["gguf", "safetensors"])
def test_every_cut(whole: bytes, tmp_path: Path) -> None:
    """Cut short anywhere, a file is refused."""
    folder = write_directory(tmp_path / "d", {})
    for end in range(0, len(whole) - 1, 3):
        path = folder / "model.safetensors" if whole is SAFETENSORS else tmp_path / "m.gguf"
        path.write_bytes(whole[:end])
        with pytest.raises(ModelError):
            open_checkpoint(folder if whole is SAFETENSORS else path)
