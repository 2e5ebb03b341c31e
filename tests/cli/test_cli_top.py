"""`rvllm top` against a server over a double of the engine."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator

import pytest

from rvllm.backends.base import LedgerLine
from rvllm.cli.common.blockmap import block_map
from rvllm.cli.main import main
from rvllm.cli.top import History, Rates
from support.doubles.server import LiveServer


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    with LiveServer(drain_timeout=0.2) as server:
        yield server


def top(live: LiveServer, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["top", "--once", "--url", live.url, *flags]) == 0
    return capsys.readouterr().out


def test_an_idle_engine(live: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    shown = top(live, capsys)
    assert "tiny" in shown and "Double" in shown and "no request is alive" in shown
    assert "0 running" in shown
    assert "qkv            native    gemm_bf16 ×30" in shown and "lm_head        native" in shown


def test_a_running_request(live: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    live.engine.held = True
    thread = threading.Thread(target=live.chat, kwargs={"max_tokens": 2})
    thread.start()
    while not live.engine.open:
        time.sleep(0.01)
    time.sleep(0.25)  # a state is shown to all who ask within 0.2 s
    shown = top(live, capsys, "--interval", "0.3")
    live.engine.held = False
    thread.join()
    assert max(map(len, shown.splitlines())) <= 80
    assert "decoding" in shown and "5/64" in shown and re.search(r"[0-9a-f]{8}-0-0 ", shown)
    assert "1 running" in shown and "0% of the limit, 250" in shown
    assert "■■·····▪▪·" in shown, "two blocks of one sequence, two cached"


def test_blocks_shared_and_many_to_a_mark() -> None:
    one = {"id": "a", "running": True, "blocks": [0, 1]}
    two = {"id": "b", "running": True, "blocks": [0, 5]}
    few = {"sequences": [one, two], "cached_blocks": [3], "num_blocks": 8}
    shown = block_map(few, 4)
    assert shown.plain.splitlines()[:2] == ["◆■·▪", "·■··"] and "shared (1)" in shown.plain
    assert {str(span.style) for span in shown.spans} >= {"cyan", "magenta"}
    many = block_map({**few, "num_blocks": 64}, 4)
    assert many.plain.splitlines()[:4] == ["◆■··", "····", "····", "····"]
    assert "a mark is 4 blocks" in many.plain


def test_the_ledger_is_a_bar(live: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = live.service.ready.ledger
    ledger += [LedgerLine("weights", 3 << 30), LedgerLine("KV cache", 1 << 30), LedgerLine("nothing", 0)]
    time.sleep(0.25)
    shown = top(live, capsys)
    del ledger[:]
    assert "█" * 64 in shown and "weights 3" in shown and "KV cache 1" in shown and "nothing" not in shown


def test_rates_come_from_differences_and_a_new_engine_starts_anew() -> None:
    def state(moment: float, tokens: int, steps: int) -> dict[str, object]:
        stats = {"generation_tokens": tokens, "prompt_tokens": 2 * tokens, "steps": steps}
        stats |= {"loop_seconds": moment, "idle_seconds": moment / 2}  # type: ignore[dict-item]
        return {"time": moment, "stats": stats}

    history = History()
    assert history.add(state(10.0, 100, 5)) == Rates()
    rates = history.add(state(12.0, 150, 15))
    assert (rates.generated, rates.prompt, rates.steps, rates.idle) == (25.0, 50.0, 5.0, 0.5)
    assert history.add(state(13.0, 3, 1)).generated == 0.0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--url", "127.0.0.1:9"], "cannot reach"),
        (["--url", "ftp://x"], "--url"),
        (["--interval", "often"], "--interval"),
        (["--interval", "nan"], "--interval"),
    ],
)
def test_mistakes_are_one_line(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once", *flags]) != 0
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_the_key_is_sent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with LiveServer(api_key="secret", drain_timeout=0.2) as live:
        assert main(["top", "--once", "--url", live.url]) == 1
        assert "401" in capsys.readouterr().err
        monkeypatch.setenv("RVLLM_API_KEY", "secret")
        assert main(["top", "--once", "--url", live.url]) == 0
