"""Models from a hub, against a local server that speaks its file API."""

import json
from collections.abc import Iterator
from pathlib import Path
from shutil import _ntuple_diskusage

import numpy as np
import pytest

from rvllm.config import SourceConfig
from rvllm.errors import CapacityError, ModelError
from rvllm.weights.fetch.cache import FetchError
from rvllm.weights.fetch.hub import choose
from rvllm.weights.fetch.source import resolve
from rvllm.weights.open import open_checkpoint
from rvllm.weights.safetensors.directory import INDEX
from support.doubles.hub import Hub
from support.weights.model_files import LLAMA, gguf_bytes, llama_tensors, safetensors_of

WEIGHTS = safetensors_of({"a": np.ones(3, np.float32)})
MODEL = {
    "config.json": b'{"hidden_size": 3}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{ }",
    "chat_template.jinja": b"x",
    "merges.txt": b"a b",
    "model.safetensors": WEIGHTS,
    "README.md": b"much",
    "pytorch_model.bin": b"x" * 1000,
    "onnx/model.onnx": b"x" * 1000,
    "onnx/config.json": b"{}",
    "original/consolidated.safetensors": b"x",
}
NEEDED = set(list(MODEL)[:6])
GGUF = gguf_bytes(LLAMA, llama_tensors())
ONLINE = SourceConfig()
OFFLINE = SourceConfig(offline=True)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with server.running():
        yield server


def refused(
    name: str, pattern: str, source: SourceConfig = ONLINE, kind: type[ModelError] = ModelError
) -> ModelError:
    with pytest.raises(kind, match=pattern) as caught:
        resolve(name, source)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_model_and_nothing_else(hub: Hub) -> None:
    hub.add("org/model", MODEL)
    reports: list[tuple[str, int, int]] = []
    path = resolve("org/model", ONLINE, lambda *r: reports.append(r))
    assert open_checkpoint(path).tensors.keys() == {"a"}
    assert {p.name for p in path.iterdir()} == NEEDED == hub.given()
    assert ("fetching org/model", 0, sum(len(MODEL[n]) for n in NEEDED)) in reports
    before = len(hub.log)
    assert resolve("org/model", OFFLINE) == path
    assert len(hub.log) == before


def test_a_revision(hub: Hub) -> None:
    hub.add("org/model", MODEL)
    commit = hub.add("org/model", MODEL | {"config.json": b'{"hidden_size": 4}'}, "v2")
    assert open_checkpoint(resolve("org/model", ONLINE)).config["hidden_size"] == 3
    for revision in ("v2", commit):
        assert open_checkpoint(resolve(f"org/model@{revision}", ONLINE)).config["hidden_size"] == 4
        assert open_checkpoint(resolve(f"org/model@{revision}", OFFLINE)).config["hidden_size"] == 4
    refused("org/model@v3", "has no revision v3")


def test_shards(hub: Hub) -> None:
    shards = {f"part-{n}.safetensors": safetensors_of({f"t{n}": np.ones(n, np.float32)}) for n in (1, 2)}
    weight_map = {f"t{n}": f"part-{n}.safetensors" for n in (1, 2)}
    index = {INDEX: json.dumps({"weight_map": weight_map}).encode()}
    files = {k: v for k, v in MODEL.items() if k != "model.safetensors"}
    hub.add("org/large", files | shards | index | {"consolidated.safetensors": b"x"})
    path = resolve("org/large", ONLINE)
    assert open_checkpoint(path).tensors.keys() == {"t1", "t2"}
    assert "consolidated.safetensors" not in hub.given()
    hub.add("org/broken", files | index)
    refused("org/broken", r"are not in the repository: part-1\.safetensors")


def test_gguf_files(hub: Hub) -> None:
    hub.add("org/one", {"README.md": b"x", "m.Q4.gguf": GGUF})
    hub.add("org/two", {"a.gguf": GGUF, "b.gguf": GGUF, "deep/c.gguf": GGUF})
    assert resolve("org/one", ONLINE).name == "m.Q4.gguf"
    assert resolve("org/one", OFFLINE).name == "m.Q4.gguf"
    path = resolve("org/two:deep/c.gguf", ONLINE)
    assert path.name == "c.gguf" and open_checkpoint(path).config["hidden_size"] == 32
    assert resolve("org/two@main:deep/c.gguf", OFFLINE) == path
    assert hub.given() == {"m.Q4.gguf", "deep/c.gguf"}
    refused("org/two", r"several GGUF files; add one of them: org/two:a\.gguf, b\.gguf")
    refused("org/two:x.gguf", r"org/two has no file x\.gguf; its GGUF files: a\.gguf")
    refused("org/two:a.gguf", "not in the hub's cache and offline mode is on", OFFLINE, FetchError)


def test_not_there_or_not_allowed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/secret", MODEL)
    hub.add("org/gated", MODEL)
    hub.private["org/secret"] = "key"
    hub.gated.add("org/gated")
    for name in ("org/absent", "org/secret"):
        error = refused(name, f"{name}: not on the hub at {hub.url}, or private.*HF_TOKEN")
        assert not isinstance(error, FetchError)
    refused("org/gated", r"org/gated is gated: accept its terms")
    monkeypatch.setenv("HF_TOKEN", "key")
    assert (resolve("org/secret", ONLINE) / "config.json").is_file()


def test_no_weights(hub: Hub) -> None:
    hub.add("org/torch", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    refused("org/torch", "org/torch has no safetensors files")
    hub.add("org/nothing", {"README.md": b"x"})
    refused("org/nothing", r"org/nothing has no config\.json")


def test_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/model", MODEL)
    refused("org/model", "org/model is not in the hub's cache and offline mode is on", OFFLINE, FetchError)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("org/model", "org/model is not in the hub's cache and offline mode is on", ONLINE, FetchError)
    assert not hub.log


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused("org/model", r"org/model: the hub at http://127.0.0.1:9 cannot be reached", ONLINE, FetchError)


def test_no_network_but_a_copy(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/model", MODEL)
    path = resolve("org/model", ONLINE)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    reports: list[str] = []
    assert resolve("org/model", ONLINE, lambda text, done, total: reports.append(text)) == path
    assert reports[-1].endswith("taking the copy in the hub's cache")


def test_no_space(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/model", MODEL)
    monkeypatch.setattr("shutil.disk_usage", lambda path: _ntuple_diskusage(10, 9, 1))
    with pytest.raises(
        CapacityError, match=r"org/model needs .* MB on the disk of .*; make room or set HF_HOME"
    ):
        resolve("org/model", ONLINE)
    assert hub.given() == set()


def test_parts_of_a_split_gguf_come_together() -> None:
    sizes = {f"m-0000{n}-of-00003.gguf": 1 for n in (1, 2, 3)} | {"other.gguf": 1}
    names, result = choose(sizes, "m-00001-of-00003.gguf", None, "org/x")
    assert len(names) == 3 and result == "m-00001-of-00003.gguf"
