"""Several models behind one address: routes, names, metrics, and fifty swaps of a real server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rvllm.cli.main import main
from support.models.tiny_llm import CONFIG

WIDTHS = {"small": 32, "wide": 64}


class Served:
    """`rvllm serve` with two models of random weights on the CPU, which take token ids."""

    def __init__(self, folder: Path) -> None:
        models: list[str] = []
        for name, width in WIDTHS.items():
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": width}))
            models += ["--model", str(folder / name)]
        self.log = folder / "log"
        flags = "--load-format dummy --device cpu --skip-tokenizer-init --port 0 --num-blocks 64 --threads 1"
        command = [sys.executable, "-m", "rvllm", "serve", *models, *flags.split()]
        command += ["--served-model-name", *WIDTHS, "--model-turn-seconds", "0.02"]
        with self.log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        until = time.monotonic() + 60
        while not (found := re.search(r"listening on (http://\S+)", self.log.read_text())):
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()
            time.sleep(0.02)
        self.url = found[1]

    def get(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            text = answer.read().decode()
        return text if path == "/metrics" else json.loads(text)

    def tokens(self, model: str | None, first: int) -> list[int]:
        body = {"prompt": [first, 5, 9], "max_tokens": 6, "temperature": 0, "return_token_ids": True}
        answer = self.get("/v1/completions", body if model is None else {**body, "model": model})
        assert answer["model"] == (model or "small")
        found: list[int] = answer["choices"][0]["token_ids"]
        return found

    def swaps(self) -> float:
        page = text_string_to_metric_families(self.get("/metrics"))
        (family,) = [family for family in page if family.name == "rvllm:backend_model_swaps"]
        return min(sample.value for sample in family.samples)

    def engine_bytes(self) -> int:
        """What the engine processes hold in memory."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in children]
        return 4096 * sum(pages)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("several"))
    yield made
    made.process.terminate()
    assert made.process.wait(30) == 0, made.log.read_text()


def test_fifty_swaps_change_no_token_and_lose_no_memory(served: Served) -> None:
    expected = {(name, i): served.tokens(name, i) for name in WIDTHS for i in range(4)}
    assert expected["small", 1] != expected["wide", 1]
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda pair: served.tokens(*pair), expected)
        assert dict(zip(expected, found, strict=True)) == expected
    sizes = []
    for number in range(50):
        pair = list(WIDTHS)[number % 2], number % 4
        assert served.tokens(*pair) == expected[pair]
        sizes.append(served.engine_bytes())
    assert served.swaps() >= 50
    assert sizes[-1] - sizes[10] < 4 << 20


def test_names(served: Served) -> None:
    assert [card["id"] for card in served.get("/v1/models")["data"]] == list(WIDTHS)
    assert served.get("/v1/models/wide")["root"] == "wide"
    assert served.tokens(None, 3) == served.tokens("small", 3)
    for path in ("/v1/completions", "/v1/responses", "/tokenize"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            served.get(path, {"model": "other", "prompt": [3], "input": "x"})
        assert caught.value.code == 404
        assert "'small' or 'wide'" in json.loads(caught.value.read())["error"]["message"]


def test_the_small_endpoints(served: Served) -> None:
    served.tokens("wide", 3)
    assert served.get("/is_sleeping") == {"is_sleeping": False}
    assert served.get("/rvllm/state")["model"] == "wide"
    with pytest.raises(urllib.error.HTTPError) as caught:
        served.get("/sleep", {})
    assert "several models" in json.loads(caught.value.read())["error"]["message"]
    names = [family.name for family in text_string_to_metric_families(served.get("/metrics"))]
    assert len(names) == len(set(names))
    log = served.log.read_text()
    assert re.search(r"small · \w+ · cpu", log) and re.search(r"wide · \w+ · cpu", log)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--model b", "--model: two of them are the same"),
        ("--model a --hf-overrides {}", "--hf-overrides is for one model, and --model is given 2 times"),
        ("--model a --chat-template {{x}}", "--chat-template is for one model"),
        ("--model a --served-model-name c", "--served-model-name: 2 models have one name each, got c"),
    ],
)
def test_what_does_not_fit(flags: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model", "b", *flags.split()]) == 2
    assert said in capsys.readouterr().err
