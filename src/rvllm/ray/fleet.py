"""A DeploymentHandle as `rvllm.ray.client` wants it: what crosses to replicas, and which errors mean what."""

from __future__ import annotations

from typing import Any

from rvllm.engine.ipc.messages import Embed, Generate, Ready


class HandleFleet:
    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._streams = handle.options(method_name="generate", stream=True)

    async def ready(self) -> Ready:
        """What the first replica that has loaded says of itself."""
        found: Ready = await self._handle.ready.remote()
        return found

    def stream(self, request: Generate | Embed, session: str | None) -> Any:
        """An async iterator of lists of Outputs from one replica, with a `cancel` method."""
        return self._streams.remote(request, session=session)

    async def ask_all(self, method: str) -> list[Any]:
        """The answers of all replicas that give one; those of lost ones are left out."""
        answers = await self._handle.broadcast(method).results_async(return_exceptions=True)
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    def lost(self, error: BaseException) -> bool:
        """Whether a replica, or its node, is gone, cannot be reached, or has given up what it did."""
        from ray import exceptions
        from ray.serve.exceptions import ReplicaUnavailableError

        kinds = (
            exceptions.RayActorError,
            exceptions.NodeDiedError,
            exceptions.ObjectLostError,
            exceptions.WorkerCrashedError,
            exceptions.RpcError,
            exceptions.TaskCancelledError,  # by the replica's end: who cancels here does not look any more
            ReplicaUnavailableError,
        )
        return isinstance(error, kinds)

    def refusal(self, error: BaseException) -> str | None:
        """Why no replica takes the request at the moment, if that is what the error says."""
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

        if isinstance(error, BackPressureError):
            return "too many requests wait for a replica (--max-queue)"
        if isinstance(error, DeploymentUnavailableError):
            return "the model's replicas cannot be started at the moment"
        return None
