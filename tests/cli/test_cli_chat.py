"""`rvllm chat` against a running server and, with a real model, its own engine."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from models import model_path

sys.path.append(str(Path(__file__).parent.parent / "api"))
from api_double import ANSWER, LiveServer

from rvllm.cli.main import main


def talk(monkeypatch: pytest.MonkeyPatch, lines: str, *words: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return main(["chat", *words])


def test_a_piped_conversation_over_http(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with LiveServer(drain_timeout=0.2) as server:
        count = len(server.engine.answer)
        flags = (
            "--url",
            server.url,
            "--max-tokens",
            str(count),
            "--system",
            "Be brief.",
            "--sampling-seed",
            "3",
        )
        assert (
            talk(monkeypatch, "hello\nand\\\nmore\n/reset\nagain\n/system\nbare\n/quit\nnever\n", *flags) == 0
        )
        prompts = [server.tokenizer.decode(r.prompt_token_ids) for r in server.engine.requests]
        assert {r.sampling.seed for r in server.engine.requests} == {3}
    shown = capsys.readouterr()
    assert shown.out == f"{ANSWER}\n" * 4
    assert shown.err.count(f"  {count} tokens · ") == 4
    assert prompts[0].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>")
    assert ANSWER in prompts[1]
    assert "and\nmore" in prompts[1]
    assert "hello" not in prompts[2].replace(ANSWER, "")
    assert "Be brief." in prompts[2]
    assert prompts[3] == "<|im_start|>user\nbare<|im_end|>\n<|im_start|>assistant\n"


def test_a_server_that_refuses_or_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with LiveServer(api_key="right", drain_timeout=0.2) as server:
        assert talk(monkeypatch, "hello\n", "--url", server.url, "--api-key", "wrong") == 1
        assert "answers 401: a valid key is required" in capsys.readouterr().err
        url = server.url
        server.engine.error = "out of luck"
        assert talk(monkeypatch, "hello\n", "--url", url, "--api-key", "right") == 1
        assert "answers 500: out of luck" in capsys.readouterr().err
    assert talk(monkeypatch, "hello\n", "--url", url) == 1
    assert f"rvllm: cannot reach {url}" in capsys.readouterr().err


@pytest.mark.models
def test_with_an_engine_of_its_own() -> None:
    flags = ["--model", str(model_path("smollm2-135m")), "--temperature", "0", "--max-tokens", "8"]
    command = [sys.executable, "-m", "rvllm", "chat", *flags, "--max-model-len", "512"]
    found = subprocess.run(
        command,
        input="What is the capital of France?\n",
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Paris" in found.stdout
    assert "8 tokens · " in found.stderr
