"""Renders and validates every deployment file: chart, manifests, Dockerfile, proxy, YAML.

    pip install ".[deploy]" && python scripts/lint_deploy.py

The chart is linted and rendered by Helm's own library for several sets of values; what it and the manifests
make is checked against the schemas of Kubernetes 1.25 and of the newest known. Objects of other makers
(Argo Rollouts, KEDA, KServe, KubeRay, Prometheus) have no schema that a package brings: the pods in them are
checked as Kubernetes' own, and of KubeRay's the fields above them. The compose file is checked against its
specification; HAProxy's file, the playbook and systemd's units where the programs are installed. Exit code 1
when anything is wrong.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python as helm
import kubernetes_validate
import yaml

DEPLOY = Path(__file__).parents[1] / "deploy"
CHART = DEPLOY / "helm" / "rvllm"
VERSIONS = ("1.25", kubernetes_validate.latest_version())
FOREIGN = ("argoproj.io/", "keda.sh/", "serving.kserve.io/", "monitoring.coreos.com/", "ray.io/")
RAY_FIELDS = {  # of ray.io/v1, KubeRay 1.4 to 1.5; what has no place in it the API server would drop silently
    "spec": {
        "deploymentUnhealthySecondThreshold", "excludeHeadPodFromServeSvc", "managedBy", "rayClusterConfig",
        "rayClusterDeletionDelaySeconds", "serveConfigV2", "serveService", "serviceUnhealthySecondThreshold",
        "suspend", "upgradeStrategy",
    },
    "rayClusterConfig": {
        "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions",
        "headGroupSpec", "headServiceAnnotations", "managedBy", "rayVersion", "suspend", "workerGroupSpecs",
    },
    "headGroupSpec": {
        "enableIngress", "headService", "labels", "rayStartParams", "resources", "serviceType", "template",
    },
    "workerGroupSpecs": {
        "groupName", "idleTimeoutSeconds", "labels", "maxReplicas", "minReplicas", "numOfHosts",
        "rayStartParams", "replicas", "resources", "scaleStrategy", "suspend", "template",
    },
}  # fmt: skip
VALUES: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "cpu": {"image": {"tag": "cpu"}, "gpu": {"count": 0}, "persistence": {"enabled": False}},
    "keda": {
        "autoscaling": {"enabled": True},
        "persistence": {"accessMode": "ReadWriteMany", "storageClass": "nfs"},
        "serviceMonitor": {"enabled": True},
    },
    "hpa": {
        "autoscaling": {"enabled": True, "kind": "hpa", "maxReplicas": 8},
        "persistence": {"accessMode": "ReadWriteMany"},
        "settings": {"RVLLM_MAX_MODEL_LEN": "8192"},
        "runtimeClassName": "nvidia",
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "nodeSelector": {"gpu": "h100"},
        "podAnnotations": {"a": "b"},
    },
}  # fmt: skip
REFUSED: dict[str, dict[str, Any]] = {
    "several replicas share": {"replicas": 2},
    "RVLLM_PORT": {"settings": {"RVLLM_PORT": "9000"}},
    "maxReplicas": {"autoscaling": {"minReplicas": 5}},
    "gpu": {"gpu": {"count": 2}},
    "replica": {"replica": 2},
    "settings": {"settings": {"RVLLM_PORT": 8000}},
}


def manifests(text: str) -> Iterator[dict[str, Any]]:
    """The objects of a YAML file."""
    yield from (each for each in yaml.safe_load_all(text) if each)


def invalid(found: dict[str, Any]) -> list[str]:
    """What is wrong with an object, by each version of Kubernetes."""
    if found["apiVersion"].startswith(FOREIGN):
        wrong = [each for spec in pods(found) for each in invalid(POD | {"spec": spec})]
        return [f"{found['kind']}: {each}" for each in (*wrong, *strange_to_ray(found))]
    wrong = []
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(found, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            wrong.append(f"{found['kind']} ({version}): {error}")
    return wrong


POD = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}}
POD_FIELDS = ("containers", "volumes", "securityContext", "terminationGracePeriodSeconds", "restartPolicy")


def pods(value: Any) -> Iterator[dict[str, Any]]:
    """Every pod's spec in an object of another maker; of KServe's runtimes what they share with one."""
    if isinstance(value, dict):
        if isinstance(value.get("containers"), list):
            runtime = "supportedModelFormats" in value
            yield {k: v for k, v in value.items() if k in POD_FIELDS} if runtime else value
        for each in value.values():
            yield from pods(each)
    elif isinstance(value, list):
        for each in value:
            yield from pods(each)


def strange_to_ray(value: Any) -> list[str]:
    """Fields of a RayService that KubeRay does not know."""
    if not (isinstance(value, dict) and value.get("apiVersion", "").startswith("ray.io/")):
        return []
    cluster = value["spec"]["rayClusterConfig"]
    parts = [
        ("spec", value["spec"]),
        ("rayClusterConfig", cluster),
        ("headGroupSpec", cluster["headGroupSpec"]),
    ]
    parts += [("workerGroupSpecs", group) for group in cluster["workerGroupSpecs"]]
    wrong = [f"{name}.{each}" for name, part in parts for each in part if each not in RAY_FIELDS[name]]
    texts = [v for _, part in parts for v in part.get("rayStartParams", {}).values()]
    return wrong + [f"rayStartParams: {text!r} is no text" for text in texts if not isinstance(text, str)]


def chart() -> list[str]:
    """Lints and renders the chart with all values, and with values that it must refuse."""
    wrong = []
    with helm.Chart.load(CHART) as loaded:
        for name, values in VALUES.items():
            said = helm.lint(CHART, values, strict=True)
            problems = [m for m in said["messages"] if m["severity"] >= 2]
            wrong += [f"chart, {name}: {problem['error']}" for problem in problems]
            made = loaded.render(values, name="llm", namespace="serving")
            objects = [o for file, text in made.items() if not file.endswith(".txt") for o in manifests(text)]
            wrong += [f"chart, {name}: {each}" for found in objects for each in invalid(found)]
            print(f"chart, {name}: {', '.join(sorted(found['kind'] for found in objects))}")
        for said_of, values in REFUSED.items():
            try:
                loaded.validate_schema(values)
                loaded.render(values, name="llm")
            except helm.HelmError as error:
                if said_of not in str(error):
                    wrong.append(f"chart: {values} is refused by {error}")
            else:
                wrong.append(f"chart: {values} is not refused")
    return wrong


def files() -> list[str]:
    """Validates the manifests that are no chart."""
    wrong = []
    for path in sorted(DEPLOY.rglob("*.yaml")):
        if CHART in path.parents:
            continue
        objects = [each for each in manifests(path.read_text()) if "apiVersion" in each]
        foreign = [each for each in objects if each["apiVersion"].startswith(FOREIGN)]
        wrong += [f"{path.name}: {each}" for found in objects for each in invalid(found)]
        print(f"{path.relative_to(DEPLOY)}: {len(objects)} objects, {len(foreign)} of them without a schema")
    return wrong


def programs() -> list[str]:
    """Runs the linters of others."""
    rules = [
        "line-length: {max: 150}",
        "braces: {max-spaces-inside: 1}",
        "comments: {min-spaces-from-content: 1}",
        "document-start: disable",
        "truthy: {check-keys: false}",
        "indentation: disable",
    ]
    relaxed = "{extends: default, rules: {" + ", ".join(rules) + "}}"
    plain = [str(path) for path in DEPLOY.rglob("*.y*ml") if CHART / "templates" not in path.parents]
    proxy = {"HAPROXY_SOCKET": "/tmp/haproxy.sock", "HAPROXY_BIND": "127.0.0.1:8000",
             "OLD_SERVER": "127.0.0.1:8001", "NEW_SERVER": "127.0.0.1:8002"}  # fmt: skip
    wrong = []
    for command in (
        ["yamllint", "--strict", "-d", relaxed, *plain],
        ["hadolint", str(DEPLOY / "Dockerfile")],
        ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(DEPLOY / "compose.yml")],
        ["ansible-playbook", "--syntax-check", "-i", "rvllm,", str(DEPLOY / "ansible" / "rvllm.yml")],
        ["promtool", "check", "config", str(DEPLOY / "prometheus.yml")],
        ["haproxy", "-c", "-f", str(DEPLOY / "rollout" / "haproxy.cfg")],
        ["systemd-analyze", "verify", "--man=no", *map(str, sorted((DEPLOY / "systemd").glob("*.service")))],
    ):
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        program = shutil.which(command[0], path=path)
        if program is None:
            print(f"{command[0]} is not installed: not run")
            continue
        done = subprocess.run(
            [program, *command[1:]],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **proxy, "LC_ALL": "C.UTF-8"},
        )
        said = (done.stdout + done.stderr).strip()
        if command[0] == "systemd-analyze":  # the program it starts is not installed here
            said = "\n".join(line for line in said.splitlines() if "is not executable" not in line)
            done.returncode = int(bool(said))
        print(f"{command[0]}: {'clean' if done.returncode == 0 else 'complains'}")
        if done.returncode:
            wrong.append(f"{command[0]}: {said}")
    return wrong


def main() -> int:
    """Everything; prints what is wrong."""
    wrong = [*chart(), *files(), *programs()]
    print("\n".join(wrong) or "nothing wrong", file=sys.stderr if wrong else sys.stdout)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
