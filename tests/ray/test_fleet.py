"""Which of Ray's errors mean what. Replicas themselves: scripts/ray_tables.py."""

import pytest

from rvllm.errors import RvllmError
from rvllm.ray.fleet import HandleFleet

pytest.importorskip("ray.serve", reason="needs Ray Serve (the ray extra)")


class Handle:
    """A DeploymentHandle that is asked for nothing."""

    def options(self, **_: object) -> "Handle":
        return self


def test_errors_of_lost_replicas_and_of_full_queues() -> None:
    from ray.exceptions import ActorUnavailableError, RayActorError, TaskCancelledError, WorkerCrashedError
    from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError

    fleet = HandleFleet(Handle())
    unavailable = ReplicaUnavailableError.__new__(ReplicaUnavailableError)
    lost = [RayActorError(), ActorUnavailableError("x", None), WorkerCrashedError(), TaskCancelledError()]
    assert all(fleet.lost(error) for error in [*lost, unavailable])
    assert not any(fleet.refusal(error) for error in [*lost, unavailable])
    full = BackPressureError(9, 9)
    assert not fleet.lost(full)
    assert "--max-queue" in (fleet.refusal(full) or "")
    for other in (RvllmError("x"), ValueError()):
        assert not fleet.lost(other)
        assert fleet.refusal(other) is None


def test_an_application_is_made_of_front_ends_and_replicas() -> None:
    """Ray's own classes take what is made; nothing is started."""
    from rvllm.ray import app

    values = {"models": [{"name": "a b/c", "replicas": {"min": 1, "max": 3}, "gpus": 0.5}, {"name": "d"}]}
    made = app({**values, "frontends": 2})
    assert made._bound_deployment.num_replicas == 2
    engines = [one._bound_deployment for one in made._bound_deployment.init_args[1:]]
    assert [engine.name for engine in engines] == ["engine-a-b-c", "engine-d"]
    assert engines[0].ray_actor_options["num_gpus"] == 0.5
