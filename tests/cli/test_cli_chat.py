"""`rvllm chat` against a running server and, with a real model, its own engine."""

import contextlib
import io
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

from rvllm.cli.main import main
from support.doubles.server import ANSWER, LiveServer
from support.models.fetched import model_path


def talk(monkeypatch: pytest.MonkeyPatch, lines: str, *words: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return main(["chat", *words])


def test_a_piped_conversation_over_http(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with LiveServer(drain_timeout=0.2) as server:
        count = len(server.engine.answer)
        flags = ("--max-tokens", str(count), "--system", "Be brief.", "--sampling-seed", "3")
        lines = "hello\nand\\\nmore\n/reset\nagain\n/system\nbare\n/quit\nnever\n"
        assert talk(monkeypatch, lines, "--url", server.url, *flags) == 0
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


class Terminal:
    """A command that believes it talks to a terminal."""

    def __init__(self, *command: str) -> None:
        self.leader, follower = pty.openpty()
        own = "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"
        # A shell starts its background jobs with Ctrl-C ignored, and the tests may be one of them.
        own += "; signal.signal(signal.SIGINT, signal.SIG_DFL)"
        take_over = f"{own}; os.execv(sys.argv[1], sys.argv[1:])"
        self.process = subprocess.Popen(
            [sys.executable, "-c", take_over, *command],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            start_new_session=True,
        )
        os.close(follower)
        self.shown = ""

    def until(self, text: str, seconds: float = 30.0) -> None:
        """Reads until `text` has been shown since the last call."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            ready, _, _ = select.select([self.leader], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, self.shown
            self.shown += os.read(self.leader, 65536).decode(errors="replace")
        self.shown = self.shown.partition(text)[2]

    def until_words(self, count: int, seconds: float = 30.0) -> None:
        """Reads until so many words are on the screen, whatever they are; a busy machine takes its time."""
        deadline = time.monotonic() + seconds
        while len(re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", " ", self.shown).split()) < count:
            ready, _, _ = select.select([self.leader], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, self.shown
            self.shown += os.read(self.leader, 65536).decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self.leader, text.encode())

    def interrupt(self, shown: str) -> None:
        """Ctrl-C until `shown`: Python's input() overlooks one that comes just as it has shown its prompt."""
        for _ in range(10):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                return self.until(shown, 3.0)
        raise AssertionError(self.shown)


@pytest.mark.parametrize("engine", ["remote", pytest.param("local", marks=pytest.mark.models)])
def test_ctrl_c_stops_the_answer_and_not_the_session(engine: str) -> None:
    with LiveServer(drain_timeout=0.2) as server:
        server.engine.pace = 0.02
        flags = ["--url", server.url]
        if engine == "local":
            flags = ["--model", str(model_path("smollm2-135m"))]
            flags += ["--max-model-len", "512", "--system", "Talk a lot."]
        terminal = Terminal(sys.executable, "-m", "rvllm", "chat", "--max-tokens", "200", *flags)
        terminal.until("> ")
        terminal.type("Tell me a story about the sea and count to one hundred in it.\n")
        terminal.until("in it.")
        terminal.until_words(8)
        terminal.type("\x03")
        terminal.until("(stopped)")
        terminal.until("tok/s")
        terminal.until("> ")
        if engine == "remote":
            deadline = time.monotonic() + 2
            while not server.engine.aborted and time.monotonic() < deadline:
                time.sleep(0.01)
            assert len(server.engine.aborted) == 1
        terminal.interrupt("(/quit ends)")
        terminal.type("/help\n")
        terminal.until("/reset")
        terminal.type("/quit\n")
        assert terminal.process.wait(10) == 0


def test_a_conversation_that_has_grown_too_long_says_how_to_go_on() -> None:
    with LiveServer(drain_timeout=0.2) as server:
        terminal = Terminal(sys.executable, "-m", "rvllm", "chat", "--max-tokens", "4", "--url", server.url)
        terminal.until("> ")
        terminal.type("hello\n")
        terminal.until("tok/s")
        terminal.type("Grüße aus 日本 " * 60 + "\n")
        terminal.until("the context holds 256")
        terminal.until("/reset starts a new conversation")
        terminal.type("/reset\n")
        terminal.until("forgotten")
        terminal.type("hello\n")
        terminal.until("tok/s")
        terminal.type("/quit\n")
        assert terminal.process.wait(10) == 0


def test_one_quick_message(capsys: pytest.CaptureFixture[str]) -> None:
    with LiveServer(drain_timeout=0.2) as server:
        assert main(["chat", "--url", server.url + "/v1", "--quick", "hi", "--max-tokens", "3"]) == 0
        assert len(server.engine.requests) == 1
    assert capsys.readouterr().out.strip()
