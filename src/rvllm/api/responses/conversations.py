"""OpenAI's `/v1/conversations`: items that responses are added to and answered from."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import msgspec

from rvllm.api.http.errors import unknown
from rvllm.api.http.exchange import Exchange
from rvllm.api.http.pagination import Page, Query, page
from rvllm.api.responses.store import Conversation, ResponseStore
from rvllm.api.schemas.answers import now
from rvllm.api.schemas.items import Item, checked_items
from rvllm.api.schemas.responses import check_metadata


class ConversationRequest(msgspec.Struct, kw_only=True):
    """The body of `POST /v1/conversations`, and of its change (metadata alone)."""

    items: list[dict[str, Any]] | None = None
    metadata: dict[str, str] | None = None


class ItemsRequest(msgspec.Struct, kw_only=True):
    """The body of `POST /v1/conversations/{id}/items`."""

    items: list[dict[str, Any]]


class Conversations:
    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    async def create(self, exchange: Exchange, request: ConversationRequest) -> None:
        check_metadata(request.metadata)
        items = checked_items(request.items or [], _no_reference, "items")
        made = Conversation(id=f"conv_{uuid4().hex}", created_at=now(), metadata=request.metadata or {})
        self._store.put_conversation(made)
        self._store.add_items(made.id, items)
        await exchange.json(made)

    async def retrieve(self, exchange: Exchange, request: None) -> None:
        await exchange.json(self._found(exchange))

    async def update(self, exchange: Exchange, request: ConversationRequest) -> None:
        """`POST /v1/conversations/{id}`: new metadata."""
        check_metadata(request.metadata)
        found = self._found(exchange)
        found.metadata = request.metadata or {}
        self._store.put_conversation(found)
        await exchange.json(found)

    async def delete(self, exchange: Exchange, request: None) -> None:
        found = self._found(exchange)
        self._store.delete_conversation(found.id)
        await exchange.json({"id": found.id, "object": "conversation.deleted", "deleted": True})

    async def add_items(self, exchange: Exchange, request: ItemsRequest) -> None:
        name = self._found(exchange).id
        items = checked_items(request.items, _no_reference, "items")
        self._store.add_items(name, items)
        names = [str(item["id"]) for item in items]
        await exchange.json(
            Page(data=items, first_id=names[0] if names else None, last_id=names[-1] if names else None)
        )

    async def list_items(self, exchange: Exchange, request: None) -> None:
        items = self._store.items(self._found(exchange).id)
        await exchange.json(page(items, lambda item: str(item["id"]), Query(exchange)))

    async def get_item(self, exchange: Exchange, request: None) -> None:
        wanted = exchange.scope["path_params"]["item"]
        for item in self._store.items(self._found(exchange).id):
            if item["id"] == wanted:
                await exchange.json(item)
                return
        raise unknown("item", wanted)

    async def delete_item(self, exchange: Exchange, request: None) -> None:
        """`DELETE /v1/conversations/{id}/items/{item}`: answers with the conversation."""
        found, wanted = self._found(exchange), exchange.scope["path_params"]["item"]
        if not self._store.delete_item(found.id, wanted):
            raise unknown("item", wanted)
        await exchange.json(found)

    def _found(self, exchange: Exchange) -> Conversation:
        name = exchange.scope["path_params"]["id"]
        found = self._store.conversation(name)
        if found is None:
            raise unknown("conversation", name)
        return found


def _no_reference(name: str) -> Item | None:
    return None
