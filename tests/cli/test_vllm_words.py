"""vLLM's command line, as its documentation and its users write it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rvllm.cli.main import main
from rvllm.config import EngineConfig, ServerConfig
from rvllm.errors import UsageError
from rvllm.offline.arguments import engine_config
from rvllm.settings import build, human_size
from rvllm.vllm.flags import VLLM_FLAGS
from rvllm.vllm.words import own_words

# Command lines of vLLM's documentation and recipes, each taken whole.
TAKEN = [
    "--trust-remote-code --enforce-eager --tensor-parallel-size 1 --enable-auto-tool-choice",
    "--block-size 16 --kv-cache-dtype auto --load-format safetensors --generation-config vllm",
    "--kv-cache-dtype fp8_e4m3 --calculate-kv-scales",
    "--dtype half --max-model-len 4k --gpu-memory-utilization 0.8 --max-num-seqs 64 --swap-space 4",
    "--disable-log-requests --disable-log-stats --uvicorn-log-level warning",
    "--tokenizer org/name --tokenizer-mode auto --revision main --served-model-name a b --api-key k1 k2",
    "--max_model_len=8192 --max_num_batched_tokens 2K --enable_chunked_prefill --no-enable-prefix-caching",
    "-tp 1 -pp=1 -q awq -O3 --compilation-config.mode 3 --cudagraph-capture-sizes 1 2 4 --seed 1",
    '--limit-mm-per-prompt {"image":0} --mm-processor-kwargs {} --distributed-executor-backend mp',
    "--scheduling-policy priority --num-scheduler-steps 8 --async-scheduling --max-logprobs 20",
    '--allowed-origins ["*"] --allowed-methods ["*"] --otlp-traces-endpoint http://127.0.0.1:4317',
    "--tool-call-parser hermes --reasoning-parser deepseek_r1 --chat-template-content-format openai",
    "--num-gpu-blocks-override 100 --shutdown-timeout 5 --attention-backend FLASH_ATTN --runner pooling",
]
REFUSED = {
    "--tensor-parallel-size 2": "one GPU",
    "-tp=4": "one GPU",
    "--kv-cache-dtype fp8_e5m2": "auto, bf16, fp16, fp8",
    "--enable-lora": "merge them",
    "--quantization bitsandbytes": "auto, none, fp8, int4",
    '--speculative-config {"model":"x"}': "speculative",
    "--no-enable-chunked-prefill": "in chunks",
    "--ssl-keyfile x": "proxy",
    "--uds /tmp/x": "--host",
    "--block-size 32": "16 tokens",
    "--cpu_offload_gb 4": "quantised",
    "--load-format bitsandbytes": "auto, dummy",
}


def parsed(line: str) -> tuple[EngineConfig, ServerConfig]:
    import argparse

    from rvllm.settings import add_flags

    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("model_tag", nargs="?")
    add_flags(parser, EngineConfig, "engine")
    add_flags(parser, ServerConfig, "server")
    args, unknown = parser.parse_known_args(own_words(line.split()))
    assert not unknown, unknown
    return build(EngineConfig, vars(args), {}), build(ServerConfig, vars(args), {})


@pytest.mark.parametrize("line", TAKEN)
def test_lines_are_taken(line: str) -> None:
    parsed(line)


@pytest.mark.parametrize("line", REFUSED)
def test_what_we_do_not_do_is_refused_with_what_to_use_instead(line: str) -> None:
    with pytest.raises(UsageError, match=REFUSED[line]):
        parsed(line)


def test_values_arrive() -> None:
    engine, server = parsed(
        "M --dtype half --max_model_len 4k --max-num-seqs 1K --kv-cache-memory-bytes 2g "
        "--revision v1 --served-model-name a b --api-key k1 k2 --shutdown-timeout 7"
    )
    assert (engine.dtype, engine.max_model_len, engine.max_num_seqs) == ("float16", 4000, 1024)
    assert engine.kv_cache_memory_gb == 2.0 and engine.model == "smollm2-135m@v1"
    assert (server.served_model_name, server.api_key, server.drain_timeout) == ("a\nb", "k1\nk2", 7.0)
    assert parsed("--max-model-len -1")[0].max_model_len is None
    assert parsed("--kv-cache-memory-gb 1 --no-enable-prefix-caching")[0].enable_prefix_caching is False


@pytest.mark.parametrize(
    ("text", "size"), [("5", 5), ("1k", 1000), ("1K", 1024), ("25.6k", 25600), ("2M", 2 << 20), ("1g", 10**9)]
)
def test_sizes_are_those_of_vllms_documentation(text: str, size: int) -> None:
    assert human_size(text) == size


def test_a_yaml_file_comes_before_the_words(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "port: 12\nmax-model-len: 2k\nenforce_eager: true\nserved-model-name: [a, b]\nswap_space: 4\n"
        "enable_prefix_caching: false\nuvicorn-log-level: info\n"
    )
    engine, server = parsed(f"M --config {file} --port 13")
    assert (server.port, server.served_model_name, engine.max_model_len) == (13, "a\nb", 2000)
    assert engine.enable_prefix_caching is False
    for content, said in (
        (b"[1, 2]", "names and values"),
        (b"a: b: c", "no YAML"),
        (b"\xff\xfe", "UTF-8|YAML"),
    ):
        file.write_bytes(content)
        with pytest.raises(UsageError, match=said):
            own_words(["--config", str(file)])
    with pytest.raises(UsageError, match="cannot read"):
        own_words(["--config", str(tmp_path / "none.yaml")])


def test_vllms_key_protects_the_server() -> None:
    assert build(ServerConfig, {}, {"VLLM_API_KEY": "secret"}).api_key == "secret"
    assert build(ServerConfig, {}, {"VLLM_API_KEY": "theirs", "RVLLM_API_KEY": "ours"}).api_key == "ours"
    assert build(ServerConfig, {"api_key": "given"}, {"VLLM_API_KEY": "theirs"}).api_key == "given"


def test_the_same_table_serves_python() -> None:
    given = {"tensor_parallel_size": 1, "dtype": "half", "num_gpu_blocks_override": 9, "swap_space": 2}
    found = engine_config("M", None, {**given, "enforce_eager": True, "hf_overrides": None})
    assert (found.dtype, found.num_blocks) == ("float16", 9)
    with pytest.raises(UsageError, match=r"tensor_parallel_size=2 .*one GPU"):
        engine_config("M", None, {"tensor_parallel_size": 2})
    with pytest.raises(UsageError, match="unknown argument 'nonsense'"):
        engine_config("M", None, {"nonsense": 2})


def test_every_refusal_names_a_way_out() -> None:
    from rvllm.vllm.flags import ANY

    for name, flag in VLLM_FLAGS.items():
        assert flag.ours or flag.instead or ANY in flag.neutral or name == "override_neuron_config", name


def test_two_models_are_one_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "a", "--model", "b"]) == 2
    assert "give one" in capsys.readouterr().err


def test_a_slip_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--max-modellen", "3"]) == 2
    assert "--max-model-len?" in capsys.readouterr().err


def test_help_for_one_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help=max-num-seqs"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("  --max-num-seqs") and "--port" not in out
    assert main(["serve", "--help=nothing-of-the-kind"]) == 2
    assert main(["serve", "--help=all"]) == 0
    assert "--port" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "instead"), [("collect-env", "rvllm info"), ("complete", "/v1/completions")]
)
def test_vllms_other_commands_name_ours(
    command: str, instead: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command]) == 2
    assert instead in capsys.readouterr().err
