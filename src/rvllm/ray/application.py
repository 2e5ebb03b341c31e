"""The Serve application: a deployment of front ends, and one of engines for every model."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

from rvllm.errors import UsageError
from rvllm.extras import install_command
from rvllm.ray.config import ModelSpec, RayConfig, plain

BLOCK_SIZE = 16  # of every backend; a replica's `Ready` says the same
HEALTH_SECONDS = 5.0
QUIET = {"enable_access_log": False}  # a line for every call would be one a second; ours has --access-log
MAX_FRONTEND_REQUESTS = 4096  # at once; each is little more than a buffer


def require_ray() -> None:
    """Raises UsageError when Ray Serve is not installed or too old."""
    try:
        import ray.serve
    except ImportError:
        raise UsageError(f"rvllm ray needs Ray Serve: {install_command('ray')}") from None
    if tuple(map(int, ray.__version__.split(".")[:2])) < (2, 60):
        raise UsageError(f"rvllm ray needs Ray 2.60 or newer, this is {ray.__version__}")


def application(config: RayConfig) -> Any:
    """A Serve Application, for `serve.run`. Raises UsageError without Ray."""
    require_ray()
    from ray import serve

    from rvllm.ray.frontend import Frontend

    engines = [_engine(config, model) for model in config.models]
    frontend = serve.deployment(serve.ingress()(Frontend)).options(
        name="frontend",
        num_replicas=config.frontends,
        max_ongoing_requests=MAX_FRONTEND_REQUESTS,
        health_check_period_s=HEALTH_SECONDS,
        logging_config=QUIET,
        graceful_shutdown_timeout_s=config.server_config(config.models[0]).drain_timeout,
        ray_actor_options={"num_cpus": config.frontend_cpus, "resources": config.frontend_resources},
    )
    return frontend.bind(plain(config), *engines)


def _engine(config: RayConfig, model: ModelSpec) -> Any:
    """The deployment of a model's replicas."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from rvllm.ray.replica import EngineReplica
    from rvllm.ray.router import PrefixRouter

    server, engine = config.server_config(model), model.engine_config()
    options: dict[str, Any] = {
        "name": "engine-" + re.sub(r"[^A-Za-z0-9_.-]", "-", model.name),
        "max_ongoing_requests": engine.max_num_seqs,
        "max_queued_requests": server.max_queue,
        "health_check_period_s": HEALTH_SECONDS,
        "logging_config": QUIET,
        "graceful_shutdown_timeout_s": server.drain_timeout,
        "ray_actor_options": {
            "num_cpus": model.cpus,
            "num_gpus": model.gpus,
            "resources": model.resources,
        },
        "request_router_config": RequestRouterConfig(
            request_router_class=PrefixRouter,
            request_router_kwargs={
                "block_size": BLOCK_SIZE,
                "prefix": model.routing.prefix and engine.enable_prefix_caching,
                "request_blocks": model.routing.request_blocks,
                "session_blocks": model.routing.session_blocks,
            },
        ),
        **_replicas(model),
    }
    return (
        serve.deployment(EngineReplica).options(**options).bind(asdict(engine), server.engine_stall_seconds)
    )


def _replicas(model: ModelSpec) -> dict[str, Any]:
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    from rvllm.ray.scaling import ScalePolicy

    scaling = model.scaling
    if scaling.min == scaling.max:
        return {"num_replicas": scaling.min}
    targets = {"target_requests": scaling.target_requests, "target_kv_use": scaling.target_kv_use}
    config = AutoscalingConfig(
        min_replicas=scaling.min,
        max_replicas=scaling.max,
        upscale_delay_s=scaling.upscale_delay,
        downscale_delay_s=scaling.downscale_delay,
        look_back_period_s=scaling.look_back,
        policy=AutoscalingPolicy(policy_function=ScalePolicy, policy_kwargs=targets),
    )
    return {"autoscaling_config": config}
