"""Whole tiny models out of quantised checkpoints: the logits of a plain model with the same numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rvllm.backends.cpu.compiled.library import missing
from rvllm.cli.main import main
from rvllm.errors import ModelError
from support.models import archs_moe_tiny, archs_tiny, tiny
from support.weights.quantisers import (
    AWQ,
    FP8,
    GPTQ,
    Quantiser,
    awq,
    compressed,
    fp8_blocks,
    gptq,
    packed,
    save_quantised,
)

PLAIN = ("embed", "lm_head", "norm", "mlp.gate.weight", "block_sparse_moe.gate.weight", "bias")
GROUP = 8
METHODS: dict[str, tuple[dict[str, Any], Quantiser, str]] = {
    "fp8": (FP8 | {"weight_block_size": [16, 16]}, fp8_blocks(16, 16), "FP8, blocks of 16 x 16"),
    "gptq": (
        GPTQ | {"bits": 4, "group_size": GROUP, "desc_act": True}, gptq(4, GROUP, desc_act=True), "GPTQ 4-bit"
    ),
    "awq": (AWQ | {"group_size": GROUP}, awq(GROUP), "AWQ 4-bit"),
    "packed": (compressed("pack-quantized", type="int", num_bits=4), packed(4, GROUP), "packed 4-bit"),
}  # fmt: skip
MODELS = {  # how many matrices of it are quantised
    "granite": 14,  # joined here
    "phi3_long": 8,  # fused in the file
    "mixtral": 2 * (4 + 3 * 8),  # experts one by one
    "deepseek_v3": 3 * 5 + 3 + 2 * 3 * (12 + 1),  # latent attention: rows by head, and turned
}


def quantised(
    path: Path, name: str, quantisation: dict[str, Any], quantise: Quantiser
) -> tuple[Path, Path, int]:
    """The model as quantised and as plain checkpoint, and how many matrices are quantised."""
    config = (archs_tiny.CASES | archs_moe_tiny.CASES)[name].config
    if "moe_intermediate_size" in config:
        config = config | {"moe_intermediate_size": 24}  # words hold whole runs of eight

    def wanted(tensor: str, numbers: np.ndarray) -> bool:
        fits = numbers.ndim == 2 and numbers.shape[0] % 8 == 0 and numbers.shape[1] % GROUP == 0
        return fits and not any(part in tensor for part in PLAIN)

    numbers = archs_tiny.random_tensors(name, config)
    plain = save_quantised(path / "quantised", config, numbers, quantisation, quantise, wanted)
    count = sum(wanted(*entry) for entry in numbers.items())
    return path / "quantised", archs_tiny.save(path / "plain", config, plain), count


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_logits_are_those_of_the_same_numbers(model: str, method: str, tmp_path: Path) -> None:
    folder, plain, count = quantised(tmp_path, model, *METHODS[method][:2])
    assert count == MODELS[model]
    tokens = archs_tiny.prompt_of(model, 33)
    found, wanted = (tiny.logits_of(archs_tiny.load(p), tokens, [20, 13]) for p in (folder, plain))
    np.testing.assert_array_equal(found, wanted)
    assert np.ptp(found) > 0.5


def test_compiled_kernels_compute_with_the_same_numbers(tmp_path: Path) -> None:
    if absent := missing():
        pytest.skip(f"no compiled kernels: {absent}")
    from rvllm.backends.cpu.backend import CpuBackend
    from rvllm.config import EngineConfig
    from rvllm.models.config import ModelConfig
    from rvllm.models.registry import build_program
    from rvllm.program.dtypes import DType
    from rvllm.weights.open import open_checkpoint

    tokens, found = archs_tiny.prompt_of("granite"), []
    folder, plain, _ = quantised(tmp_path, "granite", *METHODS["awq"][:2])
    for path in (folder, plain):
        checkpoint = open_checkpoint(path)
        program = build_program(ModelConfig(checkpoint.config, "tiny"), DType.F32)
        config = EngineConfig(device="cpu", num_blocks=64, max_num_seqs=4, cpu_kernels="compiled")
        found.append(tiny.logits_of(CpuBackend.load(program, checkpoint, config), tokens))
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize("method", METHODS)
def test_info_and_plan_name_the_format(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RVLLM_DEVICE", "cpu")
    quantisation, quantise, shown = METHODS[method]
    folder, plain, count = quantised(tmp_path, "granite", quantisation, quantise)
    stored = []
    for path in (folder, plain):
        assert main(["info", "--model", str(path), "--json"]) == 0
        stored.append(json.loads(capsys.readouterr().out)["model"])
    assert f"{count} {shown}" in stored[0]["tensors"] and shown not in stored[1]["tensors"]
    assert int(stored[0]["stored bytes"]) < 0.5 * int(stored[1]["stored bytes"])
    assert main(["plan", "--model", str(folder), "--bandwidth", "100", "--tflops", "1"]) == 0
    assert f"{count} {shown}" in capsys.readouterr().out


def test_a_model_that_lacks_a_quantised_matrix_is_refused(tmp_path: Path) -> None:
    from rvllm.models.config import ModelConfig
    from rvllm.models.registry import build_program
    from rvllm.program.dtypes import DType
    from rvllm.weights.open import open_checkpoint
    from rvllm.weights.packing import check_weights

    folder, _, _ = quantised(tmp_path, "granite", *METHODS["gptq"][:2])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(ModelError, match=r"model\.layers\.2\.self_attn\.q_proj\.weight is missing"):
        check_weights(build_program(ModelConfig(checkpoint.config, "tiny"), DType.F32), checkpoint)
