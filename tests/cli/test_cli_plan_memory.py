"""`rvllm plan --memory`: what fits on a GPU that is not here."""

import json
import re
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


@pytest.mark.parametrize(
    ("flags", "turn"),
    [
        (["--vram-gb", "12"], "quantise the weights, which alone are more than is free"),
        (
            ["--gpu-memory-utilization", "0.1"],
            "raise --gpu-memory-utilization to 0.12, or lower --max-model-len",
        ),
        (["--gpu-memory-reserve-gb", "140"], "lower --gpu-memory-reserve-gb to 133.7"),
        (
            ["--num-gpu-blocks", "140000"],
            "raise --gpu-memory-utilization to 0.97, or lower --num-blocks to 1",
        ),
        (["--num-gpu-blocks", "400000"], "; lower --num-blocks to 1"),
        (["--kv-cache-memory-gb", "300"], "; lower --kv-cache-memory-gb to 1"),
    ],
)
def test_a_model_that_does_not_fit_says_what_to_turn(
    flags: list[str], turn: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--memory", "--model", model, "--gpu", "h200", *flags]) == 2
    said = capsys.readouterr().err
    assert "short by" in said and turn in said
    if found := re.search(
        r"(--num-blocks|--gpu-memory-reserve-gb|--gpu-memory-utilization) to ([\d.]+)", said
    ):
        assert planned(capsys, model, "--gpu", "h200", *found.groups())["lines"]["free"] >= 0


def test_flags_of_memory_that_contradict_each_other(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--memory", "--model", model, "--num-gpu-blocks", "4096",
                 "--kv-cache-memory-gb", "50"]) == 2  # fmt: skip
    said = capsys.readouterr().err
    assert "4096 takes 3.76 GB" in said and f"{50 * 10**9 // (16 * KV_PER_TOKEN)} blocks" in said
    assert main(["plan", "--model", model, "--gpu", "rtx-4090"]) == 2
    assert "--memory" in capsys.readouterr().err
    assert main(["plan", "--memory", "--model", model, "--gpu", "voodoo"]) == 2
    assert "rtx-4090" in capsys.readouterr().err


def test_host_memory_has_lines_of_its_own(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--gpu-memory-reserve-gb 8 --num-gpu-blocks 4096 --num-cpu-blocks 32768"
    found = planned(capsys, model, "--gpu", "h200", *flags.split())
    assert found["host_lines"] == {"kv cache, pinned": 32768 * 16 * KV_PER_TOKEN}
    assert found["lines"]["kv cache"] == 4096 * 16 * KV_PER_TOKEN
    assert sum(found["lines"].values()) == found["bytes"]


def test_a_small_card_holds_a_7b_in_four_bits(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, model, "--gpu", "rtx-4090", "--vram-gb", "8", "--quantization", "int4",
                    "--max-num-batched-tokens", "1024", "--max-num-seqs", "8")  # fmt: skip
    assert found["lines"]["weights"] < 6e9 and found["sequences"]["4096"] >= 1
