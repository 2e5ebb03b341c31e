"""`rvllm plan --memory`: what fits on a GPU that is not here."""

import json
from pathlib import Path
from typing import Any

import pytest

from rvllm.cli.main import main
from support.models.real_configs import CONFIGS

KV_PER_TOKEN = 28 * 2 * 4 * 128 * 2  # Qwen2.5-7B: layers, keys and values, heads, elements, bytes


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["Qwen2.5-7B"]))
    return str(tmp_path)


def planned(capsys: pytest.CaptureFixture[str], model: str, *flags: str) -> dict[str, Any]:
    assert main(["plan", "--memory", "--json", "--model", model, *flags]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("gpu", ["h200", "h100-80gb", "a100-80gb", "l40s", "rtx-4090", "rtx-5090"])
def test_every_byte_of_the_card_has_a_line(gpu: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, model, "--gpu", gpu)
    assert sum(found["lines"].values()) == found["bytes"]
    assert found["lines"]["weights"] >= 2 * 7.6e9 and found["lines"]["free"] >= 0
    assert found["limits"]["tokens they hold"] * KV_PER_TOKEN <= found["lines"]["kv cache"]
    for length, count in found["sequences"].items():
        assert int(length) * count <= found["limits"]["tokens they hold"]


def test_flags_of_memory_hold_together(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    free = planned(capsys, model, "--gpu", "h200", "--gpu-memory-reserve-gb", "100")["lines"]["free"]
    assert free >= 100e9
    blocks = planned(capsys, model, "--gpu", "h200", "--num-gpu-blocks", "4096")["limits"]["kv blocks"]
    assert blocks == 4096


def test_a_model_that_does_not_fit_says_what_to_turn(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--memory", "--model", model, "--gpu", "rtx-4090", "--vram-gb", "12"]) == 2
    said = capsys.readouterr().err
    assert "short by" in said and "--max-num-batched-tokens" in said
    assert main(["plan", "--model", model, "--gpu", "rtx-4090"]) == 2
    assert "--memory" in capsys.readouterr().err
    assert main(["plan", "--memory", "--model", model, "--gpu", "voodoo"]) == 2
    assert "rtx-4090" in capsys.readouterr().err


def test_a_small_card_holds_a_7b_in_four_bits(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, model, "--gpu", "rtx-4090", "--vram-gb", "8", "--quantization", "int4",
                    "--max-num-batched-tokens", "1024", "--max-num-seqs", "8")  # fmt: skip
    assert found["lines"]["weights"] < 6e9 and found["sequences"]["4096"] >= 1
