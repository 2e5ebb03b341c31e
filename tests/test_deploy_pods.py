"""What deployment files start: our command line takes it, and probes and volumes lead somewhere."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rvllm.api.docs.openapi import document
from rvllm.cli.common.several import engine_configs
from rvllm.cli.main import OneLineParser
from rvllm.config import EngineConfig, ServerConfig, unknown_variables
from rvllm.settings import build

yaml = pytest.importorskip("yaml", reason="needs PyYAML")
DEPLOY = Path(__file__).parent.parent / "deploy"
CHART = DEPLOY / "helm" / "rvllm"
GRACE = "terminationGracePeriodSeconds"
IMAGE_ENV = dict(re.findall(r"\b([A-Z_]+)=(\S+)", re.search(r"FROM \$\{BASE\} AS runtime\n(ENV.*?)\nRUN",
                 (DEPLOY / "Dockerfile").read_text(), re.DOTALL)[1]))  # type: ignore[index]  # fmt: skip


@dataclass(frozen=True)
class Pod:
    """A pod's spec and where it is from; `name` of each container is unique in it."""

    source: str
    spec: dict[str, Any]

    @property
    def ours(self) -> list[dict[str, Any]]:
        """The containers that run an image of ours."""
        return [c for c in self.spec["containers"] if c["image"].startswith("rvllm:")]


def pods_in(value: Any, source: str) -> Iterator[Pod]:
    """Every pod's spec in an object, however deep: a Rollout's analysis has jobs."""
    if isinstance(value, dict):
        if isinstance(value.get("containers"), list):
            yield Pod(source, value)
        for each in value.values():
            yield from pods_in(each, source)
    elif isinstance(value, list):
        for each in value:
            yield from pods_in(each, source)


FILES = [path for path in sorted(DEPLOY.rglob("*.yaml")) if CHART not in path.parents]
OBJECTS = {path.name: list(yaml.safe_load_all(path.read_text())) for path in FILES}
PODS = [pod for name, objects in OBJECTS.items() for pod in pods_in(objects, name)]


def rendered(values: dict[str, Any]) -> list[Any]:
    """The chart's objects."""
    helm = pytest.importorskip("helm_python", reason="needs the deploy extra")
    with helm.Chart.load(CHART) as chart:
        made = chart.render(values, name="llm", namespace="serving")
    return [
        each for file, text in made.items() if file.endswith(".yaml") for each in yaml.safe_load_all(text)
    ]


def chart_pods() -> list[Pod]:
    settings = {"RVLLM_MAX_MODEL_LEN": "8192", "RVLLM_FP8_WEIGHTS": "1"}
    return list(pods_in(rendered({"settings": settings, "hubToken": {"existingSecret": "hub"}}), "chart"))


def environment(container: dict[str, Any]) -> dict[str, str]:
    """Its variables beside the image's; what a secret holds is some text."""
    return IMAGE_ENV | {each["name"]: each.get("value", "secret") for each in container.get("env", ())}


def takes(words: list[str], env: dict[str, str]) -> None:
    """Our command line takes these words with this environment. Raises where it does not."""
    parser = OneLineParser(prog="rvllm")
    importlib.import_module(f"rvllm.cli.{words[0]}").add_parser(parser.add_subparsers(dest="command"))
    args = parser.parse_args(words)
    assert not unknown_variables(env)
    if words[0] == "serve":
        engine_configs(args)
        build(EngineConfig, {"device": env.get("RVLLM_DEVICE")}, env)
        build(ServerConfig, vars(args), env)


def grace_of(pod: Pod) -> float:
    """Seconds until it is killed. A serving runtime has no place for them: its InferenceService says so."""
    specs = [pod.spec, *(each["spec"].get("predictor", {}) for each in OBJECTS.get(pod.source, ()) if each)]
    return float(next((s[GRACE] for s in specs if GRACE in s), 30))


def check(pod: Pod) -> None:
    """All that is wrong with a pod of ours fails here."""
    mounts = {volume["name"] for volume in pod.spec.get("volumes", ())}
    for container in pod.spec["containers"]:
        env = environment(container)
        for mount in container.get("volumeMounts", ()):
            assert mount["name"] in mounts, mount
        secure = container["securityContext"]
        assert not secure["allowPrivilegeEscalation"] and secure["capabilities"] == {"drop": ["ALL"]}
        assert {**pod.spec.get("securityContext", {}), **secure}["seccompProfile"] == {
            "type": "RuntimeDefault"
        }
        assert {**pod.spec.get("securityContext", {}), **secure}["runAsNonRoot"]
        assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]["cpu"]
        if container not in pod.ours:
            continue
        assert secure["readOnlyRootFilesystem"]
        words = container.get("args", ["serve"])
        takes(words, env)
        if words[0] != "serve":
            continue
        writable = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
        assert any(env["RVLLM_CACHE_DIR"].startswith(path) for path in writable)
        assert "/tmp" in writable
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        listens = int(words[words.index("--port") + 1]) if "--port" in words else int(env["RVLLM_PORT"])
        assert set(ports.values()) == {listens}
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container[name]["httpGet"]
            assert "get" in document()["paths"][probe["path"]]
            assert ports.get(probe["port"], probe["port"]) == listens
        word, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
        assert word == "sleep" and float(seconds) > 0  # who has not heard yet finds it listening
        stopping = float(seconds) + float(env.get("RVLLM_DRAIN_TIMEOUT", ServerConfig.drain_timeout))
        assert grace_of(pod) > stopping


@pytest.mark.parametrize("pod", PODS, ids=[f"{pod.source}-{i}" for i, pod in enumerate(PODS)])
def test_pods_of_files(pod: Pod) -> None:
    check(pod)


def test_pods_of_the_chart() -> None:
    (pod,) = chart_pods()
    check(pod)


def test_an_update_needs_no_free_gpu_where_there_is_none() -> None:
    several = {"replicas": 2, "persistence": {"accessMode": "ReadWriteMany"}}
    for surge, left in (
        (True, {"maxUnavailable": 0, "maxSurge": 1}),
        (False, {"maxUnavailable": 1, "maxSurge": 0}),
    ):
        (deployment,) = (o for o in rendered({**several, "surge": surge}) if o["kind"] == "Deployment")
        assert deployment["spec"]["strategy"]["rollingUpdate"] == left


def test_every_file_with_a_pod_was_looked_at() -> None:
    assert {pod.source for pod in PODS} == {"rvllm.yaml", "servingruntime.yaml", "argo.yaml", "kuberay.yaml"}
    assert IMAGE_ENV["RVLLM_PORT"] == "8000" and IMAGE_ENV["RVLLM_CACHE_DIR"] == "/cache/rvllm"


def test_services_and_composes_commands_are_ours() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yml").read_text())["services"]
    assert set(services) == {"rvllm", "rvllm-gpu"}
    for service in services.values():
        takes(service.get("command", ["serve"]), IMAGE_ENV | service["environment"])
        assert float(service["stop_grace_period"].removesuffix("s")) > ServerConfig.drain_timeout
    for unit in (DEPLOY / "systemd").iterdir():
        told = dict(re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.MULTILINE))
        takes(told["ExecStart"].split()[1:], dict(word.split("=") for word in told["Environment"].split()))
        assert float(told["TimeoutStopSec"]) > ServerConfig.drain_timeout
    image = (DEPLOY / "Dockerfile").read_text()
    words = [
        json.loads(re.search(rf"^{name} (.*)$", image, re.MULTILINE)[1]) for name in ("ENTRYPOINT", "CMD")
    ]  # type: ignore[index]
    assert words == [["rvllm"], ["serve"]]
    (path,) = re.findall(r"environ\[\\\"RVLLM_PORT\\\"\]}(/\w+)'", image)
    assert "get" in document()["paths"][path]


def test_commands_on_the_pages_are_ours() -> None:
    pages = [path.read_text() for path in DEPLOY.rglob("*.md")]
    told = {
        line for page in pages for line in re.findall(r"`rvllm ((?:ray|race|serve|benchmark) [^`]*)`", page)
    }
    assert len(told) >= 3
    for line in told:
        takes(shlex.split(line), {})


def test_the_chart_refuses_what_it_has_a_place_for() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]["settings"]
    for name in ("RVLLM_PORT", "RVLLM_MODEL", "RVLLM_API_KEY", "PATH", "rvllm_model"):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({name: "x"}, schema)
    for name in ("RVLLM_MAX_MODEL_LEN", "RVLLM_FP8_WEIGHTS", "RVLLM_BATCHED_DECODE_1", "HF_ENDPOINT"):
        jsonschema.validate({name: "x"}, schema)


def test_what_ray_is_told_is_what_we_read() -> None:
    from rvllm.ray.config import load, parse

    for path in sorted((DEPLOY / "ray").glob("*.yaml")):
        if path.name != "kuberay.yaml":
            load(path)
    (service,) = OBJECTS["kuberay.yaml"]
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    config = parse(application["args"])
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (model,) = config.models
    assert (group["minReplicas"], group["maxReplicas"]) == (model.scaling.min, model.scaling.max)
    worker = group["template"]["spec"]
    server = config.server_config(model)
    assert worker["terminationGracePeriodSeconds"] > server.drain_timeout
    paths = [mount["mountPath"] for mount in worker["containers"][0]["volumeMounts"]]
    for needed in (server.api_key_file, model.engine_config().model):
        assert any(str(needed).startswith(path) for path in paths), needed
    cores = float(worker["containers"][0]["resources"]["limits"]["cpu"])
    assert cores >= model.cpus + config.frontend_cpus * -(-config.frontends // group["minReplicas"])
