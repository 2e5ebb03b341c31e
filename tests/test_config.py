"""The settings are declared once and mean the same everywhere."""

import argparse

import pytest

from rvllm.config import (
    EngineConfig,
    ServerConfig,
    add_flags,
    build,
    env_of,
    flag_of,
    markdown_table,
    settings_of,
)
from rvllm.errors import UsageError


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
        ({"gpu_memory_utilization": "nan"}, {}, "--gpu-memory-utilization"),
        ({}, {"RVLLM_BATCHED_GEMM_STRATEGY": "fast"}, "RVLLM_BATCHED_GEMM_STRATEGY: 'fast' is not one of"),
    ],
)
def test_bad_values_name_their_origin(given: dict[str, str], environ: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(EngineConfig, given, environ)
    assert says in str(caught.value)


@pytest.mark.parametrize("cls", [EngineConfig, ServerConfig])
def test_every_setting_is_a_flag_a_variable_and_a_table_row(cls: type) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, cls, "all")
    text, table = parser.format_help(), markdown_table(cls)
    for f, known in settings_of(cls):
        assert flag_of(f.name) in text
        assert flag_of(f.name) in table
        assert env_of(f.name, known) in table
