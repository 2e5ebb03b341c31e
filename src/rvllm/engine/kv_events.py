"""What the prefix cache keeps and lets go, told to routers in vLLM's format (`--kv-events-config`).

A message on the PUB socket has three parts: topic, sequence number (8 bytes, big-endian) and a msgpack array
`[time, events, data_parallel_rank]`. Each event is a map with its name under `type`, as vLLM 0.24 and newer
write it, or an array that begins with its name, as those before did (vllm-project/vllm#42892). A ROUTER
socket answers the number of the first message that a subscriber has missed with all that are still kept, and
-1 with nothing at their end.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import msgspec
import zmq

from rvllm.engine.blocks import ROOT, Digest
from rvllm.errors import UsageError

FLAG = "--kv-events-config"
END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)
LOOK_SECONDS = 0.1  # how often the replay socket is looked at while no events come
CLOSE_SECONDS = 1.0
# vLLM's word for a device's own memory; routers take it for the fastest tier, which it is on a CPU too.
MEDIUM = "GPU"


class KvEventsConfig(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """vLLM's settings of the same names, and event_format: "map", or "array" for routers of before June 2026.

    buffer_steps: messages kept for replay. hwm: messages that may wait for one slow subscriber; then it
    misses some, which it sees by their numbers. max_queue_size: batches that may wait to be sent.
    """

    enable_kv_cache_events: bool = False
    publisher: str = "zmq"
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000
    topic: str = ""
    event_format: str = "map"


def parse_config(text: str | None) -> KvEventsConfig | None:
    """The settings in `--kv-events-config`; None when it asks for no events. Raises UsageError."""
    if text is None:
        return None
    try:
        given = msgspec.json.decode(text, type=dict[str, Any])
        config = msgspec.convert(given, KvEventsConfig)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        example = '{"enable_kv_cache_events": true, "endpoint": "tcp://*:5557"}'
        raise UsageError(f"{FLAG}: {error}; it takes JSON such as {example}") from None
    if config.publisher not in ("zmq", "null"):
        raise UsageError(f"{FLAG}: publisher {config.publisher!r} is not one of zmq, null")
    if config.event_format not in ("map", "array"):
        raise UsageError(f"{FLAG}: event_format {config.event_format!r} is not one of map, array")
    if min(config.buffer_steps, config.hwm, config.max_queue_size) < 1:
        raise UsageError(f"{FLAG}: buffer_steps, hwm and max_queue_size must be at least 1")
    if config.publisher == "null" or given.get("enable_kv_cache_events") is False:
        return None
    if not config.enable_kv_cache_events:
        raise UsageError(f'{FLAG}: without "enable_kv_cache_events": true it asks for nothing')
    return config


class BlockStored(msgspec.Struct, tag=True, gc=False):
    """Full blocks that follow each other can be found from now on; token_ids are those of all of them.

    lora_id, lora_name, extra_keys: vLLM's; there are none here.
    """

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: None = None
    medium: str = MEDIUM
    lora_name: None = None
    extra_keys: None = None


class BlockRemoved(msgspec.Struct, tag=True, gc=False):
    """Blocks whose room was given to something else."""

    block_hashes: list[int]
    medium: str = MEDIUM


class AllBlocksCleared(msgspec.Struct, tag=True, gc=False):
    """The prefix cache was emptied."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, array_like=True, gc=False):
    """What one step changed; ts: seconds since the epoch."""

    ts: float
    events: list[Event]
    data_parallel_rank: int = 0


def positional(batch: EventBatch) -> tuple[float, list[list[Any]], int]:
    """The batch with its events as arrays: their name, then their fields in order."""
    events = [[type(event).__name__, *msgspec.structs.astuple(event)] for event in batch.events]
    return batch.ts, events, batch.data_parallel_rank


def block_hash(digest: Digest) -> int:
    """A digest as vLLM shows its own: the last 8 bytes as an unsigned number."""
    return int.from_bytes(digest[-8:], "big")


class KvEvents:
    """Collects what happens to the prefix cache in a step. Belongs to the engine's thread."""

    def __init__(self, send: Callable[[EventBatch], None], block_size: int) -> None:
        self._send, self._block_size = send, block_size
        self._events: list[Event] = []

    def stored(self, parent: Digest, digests: Sequence[Digest], tokens: array[int]) -> None:
        """These blocks in a row, after the one with the digest `parent`, hold `tokens`."""
        hashes = [block_hash(digest) for digest in digests]
        before = None if parent == ROOT else block_hash(parent)
        self._events.append(BlockStored(hashes, before, tokens.tolist(), self._block_size))

    def removed(self, digest: Digest) -> None:
        """This block was given to something else."""
        last = self._events[-1] if self._events else None
        if isinstance(last, BlockRemoved):
            last.block_hashes.append(block_hash(digest))
        else:
            self._events.append(BlockRemoved([block_hash(digest)]))

    def cleared(self) -> None:
        """Nothing is kept any more."""
        self._events.append(AllBlocksCleared())

    def flush(self) -> None:
        """Sends what has happened, if anything has."""
        if self._events:
            self._send(EventBatch(time.time(), self._events))
            self._events = []


class Publisher:
    """Sends batches from a thread of its own, so that the engine waits for nobody."""

    def __init__(self, config: KvEventsConfig) -> None:
        """Raises UsageError when an endpoint cannot be had."""
        self._waiting: queue.Queue[tuple[bytes, EventBatch] | None] = queue.Queue(config.max_queue_size)
        self._kept: deque[tuple[bytes, bytes]] = deque(maxlen=config.buffer_steps)
        self._topic, self._as_arrays = config.topic.encode(), config.event_format == "array"
        self._sequence = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._pub = self._context.socket(zmq.PUB)
        self._pub.set_hwm(config.hwm)
        self._replay: zmq.Socket[bytes] | None = None
        try:
            _open(self._pub, config.endpoint)
            if config.replay_endpoint is not None:
                self._replay = self._context.socket(zmq.ROUTER)
                self._replay.set_hwm(config.buffer_steps + 1)  # one whole answer, not more
                _open(self._replay, config.replay_endpoint)
        except UsageError:
            self._close()
            raise
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    def send(self, batch: EventBatch) -> None:
        """Queues a batch. With a full queue it is lost, which subscribers see by its number."""
        number = self._sequence.to_bytes(8, "big")
        self._sequence += 1
        with suppress(queue.Full):
            self._waiting.put_nowait((number, batch))

    def close(self) -> None:
        """Sends what waits and closes."""
        with suppress(queue.Full):
            self._waiting.put(None, timeout=CLOSE_SECONDS)
            self._thread.join(CLOSE_SECONDS)
        if not self._thread.is_alive():
            self._close()

    def _close(self) -> None:
        for socket in (self._pub, self._replay):
            if socket is not None:
                socket.close(int(CLOSE_SECONDS * 1000))
        self._context.term()

    def _run(self) -> None:
        encode = msgspec.msgpack.Encoder().encode
        pause = None if self._replay is None else LOOK_SECONDS
        while True:
            if self._replay is not None:
                self._answer_replays(self._replay)
            try:
                waiting = self._waiting.get(timeout=pause)
            except queue.Empty:
                continue
            if waiting is None:
                return
            number, batch = waiting
            payload = encode(positional(batch) if self._as_arrays else batch)
            self._kept.append((number, payload))
            self._pub.send_multipart((self._topic, number, payload))

    def _answer_replays(self, replay: zmq.Socket[bytes]) -> None:
        while replay.poll(0):
            asked = replay.recv_multipart()
            if len(asked) != 3 or len(asked[2]) != 8:
                logging.getLogger("rvllm").warning("%s: not a request for a replay", FLAG)
                continue
            client, empty, first = asked
            for number, payload in self._kept:
                if number >= first:
                    replay.send_multipart((client, empty, number, payload))
            replay.send_multipart((client, empty, END_OF_REPLAY, b""))


def _open(socket: zmq.Socket[bytes], endpoint: str) -> None:
    """Binds an address of this machine; connects a PUB socket to another's, as vLLM does.

    Raises UsageError.
    """
    ours = "*" in endpoint or "::" in endpoint or endpoint.startswith(("ipc://", "inproc://"))
    try:
        if ours or socket.type == zmq.ROUTER:
            socket.bind(endpoint)
        else:
            socket.connect(endpoint)
    except zmq.ZMQError as error:
        raise UsageError(f"{FLAG}: cannot open {endpoint}: {error.strerror}") from None
