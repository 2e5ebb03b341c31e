"""What `rvllm ray serve CONFIG` reads: models by name, replicas, how they are scaled and routed to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from rvllm.config import EngineConfig, ServerConfig
from rvllm.errors import UsageError
from rvllm.settings import build, settings_of

T = TypeVar("T")
METRICS_SECONDS = 10.0  # how often Ray's replicas tell how they are
PROXY = ("host", "port", "served_model_name")  # settings of `server:` that have a place of their own here


class Http(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Where Ray's proxies listen; one on every node that has replicas."""

    host: str = "127.0.0.1"
    port: int = 8000


class Routing(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How a replica is chosen; all in KV blocks of 16 prompt tokens, see `rvllm.ray.routing`.

    prefix: look for the replica that holds the prompt's beginning. request_blocks: what each request that a
    replica has counts for. session_blocks: what a session's own replica is ahead of others.
    """

    prefix: bool = True
    request_blocks: int = 4
    session_blocks: int = 16


class Replicas(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How many replicas; more or fewer as there is work, where max is larger than min.

    target_requests: running and waiting requests a replica. target_kv_use: share of its KV blocks in use.
    Delays in seconds: how long more, or fewer, must be wanted.
    """

    min: int = 1
    max: int = 1
    target_requests: float = 32.0
    target_kv_use: float = 0.7
    upscale_delay: float = 10.0
    downscale_delay: float = 300.0
    look_back: float = 30.0


class ModelSpec(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A model, and the share of a machine that each of its replicas takes.

    gpus: below 1, several replicas share a GPU; 0: the CPU. engine: flags of `rvllm serve`, with underscores.
    """

    name: str
    engine: dict[str, Any] = {}
    replicas: int | Replicas = 1
    gpus: float = 1.0
    cpus: float = 1.0
    resources: dict[str, float] = {}
    routing: Routing = Routing()

    @property
    def scaling(self) -> Replicas:
        """The replicas, also where only their number is given."""
        return (
            self.replicas if isinstance(self.replicas, Replicas) else Replicas(self.replicas, self.replicas)
        )

    def engine_config(self) -> EngineConfig:
        """The engine's settings. Raises UsageError naming the model and the setting."""
        given = dict(self.engine)
        if 0 < self.gpus < 1:  # several engines share the card
            if "gpu_memory_utilization" in given:
                raise UsageError(
                    f"models: {self.name}: engine: gpu_memory_utilization counts what others on the card "
                    "have in use; with a share of a card give gpu_memory_share"
                )
            given.setdefault("gpu_memory_share", round(EngineConfig.gpu_memory_utilization * self.gpus, 4))
        if self.gpus == 0:
            given.setdefault("device", "cpu")
        return _settings(EngineConfig, given, f"models: {self.name}: engine")


class RayConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A whole application.

    server: flags of `rvllm serve`, with underscores. frontends: processes that speak HTTP, tokenise and
    route; with more than one, or with several models, what is kept between requests is not served.
    replays: how often a request may begin anew when its replica is lost.
    """

    models: list[ModelSpec]
    http: Http = Http()
    server: dict[str, Any] = {}
    frontends: int = 1
    frontend_cpus: float = 1.0
    frontend_resources: dict[str, float] = {}
    replays: int = 2

    def server_config(self, model: ModelSpec) -> ServerConfig:
        """The server's settings for one of the models. Raises UsageError naming the setting."""
        return _settings(ServerConfig, {**self.server, "served_model_name": model.name}, "server")

    @property
    def stateful(self) -> bool:
        """Whether what is kept between requests (responses, files, batches) is in one place."""
        return self.frontends == 1 and len(self.models) == 1


def _settings(cls: type[T], given: Mapping[str, Any], where: str) -> T:
    known = {f.name for f, _ in settings_of(cls)}
    for name in given:
        if name not in known:
            raise UsageError(f"{where}: there is no setting {name!r}")
    try:
        return build(cls, given, {})
    except UsageError as error:
        raise UsageError(f"{where}: {str(error).removeprefix('--')}") from None


def load(file: Path) -> RayConfig:
    """Reads a YAML file. Raises UsageError naming the file and what is wrong with it."""
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UsageError(f"cannot read {file}: {reason}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{file} is no YAML: {str(error).splitlines()[0]}") from None
    try:
        return parse(values)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None


def parse(values: Any) -> RayConfig:
    """A configuration from plain values. Raises UsageError that says which is wrong."""
    try:
        config = msgspec.convert(values, RayConfig)
    except msgspec.ValidationError as error:
        raise UsageError(str(error)) from None
    names = [model.name for model in config.models]
    if not names or "" in names or len(set(names)) < len(names):
        raise UsageError("models: give one or more, each with a name of its own")
    for name in PROXY:
        if name in config.server:
            raise UsageError(f"server: {name} is not set here: http and the models' names say it")
    if config.frontends < 1 or config.replays < 0:
        raise UsageError("frontends must be at least 1 and replays at least 0")
    for model in config.models:
        _check(model)
        model.engine_config()
        config.server_config(model)
    return config


def _check(model: ModelSpec) -> None:
    scaling, where = model.scaling, f"models: {model.name}"
    if not 1 <= scaling.min <= scaling.max:
        raise UsageError(f"{where}: replicas: min must be at least 1 and max at least min")
    if not 0 <= model.gpus <= 1:
        raise UsageError(f"{where}: gpus must be 0, a fraction or 1: an engine runs on one GPU")
    if scaling.look_back <= METRICS_SECONDS:
        raise UsageError(f"{where}: replicas: look_back must be above {METRICS_SECONDS:g} s")
    if scaling.target_requests <= 0 or not 0 < scaling.target_kv_use <= 1:
        raise UsageError(f"{where}: replicas: target_requests must be above 0, target_kv_use in (0, 1]")
    if min(model.routing.request_blocks, model.routing.session_blocks) < 0:
        raise UsageError(f"{where}: routing: blocks must not be negative")


def plain(config: RayConfig) -> dict[str, Any]:
    """The configuration as values that any process can read, whatever its version of these classes."""
    found: dict[str, Any] = msgspec.to_builtins(config)
    return found
