"""Several models behind one address: routes, names, metrics, and fifty swaps of a real server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rvllm.cli.main import main
from support.clients.served import Served
from support.models.tiny_llm import CONFIG

WIDTHS = {"small": 32, "wide": 64}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two models of random weights on the CPU, which take token ids."""
    folder = tmp_path_factory.mktemp("several")
    models: list[str] = []
    for name, width in WIDTHS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": width}))
        models += ["--model", str(folder / name)]
    flags = "--load-format dummy --device cpu --skip-tokenizer-init --num-blocks 64 --threads 1"
    names = ["--served-model-name", *WIDTHS, "--model-turn-seconds", "0.02"]
    made = Served(*models, *flags.split(), *names)
    yield made
    assert made.end() == 0, made.text()


def get(served: Served, path: str, body: dict[str, Any] | None = None, status: int = 200) -> Any:
    found, answer = served.ask("GET" if body is None else "POST", path, body)
    assert found == status
    return json.loads(answer)


def tokens(served: Served, model: str | None, first: int) -> list[int]:
    body = {"prompt": [first, 5, 9], "max_tokens": 6, "temperature": 0, "return_token_ids": True}
    answer = get(served, "/v1/completions", body if model is None else {**body, "model": model})
    assert answer["model"] == (model or "small")
    found: list[int] = answer["choices"][0]["token_ids"]
    return found


def families(served: Served) -> dict[str, Any]:
    page = list(text_string_to_metric_families(served.get("/metrics")[1].decode()))
    assert len({family.name for family in page}) == len(page)
    return {family.name: family for family in page}


def test_fifty_swaps_change_no_token_and_lose_no_memory(served: Served) -> None:
    expected = {(name, i): tokens(served, name, i) for name in WIDTHS for i in range(4)}
    assert expected["small", 1] != expected["wide", 1]
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda pair: tokens(served, *pair), expected)
        assert dict(zip(expected, found, strict=True)) == expected
    sizes = []
    for number in range(50):
        pair = list(WIDTHS)[number % 2], number % 4
        assert tokens(served, *pair) == expected[pair]
        sizes.append(served.rss(*served.children()))
    swaps = families(served)["rvllm:backend_model_swaps"].samples
    assert min(sample.value for sample in swaps) >= 50
    assert sizes[-1] - sizes[10] < 4


def test_names(served: Served) -> None:
    assert [card["id"] for card in get(served, "/v1/models")["data"]] == list(WIDTHS)
    assert get(served, "/v1/models/wide")["root"] == "wide"
    assert tokens(served, None, 3) == tokens(served, "small", 3)
    for path in ("/v1/completions", "/v1/responses", "/tokenize"):
        answer = get(served, path, {"model": "other", "prompt": [3], "input": "x"}, 404)
        assert "'small' or 'wide'" in answer["error"]["message"]


def test_the_small_endpoints(served: Served) -> None:
    tokens(served, "wide", 3)
    assert get(served, "/is_sleeping") == {"is_sleeping": False}
    assert get(served, "/rvllm/state")["model"] == "wide"
    assert "several models" in get(served, "/sleep", {}, 400)["error"]["message"]
    assert families(served)
    log = served.text()
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
