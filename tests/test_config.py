"""The settings are declared once and mean the same everywhere."""

import argparse

import pytest

from rvllm.config import EngineConfig, ServerConfig, SourceConfig, unknown_variables
from rvllm.errors import UsageError
from rvllm.settings import add_flags, build, env_of, flag_of, given_settings, markdown_table, settings_of


def test_flags_win_over_environment_over_defaults() -> None:
    assert build(EngineConfig, {}, {}).max_num_seqs == 256
    assert build(EngineConfig, {}, {"RVLLM_MAX_NUM_SEQS": "7"}).max_num_seqs == 7
    assert build(EngineConfig, {"max_num_seqs": "9"}, {"RVLLM_MAX_NUM_SEQS": "7"}).max_num_seqs == 9


@pytest.mark.parametrize(
    ("given", "environ", "says"),
    [
        ({"max_num_seqs": "0"}, {}, "--max-num-seqs: must be at least 1"),
        ({"max_num_seqs": "many"}, {}, "--max-num-seqs: expected a whole number"),
        ({"device": "tpu"}, {}, "--device: 'tpu' is not one of auto, cuda, cpu"),
        ({"gpu_memory_utilization": "nan"}, {}, "--gpu-memory-utilization: must be a finite number"),
        ({"gpu_memory_utilization": "1.5"}, {}, "--gpu-memory-utilization: must be at most 1, got 1.5"),
        ({"gpu_memory_reserve_gb": "inf"}, {}, "--gpu-memory-reserve-gb: must be a finite number, got inf"),
        ({}, {"RVLLM_KV_CACHE_MEMORY_GB": "inf"}, "RVLLM_KV_CACHE_MEMORY_GB: must be a finite number"),
        ({}, {"RVLLM_BATCHED_GEMM_STRATEGY": "fast"}, "RVLLM_BATCHED_GEMM_STRATEGY: 'fast' is not one of"),
    ],
)
def test_bad_values_name_their_origin(given: dict[str, str], environ: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(EngineConfig, given, environ)
    assert says in str(caught.value)


def test_what_kubernetes_sets_for_a_service_named_rvllm() -> None:
    given = {
        "RVLLM_PORT": "tcp://10.0.0.1:8000",
        "RVLLM_SERVICE_HOST": "10.0.0.1",
        "RVLLM_PORT_8000_TCP": "x",
    }
    with pytest.raises(UsageError, match=r"RVLLM_PORT: expected a whole number.*enableServiceLinks"):
        build(ServerConfig, {}, given)
    assert build(ServerConfig, {"port": "8001"}, given).port == 8001
    assert unknown_variables(given) == {}


def test_variables_that_nothing_reads_are_found() -> None:
    given = {"RVLLM_GPU_MEMORY_UTILISATION": "0.3", "RVLLM_PORT": "1", "RVLLM_TEST_SEED": "3", "HOME": "/"}
    found = unknown_variables(given | {"RVLLM_WEIGHTS_IN_FP8": "1"})
    assert found == {
        "RVLLM_WEIGHTS_IN_FP8": None,
        "RVLLM_GPU_MEMORY_UTILISATION": "RVLLM_GPU_MEMORY_UTILIZATION",
    }
    for cls in (EngineConfig, ServerConfig, SourceConfig):
        assert unknown_variables({env_of(f.name, known): "" for f, known in settings_of(cls)}) == {}


@pytest.mark.parametrize(
    ("environ", "path"),
    [
        ({"RVLLM_FP8_WEIGHTS": "1"}, "fp8"),
        ({"RVLLM_FP8_WEIGHTS": "0"}, "batched"),
        ({"RVLLM_BATCHED_DECODE_1": "0"}, "gemv"),
        ({"RVLLM_BATCHED_DECODE_1": "1", "RVLLM_CUBLAS_DECODE": "0"}, "gemv"),
        ({"RVLLM_BATCHED_DECODE_1": "0", "RVLLM_DECODE_PATH": "fused"}, "fused"),
    ],
)
def test_switches_of_rvllm_in_rust_choose_a_decode_path(environ: dict[str, str], path: str) -> None:
    assert build(EngineConfig, {}, environ).decode_path == path
    assert build(EngineConfig, {"decode_path": "batched"}, environ).decode_path == "batched"
    assert unknown_variables(environ) == {}


def test_switches_that_contradict_each_other_are_refused() -> None:
    both = {"RVLLM_FP8_WEIGHTS": "1", "RVLLM_BATCHED_DECODE_1": "0"}
    with pytest.raises(
        UsageError, match="RVLLM_FP8_WEIGHTS=1 and RVLLM_BATCHED_DECODE_1=0 ask for different"
    ):
        build(EngineConfig, {}, both)
    with pytest.raises(UsageError, match="RVLLM_FP8_WEIGHTS: expected 0 or 1, got 'yes'"):
        build(EngineConfig, {}, {"RVLLM_FP8_WEIGHTS": "yes"})


@pytest.mark.parametrize("cls", [EngineConfig, ServerConfig])
def test_every_setting_is_a_flag_a_variable_and_a_table_row(cls: type) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, cls, "all")
    text, table = parser.format_help(), markdown_table(cls)
    for f, known in settings_of(cls):
        assert flag_of(f.name) in text
        assert flag_of(f.name) in table
        assert env_of(f.name, known) in table


def test_two_names_of_a_setting_do_not_contradict_each_other() -> None:
    assert build(EngineConfig, {"num_blocks": "9", "num_gpu_blocks": "9"}, {}).num_blocks == 9
    with pytest.raises(UsageError, match="--num-blocks 8 and RVLLM_NUM_GPU_BLOCKS 9 are one setting"):
        build(EngineConfig, {"num_blocks": "8"}, {"RVLLM_NUM_GPU_BLOCKS": "9"})


def test_the_command_of_rvllm_in_rust_is_understood() -> None:
    given = {
        "model": "Qwen/Qwen2.5-7B-Instruct", "gpu_memory_reserve_gb": "8", "num_gpu_blocks": "4096",
        "num_cpu_blocks": "32768", "max_model_len": "auto",
    }  # fmt: skip
    config = build(EngineConfig, given, {"RVLLM_BATCHED_GEMM_STRATEGY": "hybrid"})
    assert config.max_model_len is None
    assert given_settings(config) == {
        "--model": "Qwen/Qwen2.5-7B-Instruct", "--gpu-memory-reserve-gb": "8.0", "--num-blocks": "4096",
        "--num-cpu-blocks": "32768", "--gemm-strategy": "hybrid",
    }  # fmt: skip
