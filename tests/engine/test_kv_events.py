"""KV events as routers read them: with vLLM's own types, and by position as routers did before vLLM 0.24.

The oracle of what is told is the prefix cache itself: an index that is fed by the events alone must hold what
the cache holds after every step.
"""

from __future__ import annotations

import json
import random
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from rvllm.backends.base import Limits
from rvllm.config import EngineConfig
from rvllm.engine.blocks import chain
from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.messages import Generate, Sampling
from rvllm.engine.kv_events import AllBlocksCleared as Cleared
from rvllm.engine.kv_events import BlockRemoved as Removed
from rvllm.engine.kv_events import BlockStored as Stored
from rvllm.engine.kv_events import EventBatch, parse_config, positional
from rvllm.errors import UsageError
from rvllm.settings import build
from support.doubles.engine import PagedDouble, facts

BLOCK = 16
TOPIC = "kv@pod-1@tiny"


class Event(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    """vLLM's KVCacheEvent, as it declares it since 0.24 (vllm/distributed/kv_events.py); so those below."""


class BlockStored(Event):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None


class BlockRemoved(Event):
    block_hashes: list[int]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(Event):
    pass


class Batch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]


class Subscriber:
    """A router: keeps the hashes that it was told of, and the tokens behind each."""

    def __init__(self, endpoint: str, replay: str, topic: str = "kv@") -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.SUB)
        self.socket.connect(endpoint)
        self.socket.setsockopt_string(zmq.SUBSCRIBE, topic)
        self.replay = self.context.socket(zmq.DEALER)
        self.replay.connect(replay)
        self.known: dict[int, list[int]] = {}
        self.next = 0
        self.payloads: list[bytes] = []

    def read(self, wait: int = 2000) -> bool:
        if not self.socket.poll(wait):
            return False
        topic, number, payload = self.socket.recv_multipart()
        assert topic.decode() == TOPIC
        assert int.from_bytes(number, "big") == self.next
        self.next += 1
        self.take(payload)
        return True

    def take(self, payload: bytes) -> None:
        self.payloads.append(payload)
        batch = msgspec.msgpack.decode(payload, type=Batch)
        assert abs(batch.ts - time.time()) < 60
        for event in batch.events:
            if isinstance(event, BlockStored):
                assert event.block_size == BLOCK
                assert event.medium == "GPU"
                assert len(event.token_ids) == BLOCK * len(event.block_hashes)
                if event.parent_block_hash is not None:
                    assert event.parent_block_hash in self.known
                before = [] if event.parent_block_hash is None else self.known[event.parent_block_hash]
                for i, name in enumerate(event.block_hashes):
                    before = before + event.token_ids[i * BLOCK : (i + 1) * BLOCK]
                    self.known[name] = before
            elif isinstance(event, BlockRemoved):
                for name in event.block_hashes:
                    del self.known[name]
            else:
                self.known.clear()

    def ask_again(self, first: int) -> list[tuple[int, bytes]]:
        self.replay.send_multipart((b"", first.to_bytes(8, "big")))  # as a REQ socket does
        found = []
        while self.replay.poll(2000):
            _, number, payload = self.replay.recv_multipart()
            if not payload:
                assert int.from_bytes(number, "big", signed=True) == -1
                return found
            found.append((int.from_bytes(number, "big"), payload))
        raise AssertionError("no end of the replay")

    def close(self) -> None:
        self.context.destroy(0)


def engine(tmp_path: Path, blocks: int = 40, **settings: Any) -> EngineCore:
    given = {
        "enable_kv_cache_events": True,
        "endpoint": f"ipc://{tmp_path}/events",
        "replay_endpoint": f"ipc://{tmp_path}/replay",
        "topic": TOPIC,
        **settings,
    }
    config = build(EngineConfig, {"kv_events_config": json.dumps(given)}, {})
    return EngineCore(PagedDouble(Limits(8, 64, 400, BLOCK, blocks, 2)), facts(400), config)


@pytest.fixture
def core(tmp_path: Path) -> Iterator[EngineCore]:
    core = engine(tmp_path)
    yield core
    core.close()


@pytest.fixture
def router(core: EngineCore, tmp_path: Path) -> Iterator[Subscriber]:
    router = Subscriber(f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay")
    assert router.ask_again(0) == []  # the sockets are connected
    ask(core, "first", list(range(20)))
    while not router.socket.poll(20):  # a subscription takes a moment; what went before is asked for
        drain(core)
        core.reset_prefix_cache()
    while router.socket.poll(50):
        router.next = int.from_bytes(router.socket.recv_multipart()[1], "big") + 1
    yield router
    router.close()


def ask(core: EngineCore, name: str, prompt: list[int], max_tokens: int = 4) -> None:
    core.add_request(Generate(name, prompt, Sampling(max_tokens=max_tokens), 0, time.time()))


def drain(core: EngineCore) -> None:
    while core.has_work():
        core.step()


def kept(core: EngineCore) -> set[int]:
    return {int.from_bytes(digest[-8:], "big") for digest in core.scheduler.blocks._by_digest}


def test_an_index_fed_by_events_holds_what_the_cache_holds(core: EngineCore, router: Subscriber) -> None:
    rng = random.Random(5)
    templates = [[rng.randrange(90) for _ in range(rng.randrange(10, 90))] for _ in range(4)]
    for i in range(60):  # 40 blocks hold a few of them: many are evicted
        ask(
            core,
            f"r{i}",
            rng.choice(templates) + [rng.randrange(90) for _ in range(30)],
            rng.randrange(1, 40),
        )
        if i % 3 == 0:
            drain(core)
    drain(core)
    while router.read(100):
        pass
    assert router.known.keys() == kept(core)
    assert len(router.known) > 10
    for name, tokens in router.known.items():  # the hashes are of the tokens that were told
        digest = b""
        for start in range(0, len(tokens), BLOCK):
            [digest] = chain(digest, array("i", tokens[start : start + BLOCK]), BLOCK)
        assert name == int.from_bytes(digest[-8:], "big")
    tags = {event["type"] for payload in router.payloads for event in msgspec.msgpack.decode(payload)[1]}
    assert tags == {"BlockStored", "BlockRemoved"}


def test_the_layout_is_vllms(core: EngineCore, router: Subscriber) -> None:
    prompt = list(range(40))
    ask(core, "a", prompt, 1)
    drain(core)
    assert router.read()
    batch = msgspec.msgpack.decode(router.payloads[-1])
    ts, events, rank = batch
    assert isinstance(ts, float)
    assert rank == 0
    [stored] = events
    assert len(stored["block_hashes"]) == 2
    hashes = stored.pop("block_hashes")
    assert stored == {"type": "BlockStored", "parent_block_hash": None, "token_ids": prompt[:32],
                      "block_size": BLOCK, "lora_id": None, "medium": "GPU", "lora_name": None,
                      "extra_keys": None}  # fmt: skip
    core.reset_prefix_cache()
    assert router.read()
    assert msgspec.msgpack.decode(router.payloads[-1])[1] == [{"type": "AllBlocksCleared"}]
    assert router.known == {}
    batch = EventBatch(ts, [Stored(hashes, None, prompt[:32], BLOCK), Removed(hashes), Cleared()])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(positional(batch))) == [
        ts,
        [
            ["BlockStored", hashes, None, prompt[:32], BLOCK, None, "GPU", None, None],
            ["BlockRemoved", hashes, "GPU"],
            ["AllBlocksCleared"],
        ],
        0,
    ]


def test_events_as_arrays_for_older_routers(tmp_path: Path) -> None:
    core = engine(tmp_path, event_format="array")
    router = Subscriber(f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay")
    ask(core, "a", list(range(40)), 1)
    drain(core)
    while not (found := router.ask_again(0)):
        pass
    [event] = msgspec.msgpack.decode(found[0][1])[1]
    assert event[0] == "BlockStored" and len(event) == 9
    router.close()
    core.close()


def test_what_was_missed_is_sent_again(core: EngineCore, router: Subscriber) -> None:
    for i in range(5):
        ask(core, f"r{i}", [i] * 40)
        drain(core)
    while router.read(100):
        pass
    again = router.ask_again(router.next - 3)
    assert [number for number, _ in again] == [router.next - 3, router.next - 2, router.next - 1]
    assert [payload for _, payload in again] == router.payloads[-3:]


def test_requests_for_a_replay_that_are_none_are_passed_over(core: EngineCore, router: Subscriber) -> None:
    router.replay.send_multipart((b"", b"nonsense, and long"))
    other = Subscriber.__new__(Subscriber)
    other.context = zmq.Context()
    other.replay = other.context.socket(zmq.DEALER)
    other.replay.connect(router.replay.getsockopt_string(zmq.LAST_ENDPOINT))
    assert other.ask_again(1 << 40) == []
    other.close()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "it takes JSON"),
        ('{"enable_kv_cache_events": true, "port": 5557}', "port"),
        ('{"enable_kv_cache_events": true, "publisher": "kafka"}', "kafka"),
        ('{"endpoint": "tcp://*:5557"}', "asks for nothing"),
        ('{"enable_kv_cache_events": true, "hwm": 0}', "at least 1"),
        ('{"enable_kv_cache_events": true, "event_format": "xml"}', "map, array"),
    ],
)
def test_wrong_settings_are_named(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_config(text)


def test_settings_that_ask_for_no_events() -> None:
    assert parse_config(None) is None
    assert parse_config('{"enable_kv_cache_events": false}') is None
    assert parse_config('{"enable_kv_cache_events": true, "publisher": "null"}') is None


def test_an_endpoint_in_use_and_a_cache_switched_off_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot open ipc://"):
        engine(tmp_path, endpoint=f"ipc://{tmp_path}/no/such/folder")
    config = EngineConfig(enable_prefix_caching=False, kv_events_config='{"enable_kv_cache_events": true}')
    with pytest.raises(UsageError, match="switched off"):
        EngineCore(PagedDouble(Limits(8, 64, 400, BLOCK, 40, 2)), facts(400), config)


def test_python_callers_give_a_dict_as_for_vllm() -> None:
    config = build(EngineConfig, {"kv_events_config": {"enable_kv_cache_events": True}}, {})
    assert config.kv_events_config is not None
    assert parse_config(config.kv_events_config) is not None
