"""Many GPUs with Ray Serve (extra `ray`): replicas of an engine behind the same HTTP application.

    from ray import serve
    serve.run(rvllm.ray.build_app(config))

`import_path: rvllm.ray:app` in a Serve config, whose `args` are those of `rvllm ray serve CONFIG`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rvllm.ray.config import RayConfig


def build_app(config: RayConfig) -> Any:
    """The Serve application for a configuration. Raises UsageError without the extra."""
    from rvllm.ray.application import application

    return application(config)


def app(args: dict[str, Any]) -> Any:
    """The same from plain values, as Serve's own config files give them."""
    from rvllm.ray.config import parse

    return build_app(parse(args))
