"""`rvllm bench` against a server of known answers, and on a tiny model: vLLM's fields, the right values."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rvllm.bench.load import Sent
from rvllm.bench.serving import page, summary
from rvllm.cli.main import main
from support.doubles.server import LiveServer

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_serve_counts_what_came(tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str) -> None:
    with LiveServer(drain_timeout=0.2) as server:
        words = [
            "bench", "serve", "--base-url", server.url, "--backend", backend, "--random_input_len", "10",
            "--random-output-len", "4", "--num-prompts", "5", "--vocab-size", "400", "--max-concurrency", "2",
            "--percentile-metrics", "ttft,itl,e2el", "--metric-percentiles", "50,99", "--save-result",
            "--result-dir", str(tmp_path), "--result-filename", "r.json", "--trust-remote-code",
        ]  # fmt: skip
        assert main(words) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (5, 0, 20)
    if backend == "openai":
        assert found["total_input_tokens"] == 50
    assert found["max_concurrent_requests"] <= 2 and found["model_id"] == "tiny"
    assert found["output_throughput"] == pytest.approx(20 / found["duration"])
    assert 0 < found["p50_ttft_ms"] <= found["p99_ttft_ms"] <= found["p99_e2el_ms"]
    printed = capsys.readouterr().out
    assert "Successful requests:                     5" in printed and "P99 E2EL (ms):" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_failures_are_counted_and_the_first_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with LiveServer(drain_timeout=0.2) as server:
        words = ["bench", "serve", "--base-url", server.url, "--model", "other", "--num-prompts", "2",
                 "--random-input-len", "3", "--vocab-size", "400"]  # fmt: skip
        assert main(words) == 1
    printed = capsys.readouterr().out
    assert "Failed requests:                         2" in printed and "not served here" in printed


def test_latencies_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    sent = []
    for _ in range(50):
        start, first = float(rng.uniform(0, 5)), float(rng.uniform(0.01, 0.1))
        gaps = [float(gap) for gap in rng.uniform(0.001, 0.01, 7)]
        sent.append(Sent(10, 8, start, start + first, start + first + sum(gaps), gaps))
    sent.append(Sent(10, error="broken"))
    found = summary(sent, 5.0, ("ttft", "tpot", "itl", "e2el"), (50, 99))
    ttft = np.array([one.first - one.start for one in sent[:-1]]) * 1000
    itl = np.concatenate([one.gaps for one in sent[:-1]]) * 1000
    assert found["p99_ttft_ms"] == pytest.approx(np.percentile(ttft, 99))
    assert found["std_ttft_ms"] == pytest.approx(ttft.std())
    assert found["median_itl_ms"] == pytest.approx(np.median(itl))
    assert found["mean_tpot_ms"] == pytest.approx(itl.reshape(50, 7).mean())
    assert (found["completed"], found["failed"]) == (50, 1)
    assert found["request_throughput"] == 10.0
    assert max(map(len, page(found, ("ttft",), (99,)).splitlines())) <= 50


def test_offline_kinds_write_vllms_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    engine = ["--model", str(tmp_path), "--load-format", "dummy", "--device", "cpu", "--skip-tokenizer-init",
              "--threads", "1", "--num-blocks", "64", "--input-len", "8", "--output-len", "4",
              "--output-json", str(tmp_path / "out.json")]  # fmt: skip
    assert main(["bench", "throughput", *engine, "--num-prompts", "6"]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["num_requests"], found["total_num_tokens"]) == (6, 6 * 12)
    assert found["tokens_per_second"] == pytest.approx(72 / found["elapsed_time"])
    words = ["--batch-size", "2", "--num-iters", "3", "--num-iters-warmup", "1"]
    assert main(["bench", "latency", *engine, *words]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["latencies"]) == 3 and set(found["percentiles"]) == {"10", "25", "50", "75", "90", "99"}
    assert found["percentiles"]["50"] == pytest.approx(float(np.median(found["latencies"])))
    assert "Avg latency:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--percentile-metrics", "xyz"], "xyz"),
        (["--request-rate", "0"], "above 0"),
        (["--port", "1"], "reach"),
    ],
)
def test_mistakes_are_told(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *words]) != 0
    assert said in capsys.readouterr().err
