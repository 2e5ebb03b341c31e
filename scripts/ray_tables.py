"""Ray Serve on one machine with CPU replicas of a small model: tables for docs/performance/scale.md.

    export RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_THROUGHPUT_OPTIMIZED=1  # as `rvllm ray serve` starts Ray
    export RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S=5
    export RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=1  # this script asks replicas from outside an event loop
    unshare --net --map-root-user sh -c 'ip link set lo up && exec python scripts/ray_tables.py [PART ...]'

Parts: throughput, prefix, kill, node, rolling, scale, scale-kv (all when none is named). Ray listens on all
addresses, so it runs in a network of its own; it keeps a token under HOME. Needs the extra `ray`, httpx, and
the model in the cache (another by `--engine '{"model": "DIR", "load_format": "dummy"}'`). Three Ray nodes are
started in this machine, one for the front end and two with replicas.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import ray
from ray import serve
from ray.cluster_utils import Cluster

from rvllm.ray import build_app
from rvllm.ray.config import parse

URL = "http://127.0.0.1:8123"
MODEL = "small"
APP = "rvllm"
ENGINE: dict[str, Any] = {"threads": 1, "max_num_seqs": 8, "num_blocks": 400, "max_model_len": 2048}


def config(replicas: Any, prefix: bool = True, **engine: Any) -> Any:
    """An application of CPU replicas with one thread each."""
    return parse(
        {
            "http": {"port": 8123},
            "server": {"workers": 2, "drain_timeout": 60, "max_queue": 256, "worker_timeout": 60},
            "frontend_cpus": 0.1,
            "frontend_resources": {"front": 1},
            "models": [
                {
                    "name": MODEL,
                    "gpus": 0,
                    "cpus": 0.1,
                    "resources": {"slot": 1},
                    "replicas": replicas,
                    "routing": {"prefix": prefix},
                    "engine": {**ENGINE, **engine},
                }
            ],
        }
    )


@dataclass
class Seen:
    """What one client saw of one request; seconds since it was sent."""

    prompt: int
    outcome: str = "cut off silently"
    text: str = ""
    tokens: int = 0
    first: float = 0.0
    seconds: float = 0.0
    gap: float = 0.0  # the longest between two tokens


async def ask(client: httpx.AsyncClient, number: int, prompt: str, tokens: int, **more: Any) -> Seen:
    """One streamed completion; whatever goes wrong is an outcome."""
    seen, began = Seen(number), time.perf_counter()
    last = began
    body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, **more}  # fmt: skip
    try:
        async with client.stream("POST", f"{URL}/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                seen.outcome = f"refused with {answer.status_code}"
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    seen.outcome = f"told: {event['error']['message'][:60]}"
                    continue
                now = time.perf_counter()
                seen.first = seen.first or now - began
                seen.gap, last = max(seen.gap, now - last if seen.tokens else 0.0), now
                seen.tokens += 1
                [choice] = event["choices"]
                seen.text += choice["text"]
                if choice["finish_reason"]:
                    seen.outcome = "complete"
    except httpx.HTTPError as error:
        seen.outcome = f"connection: {type(error).__name__}"
    seen.seconds = time.perf_counter() - began
    return seen


async def load(prompts: list[str], clients: int, tokens: int, until: Callable[[int], bool]) -> list[Seen]:
    """So many clients, one request after the other each, while `until(number)` is false."""
    found: list[Seen] = []
    numbers = iter(range(1 << 30))
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:

        async def one() -> None:
            while not until(number := next(numbers)):
                which = number % len(prompts)
                found.append(await ask(client, which, prompts[which], tokens))

        await asyncio.gather(*(one() for _ in range(clients)))
    return found


async def under_load(
    prompts: list[str], clients: int, tokens: int, happens: Callable[[], Awaitable[None]]
) -> list[Seen]:
    """Load while something happens, and a while after."""
    over = False

    async def event() -> None:
        nonlocal over
        await asyncio.sleep(4)
        await happens()
        await asyncio.sleep(4)
        over = True

    found, _ = await asyncio.gather(load(prompts, clients, tokens, lambda number: over), event())
    return found


def count(number: int) -> Callable[[int], bool]:
    """So many requests."""
    return lambda done: done >= number


PROMPTS = [f"Story number {i} begins in a small town by the sea, where" for i in range(8)]


def figures() -> tuple[float, float]:
    """(prompt tokens looked up, of these found cached) of all replicas."""
    page = httpx.get(f"{URL}/metrics", timeout=60).text
    lines = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))

    def value(name: str) -> float:
        return next(float(number) for key, number in lines.items() if key.startswith(name + "{"))

    return value("vllm:prefix_cache_queries_total"), value("vllm:prefix_cache_hits_total")


def deploy(application: Any) -> None:
    """Starts or updates, and waits until it answers."""
    serve.run(build_app(application), name=APP, route_prefix="/")
    for _ in range(300):
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{URL}/health", timeout=10).status_code == 200:
                return
        time.sleep(0.2)
    raise SystemExit("the application does not answer")


def handle() -> Any:
    """The replicas."""
    return serve.get_deployment_handle(f"engine-{MODEL}", APP)


def pids() -> list[tuple[int, int]]:
    """(replica, its engine) of all."""
    found: list[tuple[int, int]] = handle().broadcast("pids").results(timeout_s=60)
    return found


def running() -> int:
    """Replicas that run."""
    deployment = serve.status().applications[APP].deployments[f"engine-{MODEL}"]
    return deployment.replica_states.get("RUNNING", 0)


def outcomes(found: list[Seen], reference: dict[int, str]) -> str:
    """Cells: requests, how they ended, wrong answers, the longest pause."""
    ends = Counter(seen.outcome for seen in found)
    wrong = sum(seen.outcome == "complete" and seen.text != reference[seen.prompt] for seen in found)
    told = ", ".join(f"{number} {outcome}" for outcome, number in ends.most_common())
    pause, first = max(seen.gap for seen in found), max(seen.first for seen in found)
    return f"{len(found)} | {told} | {wrong} | {pause:.1f} | {first:.1f}"


async def references(tokens: int) -> dict[int, str]:
    """The answers as they are when nothing happens."""
    found = await load(PROMPTS, 4, tokens, count(len(PROMPTS)))
    assert all(seen.outcome == "complete" for seen in found), found
    return {seen.prompt: seen.text for seen in found}


def throughput(counts: list[int]) -> None:
    """So many replicas each: tokens a second of one stream and of 16 clients."""
    print("\n| replicas | one stream tok/s | 16 clients tok/s | TTFT p50 s | ITL p50 ms |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for replicas in counts:
        deploy(config(replicas))
        asyncio.run(load(PROMPTS, 4, 8, count(8)))
        alone = asyncio.run(load(PROMPTS, 1, 48, count(2)))
        began = time.perf_counter()
        found = asyncio.run(load(PROMPTS, 16, 48, count(32)))
        rate = sum(seen.tokens for seen in found) / (time.perf_counter() - began)
        one = sum(seen.tokens for seen in alone) / sum(seen.seconds for seen in alone)
        first = statistics.median(seen.first for seen in found)
        between = statistics.median((s.seconds - s.first) / (s.tokens - 1) for s in found) * 1000
        print(f"| {replicas} | {one:.1f} | {rate:.1f} | {first:.2f} | {between:.0f} |", flush=True)


def prefix() -> None:
    """Eight long shared beginnings over two replicas whose caches hold about half of them each."""
    texts = [
        " ".join(f"Rule {i}.{j}: the {i * j % 97} of {j} comes first." for j in range(30)) for i in range(8)
    ]
    print(
        "\n| routed by | hits | TTFT p50 s | TTFT p95 s | requests/s |\n| --- | ---: | ---: | ---: | ---: |"
    )
    for name, on in (("queues alone", False), ("prefix", True)):
        deploy(config(2, on, num_blocks=170))
        before = figures()
        prompts = [f"{texts[(i * 5) % 8]} Question {i}: why?" for i in range(64)]
        began = time.perf_counter()
        found = asyncio.run(load(prompts, 4, 4, count(64)))
        seconds = time.perf_counter() - began
        asked, hit = (after - old for after, old in zip(figures(), before, strict=True))
        first = sorted(seen.first for seen in found)
        rate = len(found) / seconds
        print(f"| {name} | {hit / asked:.0%} | {first[32]:.2f} | {first[60]:.2f} | {rate:.2f} |", flush=True)


HEAD = "| what happened | requests | how they ended | wrong answers | longest pause s | longest TTFT s |"
RULE = "| --- | ---: | --- | ---: | ---: | ---: |"


async def _settle(replicas: int) -> float:
    began = time.perf_counter()
    while True:
        with contextlib.suppress(Exception):
            if running() >= replicas and len(await asyncio.to_thread(pids)) >= replicas:
                return time.perf_counter() - began
        await asyncio.sleep(0.5)


def kill() -> None:
    """kill -9 of a replica, then of an engine, while four clients stream."""
    deploy(config(2))
    reference = asyncio.run(references(64))
    print(f"\n{HEAD}\n{RULE}")
    for name, which in (("kill -9 of a replica", 0), ("kill -9 of an engine", 1)):
        took = 0.0

        async def happens(which: int = which) -> None:
            nonlocal took
            victim = (await asyncio.to_thread(pids))[0][which]
            os.kill(victim, signal.SIGKILL)
            await asyncio.sleep(1)
            took = 1 + await _settle(2)

        found = asyncio.run(under_load(PROMPTS, 4, 64, happens))
        print(f"| {name}; two run again after {took:.1f} s | {outcomes(found, reference)} |", flush=True)


def node(cluster: Any, nodes: list[Any]) -> None:
    """The loss of a node with its replica; another node with room takes over."""
    deploy(config(2))
    reference = asyncio.run(references(64))
    took = 0.0

    async def happens() -> None:
        nonlocal took
        await asyncio.to_thread(cluster.remove_node, nodes.pop(), allow_graceful=False)
        await asyncio.sleep(1)
        took = 1 + await _settle(2)

    found = asyncio.run(under_load(PROMPTS, 4, 64, happens))
    print(f"\n{HEAD}\n{RULE}")
    print(f"| loss of a node; two run again after {took:.1f} s | {outcomes(found, reference)} |", flush=True)


def rolling() -> None:
    """A changed setting is rolled out while four clients stream."""
    deploy(config(2))
    reference = asyncio.run(references(64))
    before, took = set(pids()), 0.0

    async def happens() -> None:
        nonlocal took
        began = time.perf_counter()
        await asyncio.to_thread(deploy, config(2, max_num_seqs=9))
        took = time.perf_counter() - began

    found = asyncio.run(under_load(PROMPTS, 4, 64, happens))
    after = set(pids())
    new, all_of = len(after - before), len(after)
    print(f"\n{HEAD}\n{RULE}")
    print(f"| update, {new} of {all_of} new after {took:.1f} s | {outcomes(found, reference)} |", flush=True)


SCALING = {"min": 1, "max": 2, "upscale_delay": 2, "downscale_delay": 5, "look_back": 11}


def scale(name: str, targets: dict[str, float], **engine: Any) -> None:
    """From one replica to two under load, and back while two clients go on."""
    deploy(config({**SCALING, **targets}, **engine))
    reference = asyncio.run(references(64))
    began, events = time.perf_counter(), list[tuple[float, int]]()
    over = False

    async def watch() -> None:
        nonlocal over
        while not over and time.perf_counter() - began < 240:
            now = await asyncio.to_thread(running)
            if not events or events[-1][1] != now:
                events.append((time.perf_counter() - began, now))
            over = len(events) > 2 and events[-1][1] == 1
            await asyncio.sleep(0.5)
        over = True

    async def both() -> list[Seen]:
        many = load(PROMPTS, 6, 64, lambda number: time.perf_counter() - began > 60)
        few = load(PROMPTS, 2, 64, lambda number: over)
        found, more, _ = await asyncio.gather(many, few, watch())
        return found + more

    found = asyncio.run(both())
    steps = ", ".join(f"{number} at {when:.0f} s" for when, number in events)
    print(f"\n{HEAD}\n{RULE}")
    print(f"| {name}; 8 clients for 60 s, then 2: {steps} | {outcomes(found, reference)} |", flush=True)


def main() -> None:
    """Runs the parts that are named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--engine", type=json.loads, default={}, help="settings of the engines, as JSON")
    parser.add_argument("--replicas", default="1,2,4", help="of the table of throughput")
    args = parser.parse_args()
    names = args.parts or ["throughput", "prefix", "kill", "rolling", "scale", "scale-kv", "node"]
    ENGINE.update(args.engine)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    path = os.environ.get("PYTHONPATH", "")
    small = {"object_store_memory": 100 << 20, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 4, "resources": {"front": 9}, **small}
    )
    nodes = [cluster.add_node(num_cpus=2, resources={"slot": 2}, **small) for _ in range(2)]
    try:
        ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
        serve.start(http_options={"host": "127.0.0.1", "port": 8123}, proxy_location="HeadOnly")
        counts = [int(word) for word in args.replicas.split(",")]
        parts: dict[str, Callable[[], None]] = {
            "throughput": lambda: throughput(counts), "prefix": prefix, "kill": kill, "rolling": rolling,
            "scale": lambda: scale("by requests", {"target_requests": 4}),
            "scale-kv": lambda: scale("by KV use", {"target_requests": 1000, "target_kv_use": 0.3},
                                      num_blocks=60, max_model_len=512),
            "node": lambda: node(cluster, nodes),
        }  # fmt: skip
        for name in names:
            parts[name]()
        serve.shutdown()
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main())
