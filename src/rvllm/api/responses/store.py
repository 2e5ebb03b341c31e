"""Where responses and conversations are kept: SQLite, bounded in size and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from rvllm.api.disk import open_database
from rvllm.api.schemas.items import Item
from rvllm.api.schemas.responses import ResponseAnswer, ResponseError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, at REAL NOT NULL, size INTEGER NOT NULL,
    body BLOB NOT NULL, context BLOB NOT NULL, events BLOB);
CREATE INDEX IF NOT EXISTS responses_at ON responses (at);
CREATE TABLE IF NOT EXISTS conversations (
    id TEXT PRIMARY KEY, at REAL NOT NULL, size INTEGER NOT NULL, created INTEGER NOT NULL,
    metadata BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS conversations_at ON conversations (at);
CREATE TABLE IF NOT EXISTS items (
    number INTEGER PRIMARY KEY, conversation TEXT NOT NULL, id TEXT NOT NULL, body BLOB NOT NULL,
    UNIQUE (conversation, id))
"""
_encode = msgspec.json.Encoder().encode
OVERHEAD = 512  # bytes that an entry counts for, beside what it holds


class Conversation(msgspec.Struct, kw_only=True):
    """A conversation as clients see it."""

    id: str
    object: str = "conversation"
    created_at: int
    metadata: dict[str, str]


class StoredResponse(msgspec.Struct):
    """A response, the items it answers (with those of earlier responses), and its events if any were kept."""

    response: ResponseAnswer
    context: list[Item]
    events: list[dict[str, Any]] | None


class ResponseStore:
    """Keeps what was answered until it is too old, or the oldest must make room.

    ttl: seconds since the last change, 0: for ever; limit: bytes of JSON in all.
    """

    def __init__(self, path: str, ttl: float, limit: int, clock: Callable[[], float] = time.time) -> None:
        self._db = open_database(path, _SCHEMA, "--responses-db")
        self._ttl, self._limit, self._clock = ttl, limit, clock
        sizes = [
            self._db.execute(f"SELECT coalesce(sum(size), 0) FROM {table}").fetchone()[0]
            for table in ("responses", "conversations")
        ]
        self.size: int = sum(sizes)  # bytes of JSON that are kept
        self._fail_interrupted()

    def close(self) -> None:
        self._db.close()

    def put(
        self, response: ResponseAnswer, context: Sequence[Item], events: Sequence[Any] | None = None
    ) -> None:
        """Keeps a response, in place of what was kept under its id."""
        body, given = _encode(response), _encode(list(context))
        shown = None if events is None else _encode(list(events))
        size = OVERHEAD + len(body) + len(given) + len(shown or b"")
        row = self._db.execute("SELECT size FROM responses WHERE id = ?", (response.id,)).fetchone()
        self._db.execute("INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?, ?)",
                         (response.id, self._clock(), size, body, given, shown))  # fmt: skip
        self._grow(size - (row[0] if row else 0))

    def get(self, name: str) -> StoredResponse | None:
        """The response of that id; None when there is none any more."""
        self._expire()
        row = self._db.execute("SELECT body, context, events FROM responses WHERE id = ?", (name,)).fetchone()
        if row is None:
            return None
        body, context, events = row
        return StoredResponse(
            msgspec.json.decode(body, type=ResponseAnswer),
            msgspec.json.decode(context),
            None if events is None else msgspec.json.decode(events),
        )

    def delete(self, name: str) -> bool:
        """Forgets a response; False when there was none."""
        return self._delete("responses", name)

    def put_conversation(self, conversation: Conversation) -> None:
        """Keeps a new conversation or its new metadata."""
        metadata, name = _encode(conversation.metadata), conversation.id
        row = self._db.execute("SELECT length(metadata) FROM conversations WHERE id = ?", (name,)).fetchone()
        grown = len(metadata) - row[0] if row else len(metadata) + OVERHEAD
        self._db.execute(
            "INSERT INTO conversations VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
            "metadata = excluded.metadata, at = excluded.at, size = size + excluded.size",
            (name, self._clock(), grown, conversation.created_at, metadata),
        )
        self._grow(grown)

    def conversation(self, name: str) -> Conversation | None:
        """The conversation of that id; None when there is none any more."""
        self._expire()
        row = self._db.execute("SELECT created, metadata FROM conversations WHERE id = ?", (name,)).fetchone()
        if row is None:
            return None
        return Conversation(id=name, created_at=row[0], metadata=msgspec.json.decode(row[1]))

    def delete_conversation(self, name: str) -> bool:
        """Forgets a conversation with its items; False when there was none."""
        self._db.execute("DELETE FROM items WHERE conversation = ?", (name,))
        return self._delete("conversations", name)

    def add_items(self, conversation: str, items: Sequence[Item]) -> None:
        """Puts items at the end of a conversation; those it has already stay where they are."""
        grown = 0
        with self._db:
            self._db.execute("BEGIN")
            for item in items:
                body = _encode(item)
                added = self._db.execute(
                    "INSERT OR IGNORE INTO items (conversation, id, body) VALUES (?, ?, ?)",
                    (conversation, item["id"], body),
                )
                grown += (len(body) + OVERHEAD) * added.rowcount
            self._db.execute("UPDATE conversations SET at = ?, size = size + ? WHERE id = ?",
                             (self._clock(), grown, conversation))  # fmt: skip
        self._grow(grown)

    def items(self, conversation: str) -> list[Item]:
        """A conversation's items in order."""
        rows = self._db.execute(
            "SELECT body FROM items WHERE conversation = ? ORDER BY number", (conversation,)
        )
        return [msgspec.json.decode(body) for (body,) in rows]

    def delete_item(self, conversation: str, name: str) -> bool:
        """Takes an item out of a conversation; False when it had none of that id."""
        key = (conversation, name)
        row = self._db.execute(
            "SELECT length(body) FROM items WHERE conversation = ? AND id = ?", key
        ).fetchone()
        if row is None:
            return False
        size = row[0] + OVERHEAD
        self._db.execute("DELETE FROM items WHERE conversation = ? AND id = ?", key)
        self._db.execute("UPDATE conversations SET size = size - ? WHERE id = ?", (size, conversation))
        self.size -= size
        return True

    def _delete(self, table: str, name: str) -> bool:
        row = self._db.execute(f"DELETE FROM {table} WHERE id = ? RETURNING size", (name,)).fetchone()
        if row is not None:
            self.size -= row[0]
        return row is not None

    def _grow(self, size: int) -> None:
        self.size += size
        self._expire()
        while self.size > self._limit and self._drop_oldest():
            pass

    def _expire(self) -> None:
        if not self._ttl:
            return
        before = self._clock() - self._ttl
        for table, drop in (("responses", self.delete), ("conversations", self.delete_conversation)):
            for (name,) in self._db.execute(f"SELECT id FROM {table} WHERE at < ?", (before,)).fetchall():
                drop(name)

    def _drop_oldest(self) -> bool:
        """Makes room: whatever has not changed for the longest time goes."""
        row = self._db.execute(
            "SELECT id, 'r', at FROM responses UNION ALL SELECT id, 'c', at FROM conversations "
            "ORDER BY at LIMIT 1"
        ).fetchone()
        if row is None:
            return False
        return self.delete(row[0]) if row[1] == "r" else self.delete_conversation(row[0])

    def _fail_interrupted(self) -> None:
        """Responses that a server before this one did not finish have failed."""
        for (name,) in self._db.execute("SELECT id FROM responses").fetchall():
            stored = self.get(name)
            if stored is not None and stored.response.status in ("queued", "in_progress"):
                stored.response.status = "failed"
                stored.response.error = ResponseError("server_error", "the server was stopped meanwhile")
                self.put(stored.response, stored.context, stored.events)
