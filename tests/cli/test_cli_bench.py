"""`rvllm bench` against a server of known answers, and on a tiny model: vLLM's fields, the right values."""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from rvllm.bench.arrivals import Traffic
from rvllm.bench.datasets import Asked, from_file, prefix_repetition
from rvllm.bench.load import Sent, Target, run
from rvllm.bench.serving import page, summary
from rvllm.cli.bench import _spread
from rvllm.cli.main import main
from rvllm.errors import UsageError
from support.doubles.server import LiveServer
from support.models.tiny_llm import CONFIG


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_serve_counts_what_came(tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str) -> None:
    with LiveServer(drain_timeout=0.2) as server:
        words = [
            "bench", "serve", "--base-url", server.url, "--backend", backend, "--random_input_len", "10",
            "--random-output-len", "4", "--num-prompts", "5", "--vocab-size", "400", "--max-concurrency", "2",
            "--percentile-metrics", "ttft,itl,e2el", "--metric-percentiles", "50,99", "--save-result",
            "--result-dir", str(tmp_path), "--result-filename", "r.json", "--trust-remote-code",
            "--save-detailed", "--top-p", "0.9",
        ]  # fmt: skip
        assert main(words) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (5, 0, 20)
    assert found["output_lens"] == [4] * 5 and found["errors"] == [""] * 5
    assert min(found["ttfts"]) > 0 and all(min(gaps) > 0 for gaps in found["itls"])
    if backend == "openai":
        assert found["total_input_tokens"] == 50
    assert found["max_concurrent_requests"] <= 2 and found["model_id"] == "tiny"
    assert found["output_throughput"] == pytest.approx(20 / found["duration"])
    assert 0 < found["p50_ttft_ms"] <= found["p99_ttft_ms"] <= found["p99_e2el_ms"]
    printed = capsys.readouterr().out
    assert "Successful requests:                     5" in printed and "P99 E2EL (ms):" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_serve_takes_what_vllms_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with LiveServer(drain_timeout=0.2) as server:
        words = [
            "bench", "serve", "--base-url", server.url, "--random-input-len", "10", "--output-len", "4",
            "--num-prompts", "6", "--vocab-size", "400", "--ramp-up-strategy", "linear",
            "--ramp-up-start-rps", "50", "--ramp-up-end-rps", "53", "--goodput", "ttft:60000", "e2el:60000",
            "--header", "X-Team=blue", "--extra-body", '{"min_tokens": 2, "temperature": 0.5}',
            "--request-id-prefix", "mine-", "--metadata", "gpu=none", "--result-dir", str(tmp_path / "new"),
            "--result-filename", "r.json", "--append-result", "--save-detailed", "--max-concurrency", "3",
            "--percentile-metrics", "client_queue_time,e2el_including_client_queue",
            "--ready-check-timeout-sec", "5",
        ]  # fmt: skip
        assert main(words) == 0 and main(words) == 0
        asked = [request.sampling for request in server.engine.requests]
    assert {(one.min_tokens, one.temperature, one.max_tokens) for one in asked} == {(2, 0.5, 4)}
    lines = (tmp_path / "new" / "r.json").read_text().splitlines()
    found = json.loads(lines[1])
    assert len(lines) == 2 and found["gpu"] == "none" and found["ramp_up_strategy"] == "linear"
    assert found["request_goodput"] == pytest.approx(found["request_throughput"])
    assert [change["rps"] for change in found["rps_change_events"]] == [50, 51, 52, 53]
    assert len(found["generated_texts"]) == 6 and all(found["generated_texts"])
    assert 0 <= found["mean_client_queue_time_ms"] <= found["mean_e2el_including_client_queue_ms"]
    assert found["max_output_tokens_per_s"] > 0 and len(found["queue_times"]) == 6
    printed = capsys.readouterr().out
    assert "Request goodput (req/s):" in printed and "Maximum request concurrency:             3" in printed


def test_requests_carry_the_headers_that_were_asked_for() -> None:
    heard: list[bytes] = []

    async def load() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heard.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"HTTP/1.1 500 no\r\ncontent-length: 0\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        target = Target(url, (("Authorization", "Basic x"), ("Content-Type", "a/b")), "mine-")
        async with server:
            await run(target, [{}, {}], [1, 1])

    asyncio.run(load())
    assert all(b"authorization: Basic x\r\n" in head and b"content-type: a/b\r\n" in head for head in heard)
    assert {head.partition(b"x-request-id: ")[2][:6] for head in heard} == {b"mine-0", b"mine-1"}


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 20.0, float("inf")])
def test_arrivals_keep_the_rate(burstiness: float) -> None:
    times = np.array(Traffic(20.0, burstiness).arrivals(4000, 3))
    waits = np.diff(times, prepend=0)
    assert times[-1] == pytest.approx(200) and (waits >= 0).all()
    assert waits.std() == pytest.approx(0.05 / burstiness**0.5, rel=0.1, abs=1e-9)
    assert Traffic(float("inf")).arrivals(3, 0) == [0, 0, 0]


def test_a_growing_rate() -> None:
    assert Traffic(1.0, 1.0, "linear", 5.0).rates(5) == [1, 2, 3, 4, 5]
    assert Traffic(1.0, 1.0, "exponential", 16.0).rates(5) == pytest.approx([1, 2, 4, 8, 16])
    steady = Traffic(10.0, float("inf"), "linear", 10.0)
    assert steady.arrivals(4, 0) == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_failures_are_counted_and_the_first_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with LiveServer(drain_timeout=0.2) as server:
        words = ["bench", "serve", "--base-url", server.url, "--model", "other", "--num-prompts", "2",
                 "--random-input-len", "3", "--vocab-size", "400"]  # fmt: skip
        assert main(words) == 1
    printed = capsys.readouterr().out
    assert "Mean TTFT (ms):" in printed and "Median ITL (ms):" in printed
    assert "============ Serving Benchmark Result ============" in printed.splitlines()
    assert "---------------Time to First Token----------------" in printed.splitlines()
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


def test_throughput_takes_vllms_own_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    engine = ["--model", str(tmp_path), "--load-format", "dummy", "--device", "cpu", "--skip-tokenizer-init",
              "--threads", "1", "--num-blocks", "64", "--output-len", "4"]  # fmt: skip
    run = ["bench", "throughput", *engine, "--input-len", "8", "--num-prompts", "3"]
    neutral = ["--backend", "vllm", "--async-engine", "--disable-frontend-multiprocessing", "--n", "2"]
    assert main([*run, *neutral, "--prefix-len", "5"]) == 0
    assert "prompt tokens:  39\nTotal num output tokens:  24" in capsys.readouterr().out
    for words, told in ((["--lora-path", "X"], "adapters"), (["--hf-name", "a"], "nothing is"),
                        (["--backend", "hf"], "rvllm race"),
                        (["--profile"], "rvllm benchmark --profile"), (["--hf-split", "a"], "custom"),
                        (["--dataset", str(tmp_path / "none.json")], "cannot read")):  # fmt: skip
        assert main([*run, *words]) == 2
        assert told in capsys.readouterr().err
    words = ["--input-len", "8", "--batch-size", "1", "--num-iters", "1", "--num-iters-warmup", "0"]
    assert main(["bench", "latency", *engine, *words, "--use-beam-search", "--n", "2"]) == 0
    assert main(["bench", "throughput", "--help=prefix-len"]) == 0
    assert "--prefix-len" in capsys.readouterr().out


def test_one_length_of_throughput_is_every_data_sets() -> None:
    args = argparse.Namespace(input_len=9, output_len=4, prefix_len=3)
    _spread(args)
    assert (args.sonnet_input_len, args.sonnet_prefix_len, args.random_prefix_len) == (9, 3, 3)
    assert {args.sharegpt_output_len, args.custom_output_len, args.sonnet_output_len} == {4}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--percentile-metrics", "xyz"], "xyz"),
        (["--request-rate", "0"], "above 0"),
        (["--goodput", "itl:5"], "a name of ttft, tpot, e2el"),
        (["--goodput", "ttft:x"], "expected NAME:MS"),
        (
            ["--ramp-up-strategy", "linear", "--ramp-up-start-rps", "0", "--ramp-up-end-rps", "2"],
            "0 < --ramp",
        ),
        (["--ramp-up-end-rps", "2"], "need --ramp-up-strategy"),
        (["--header", "a"], "expected KEY=VALUE"),
        (["--header", "a=b\r\nc: d"], "not the name and value"),
        (["--extra-body", "[1]"], "expected a JSON object"),
        (["--metric-percentiles", "99,x"], "from 0 to 100"),
        (["--profile"], "--trace-steps"),
        (["--lora-modules", "a", "b"], "adapters are not supported"),
        (["--no-self-timed"], "--request-rate"),
        (["--port", "1"], "reach"),
    ],
)
def test_mistakes_are_told(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *words]) != 0
    assert said in capsys.readouterr().err


def test_without_a_kind_the_kinds_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 2
    assert "rvllm bench --help" in capsys.readouterr().err


def asked(name: str, path: Path, count: int = 6, output_len: int | None = None) -> list[Asked]:
    options = argparse.Namespace(sonnet_input_len=40, sonnet_prefix_len=20)
    return from_file(name, str(path), count, 0, output_len, lambda text: len(text.split()), options)


def test_files_are_read_as_vllm_reads_them(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "one two three four five"}, {"from": "gpt", "value": "a b c d e f"}]
    short = [{"from": "human", "value": "one two three"}, {"from": "gpt", "value": "a b c d e f"}]
    long = [{"from": "human", "value": "word " * 1025}, {"from": "gpt", "value": "a b c d"}]
    file = tmp_path / "sharegpt.json"
    file.write_text(json.dumps([{"conversations": c} for c in (talk, short, long, talk[:1])]))
    assert asked("sharegpt", file, 2) == [Asked("one two three four five", 6)] * 2
    assert asked("sharegpt", file, 1, 9) == [Asked("one two three four five", 9)]
    file = tmp_path / "custom.jsonl"
    file.write_text('{"prompt": "a"}\n\n{"prompt": "b", "output_tokens": 5}\n')
    assert asked("custom", file, 3) == [Asked("a", 256), Asked("b", 5), Asked("a", 256)]
    once = argparse.Namespace(no_oversample=True)
    assert len(from_file("custom", str(file), 3, 0, None, len, once)) == 2
    assert asked("custom", file, 2, 7) == [Asked("a", 7), Asked("b", 7)]
    file = tmp_path / "sonnet.txt"
    file.write_text("".join(f"line number {i} of four\n" for i in range(50)))
    poems = [str(one.prompt) for one in asked("sonnet", file, 4)]
    lines = [poem.splitlines() for poem in poems]  # 11 tokens of the question, 5 a line
    assert all(len(poem) == 1 + round(29 / 5) for poem in lines) and len(set(poems)) == 4
    assert all(poem[1:3] == ["line number 0 of four", "line number 1 of four"] for poem in lines)
    for name, text, said in (
        ("sharegpt", "{}", "must hold a list"),
        ("custom", "{", "line 1 is no JSON"),
        ("custom", "{}", "line 1 has no prompt"),
        ("sonnet", "", "holds no lines"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=said):
            asked(name, file)


def test_prefixes_repeat() -> None:
    found = prefix_repetition(8, 1, 2, 5, 3, 7, 400)
    assert len({tuple(one.prompt[:5]) for one in found}) == 2
    assert len({tuple(one.prompt) for one in found}) == 8
    assert {(len(one.prompt), one.output_len) for one in found} == {(8, 7)}


def test_serve_takes_a_file(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "hello world", "output_tokens": 3}\n{"prompt": "hi"}\n')
    with LiveServer(drain_timeout=0.2) as server:
        words = ["bench", "serve", "--base-url", server.url, "--dataset-name", "custom", "--dataset-path",
                 str(tmp_path / "p.jsonl"), "--num-prompts", "2", "--custom-output-len", "2"]  # fmt: skip
        assert main(words) == 0
        wanted = server.tokenizer.apply_chat_template(
            [{"role": "user", "content": "hello world"}], add_generation_prompt=True
        )
        assert server.engine.requests[0].prompt_token_ids == wanted
        assert main([*words, "--skip-chat-template"]) == 0
        assert server.tokenizer.encode("hello world") in [
            request.prompt_token_ids for request in server.engine.requests[2:]
        ]
        assert main([*words[:-2], "--backend", "openai-embeddings"]) == 2
        words[words.index("custom")] = "hf"
        assert main(words) == 2
