"""A DeploymentHandle as `rvllm.ray.client` wants it: what crosses to replicas, and which errors mean what."""

from __future__ import annotations

from typing import Any

from rvllm.engine.ipc.messages import Embed, Generate, Ready


class HandleFleet:
    """Implements `rvllm.ray.client.Fleet`."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._streams = handle.options(method_name="generate", stream=True)

    async def ready(self) -> Ready:
        """What the first replica that has loaded says of itself."""
        found: Ready = await self._handle.ready.remote()
        return found

    def stream(self, request: Generate | Embed, session: str | None) -> Any:
        """A DeploymentResponseGenerator."""
        return self._streams.remote(request, session=session)

    async def ask_all(self, method: str) -> list[Any]:
        """The answers of all replicas that give one; those of lost ones are left out."""
        answers = await self._handle.broadcast(method).results_async(return_exceptions=True)
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    def lost(self, error: BaseException) -> bool:
        """Whether a replica, or its node, is gone or cannot be reached."""
        from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError

        return isinstance(error, RayActorError | NodeDiedError | ObjectLostError | WorkerCrashedError)

    def busy(self, error: BaseException) -> bool:
        """Whether more requests wait than may."""
        from ray.serve.exceptions import BackPressureError

        return isinstance(error, BackPressureError)
