"""`rvllm.ray.routing` as a request router of Ray Serve."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from rvllm.engine.blocks import Digest
from rvllm.engine.ipc.messages import Embed, Generate
from rvllm.ray.routing import Policy, digests

CHOICES = 3  # replicas that are named one by one; when all are full, the rest is asked in any order


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Sends a `Generate` where its prompt's beginning is, unless too much is going on there.

    The first argument of the replicas' methods is the message, and `session` a name or None.
    """

    def initialize_state(self, **settings: Any) -> None:
        """Ray passes `request_router_kwargs`: block_size, and the fields of `Policy`."""
        self._block_size = int(settings.pop("block_size"))
        self._policy = Policy(**settings)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Ray tells which replicas run, and what they have said of themselves."""
        super().update_replicas(replicas)
        names = {name_of(replica.replica_id) for replica in replicas}
        self._policy.keep(names)
        for replica in replicas:
            blocks = (replica.routing_stats or {}).get("blocks_total")
            if blocks:
                self._policy.capacity[name_of(replica.replica_id)] = int(blocks)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The cheapest replica first, then the next, then all others."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        blocks, count = self._blocks(pending_request)
        by_name = {name_of(replica.replica_id): replica for replica in candidate_replicas}
        ongoing = {}
        for name, replica in by_name.items():
            length = self.replica_queue_len_cache.get(replica.replica_id)
            if length is not None:
                ongoing[name] = length
        session = pending_request.kwargs.get("session")
        order = [name for _, name in self._policy.rank(blocks, count, list(by_name), session, ongoing)]
        self._policy.place(id(pending_request), order[0], blocks, time.monotonic())
        ranks = [[by_name[name]] for name in order[:CHOICES]]
        rest = [by_name[name] for name in order[CHOICES:]]
        return [*ranks, rest] if rest else ranks

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """The replica has taken the request; it may be another one than the first choice."""
        key, name = id(pending_request), name_of(replica_id)
        if self._policy.chosen(key) != name:
            self._policy.place(key, name, self._blocks(pending_request)[0], time.monotonic())
        self._policy.confirm(key, pending_request.metadata.internal_request_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """A request has left the replica."""
        self._policy.end(internal_request_id, name_of(replica_id))

    def _blocks(self, pending: PendingRequest) -> tuple[Sequence[Digest], int]:
        """(hashes of the prompt's full blocks, its blocks); none for a call that is no request."""
        message = pending.args[0] if pending.args else None
        if not isinstance(message, Generate | Embed):
            return [], 0
        tokens = message.prompt_token_ids
        count = -(-len(tokens) // self._block_size)
        if isinstance(message, Embed) or not self._policy.prefix:  # texts for encoders share nothing
            return [], count
        return digests(tokens, self._block_size), count


def name_of(replica_id: ReplicaID) -> str:
    return str(replica_id.unique_id)
