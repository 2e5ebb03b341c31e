"""What CONFIG may say, and what is said about what it may not."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import rvllm.ray
from rvllm.cli.main import main
from rvllm.errors import UsageError
from rvllm.ray.config import Replicas, load, parse, plain

EXAMPLES = Path(__file__).parents[2] / "deploy" / "ray"


def model(**values: Any) -> dict[str, Any]:
    return {"models": [{"name": "m", **values}]}


def test_defaults_and_both_spellings_of_replicas() -> None:
    config = parse(model(replicas=3, engine={"model": "x", "max_num_seqs": 8}))
    assert config.models[0].scaling == Replicas(3, 3)
    assert config.models[0].engine_config().max_num_seqs == 8
    assert config.server_config(config.models[0]).served_model_name == "m"
    assert config.stateful
    scaled = parse(model(replicas={"min": 1, "max": 4}))
    assert scaled.models[0].scaling.max == 4


def test_it_survives_the_way_to_another_process() -> None:
    config = parse({**model(gpus=0.5, replicas={"min": 1, "max": 4}), "server": {"max_queue": 9}})
    assert parse(plain(config)) == config


def test_a_share_of_a_gpu_is_a_share_of_its_memory() -> None:
    assert parse(model(gpus=0.5)).models[0].engine_config().gpu_memory_share == 0.45
    given = parse(model(gpus=0.5, engine={"gpu_memory_share": 0.3}))
    assert given.models[0].engine_config().gpu_memory_share == 0.3
    assert parse(model(gpus=1)).models[0].engine_config().gpu_memory_share is None
    assert parse(model(gpus=0)).models[0].engine_config().device == "cpu"


def test_state_needs_one_place() -> None:
    assert not parse({**model(), "frontends": 2}).stateful
    assert not parse({"models": [{"name": "a"}, {"name": "b"}]}).stateful


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([], "Expected `object`"),
        ({"models": []}, "one or more"),
        ({"models": [{"name": "a"}, {"name": "a"}]}, "name of its own"),
        (model(engine={"max_seqs": 8}), "m: engine: there is no setting 'max_seqs'"),
        (model(engine={"max_num_seqs": 0}), "max-num-seqs: must be at least 1"),
        (model(replicas={"min": 3, "max": 2}), "max at least min"),
        (model(replicas={"minimum": 3}), "minimum"),
        (model(replicas={"max": 3, "look_back": 5}), "look_back must be above 10 s"),
        (model(gpus=2), "runs on one GPU"),
        (model(gpus=0.5, engine={"gpu_memory_utilization": 0.3}), "give gpu_memory_share"),
        ({**model(), "server": {"port": 8000}}, "port is not set here"),
        ({**model(), "server": {"max_queue": "many"}}, "max-queue"),
        ({**model(), "frontends": 0}, "frontends must be at least 1"),
    ],
)
def test_mistakes_are_named(values: Any, says: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(values)
    assert says in str(error.value)


def test_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        load(tmp_path / "none.yaml")
    file = tmp_path / "bad.yaml"
    file.write_text("models: [")
    with pytest.raises(UsageError, match="no YAML"):
        load(file)
    file.write_text("models: []")
    with pytest.raises(UsageError, match=r"bad\.yaml: models: give"):
        load(file)


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.name)
def test_examples_are_valid(file: Path) -> None:
    import yaml

    for document in yaml.safe_load_all(file.read_text()):
        if "kind" in document:  # for KubeRay: the same values inside
            [application] = yaml.safe_load(document["spec"]["serveConfigV2"])["applications"]
            assert application["import_path"] == "rvllm.ray:app"
            document = application["args"]
        assert parse(document).models


def test_without_the_extra_the_command_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    file = tmp_path / "c.yaml"
    file.write_text("models: [{name: a}]")
    assert main(["ray", "serve", str(file)]) == 2
    assert "pip install" in capsys.readouterr().err


def test_no_module_hides_what_an_import_path_names() -> None:
    """A submodule of the same name takes the function's place as soon as something imports it."""
    modules = {path.stem for path in Path(rvllm.ray.__file__).parent.glob("*.py")}
    assert callable(rvllm.ray.app) and not {"app", "build_app"} & modules


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        (
            ["--address", "auto"],
            ConnectionError("Could not find any\nmore"),
            "--address auto: no Ray cluster: Could not",
        ),
        (
            ["--address", "x"],
            ValueError("Invalid address format: x"),
            "no Ray cluster: Invalid address format: x",
        ),
        ([], RuntimeError("no room\nstack"), "cannot start Ray here: no room\n"),
    ],
)
def test_what_ray_says_against_a_start_is_one_line(
    words: list[str],
    error: Exception,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def init(**_: Any) -> None:
        raise error

    fake, serve = ModuleType("ray"), ModuleType("ray.serve")
    fake.__dict__.update(__version__="2.60.0", serve=serve, init=init)
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setitem(sys.modules, "ray.serve", serve)
    assert main(["ray", "serve", str(EXAMPLES / "two-gpus.yaml"), *words]) == 1
    assert said in (found := capsys.readouterr().err) and found.count("\n") == 1
