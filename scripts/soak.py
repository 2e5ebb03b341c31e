# ruff: noqa: E402, E501
"""A soak: a server at 120 % of what it can do for minutes, with clients that leave, send garbage and attack.

    python scripts/soak.py --seconds 600
    python scripts/soak.py --seconds 480 --device cuda

A random model (tiny on the CPU, of a billion parameters on the GPU) with so few KV blocks that sequences are
preempted throughout. At the end: no request lost or answered twice, every answer as the request gets it alone,
memory flat (on the GPU the device's too: a step that takes any ends the engine), and the p99 of what was
admitted.
Exits with 1 where one of these does not hold.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE / "tests"), str(HERE / "src")]

from support.clients.attacker import Server
from support.clients.fuzz import PIECES, REQUESTS, mutated
from support.clients.grammar_attacks import ATTACKS

EVERY = 5.0  # seconds between samples of memory and rate
HONEST = 0.85  # share of the requests
KINDS = 40  # different honest requests, of which each is asked alone first
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def honest(i: int) -> dict[str, Any]:
    """Request number i of KINDS."""
    rng = random.Random(i)
    return {"prompt": " ".join(rng.choices(["hello", "world", "the", "fox", "日本"], k=rng.randint(5, 120))),
            "max_tokens": rng.randint(8, 60), "temperature": rng.choice([0.0, 1.0]), "seed": i, "ignore_eos": True,
            "return_token_ids": True}  # fmt: skip


class Soak:
    """What the clients do and see."""

    def __init__(
        self, server: Server, seconds: float, rate: float, load: float, alone: list[Any], seed: int
    ) -> None:
        """rate: honest requests a second to begin with."""
        self.server, self.end, self.alone = server, time.monotonic() + seconds, alone
        self.rates, self.load = [rate], load
        self.seen: Counter[str] = Counter()
        self.times: list[float] = []
        self.wrong: list[str] = []
        self.memory: list[float] = []
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self._before = 0

    def run(self) -> None:
        """Sends requests at the rate, each from a thread of its own; returns when all have ended."""
        threads: list[threading.Thread] = []
        following = sampled = time.monotonic()
        while time.monotonic() < self.end:
            following += self._rng.expovariate(self.rates[-1] / HONEST)
            time.sleep(max(0.0, following - time.monotonic()))
            kind, number = self._rng.random(), self._rng.getrandbits(30)
            act = (
                self.leave
                if kind < 0.05
                else self.garbage
                if kind < 0.1
                else self.attack
                if kind < 0.15
                else self.ask
            )
            thread = threading.Thread(target=act, args=(number,), daemon=True)
            thread.start()
            threads = [t for t in threads if t.is_alive()] + [thread]
            if time.monotonic() - sampled > EVERY:
                self._follow(time.monotonic() - sampled)
                sampled = time.monotonic()
                self.memory.append(self.server.rss())
        for thread in threads:
            thread.join(60)
            if thread.is_alive():
                self.wrong.append("a request was never answered")

    def _follow(self, seconds: float) -> None:
        """The next rate: the load times what was answered lately; other work of the machine changes that."""
        right = self.seen["right"]
        answered = (right - self._before) / seconds
        self._before = right
        low, high = self.rates[0] / 8, self.rates[0] * 2
        self.rates.append(min(high, max(low, self.load * (answered + self.rates[-1] / self.load) / 2)))

    def note(self, what: str, wrong: str = "") -> None:
        """Counts an outcome."""
        with self._lock:
            self.seen[what] += 1
            if wrong:
                self.wrong.append(wrong)

    def ask(self, number: int) -> None:
        """An honest client: the answer is as it was alone."""
        i, began = number % KINDS, time.monotonic()
        try:
            status, answer = self.server.complete(120, **honest(i))
        except OSError as error:
            self.note("broken", f"request {i}: {error!r}")
            return
        if status in (429, 503):
            self.note("refused: busy")
        elif status != 200 or answer["choices"][0]["token_ids"] != self.alone[i]:
            self.note("wrong", f"request {i}: {status} {str(answer)[:200]}")
        else:
            self.note("right")
            with self._lock:
                self.times.append(time.monotonic() - began)

    def leave(self, number: int) -> None:
        """A client that hangs up in the middle."""
        body = json.dumps({**honest(number % KINDS), "stream": True}).encode()
        try:
            with socket.create_connection(("127.0.0.1", self.server.port), timeout=30) as sock:
                sock.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                time.sleep((number % 100) / 200)
        except OSError:
            pass
        self.note("left")

    def garbage(self, number: int) -> None:
        """Bytes that are hardly HTTP."""
        data = mutated(random.Random(number), REQUESTS[number % len(REQUESTS)], PIECES)
        try:
            with socket.create_connection(("127.0.0.1", self.server.port), timeout=30) as sock:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(65536):
                    pass
        except OSError:
            pass
        self.note("garbage")

    def attack(self, number: int) -> None:
        """A schema or grammar that is meant to hurt."""
        path, body = ATTACKS[list(ATTACKS)[number % len(ATTACKS)]]
        try:
            status = self.server.ask("POST", path, body, 60)[0]
            self.note("attack", "" if status in (200, 400, 429, 503) else f"an attack: {status}")
        except OSError as error:
            self.note("attack", f"an attack: {error!r}")


def capacity(server: Server) -> float:
    """Honest requests a second that the server answers when it is never idle."""
    began, count = time.monotonic(), [0]

    def work() -> None:
        while time.monotonic() - began < 10:
            server.complete(120, **honest(random.randrange(KINDS)))
            count[0] += 1

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return count[0] / (time.monotonic() - began)


def metric(server: Server, name: str) -> float:
    """A counter or gauge."""
    found = re.search(rf"^{name}\{{.*\}} (\S+)$", server.get("/metrics")[1].decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def main() -> int:
    """Soaks and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--load", type=float, default=1.2, help="share of the capacity measured before [1.2]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args()
    flags = ["--num-blocks", "48", "--max-queue", "64", "--worker-timeout", "2", "--max-body-mb", "4"]
    if given.device == "cuda":
        flags.append("--check-device-memory")
    with Server(*flags, device=given.device) as server:
        alone = [server.complete(**honest(i))[1]["choices"][0]["token_ids"] for i in range(KINDS)]
        rate = given.load * capacity(server)
        soak = Soak(server, given.seconds, rate, given.load, alone, given.seed)
        soak.run()
        time.sleep(3)
        left = metric(server, "vllm:num_requests_running") + metric(server, "vllm:num_requests_waiting")
        blocks = metric(server, "vllm:kv_cache_usage_perc")
        preempted = metric(server, "vllm:num_preemptions_total")
        times = sorted(soak.times)
        quarter = max(1, len(soak.memory) // 4)
        early, late = (sum(part) / len(part) for part in (soak.memory[:quarter], soak.memory[-quarter:]))
        mean = sum(soak.rates) / len(soak.rates)
        print(f"{given.seconds:.0f} s at {mean:.1f} honest requests/s ({min(soak.rates):.1f} to "
              f"{max(soak.rates):.1f}: {given.load:.0%} of what is answered): {dict(soak.seen)}")  # fmt: skip
        print(
            f"preemptions {preempted:.0f}; left running or waiting {left:.0f}; KV cache in use {blocks:.3f}"
        )
        print(f"memory of the API process: {early:.0f} MB in the first quarter, {late:.0f} MB in the last")
        if times:
            print(
                f"admitted requests: p50 {times[len(times) // 2]:.2f} s, p99 {times[int(len(times) * 0.99)]:.2f} s"
            )
        wrong = soak.wrong + (["requests are left"] if left else [])
        wrong += ["memory grew"] if late > 1.2 * early + 30 else []
        wrong += [] if preempted else ["nothing was preempted"]
        wrong += ["a traceback in the log"] if "Traceback" in server.text() else []
        print("\n".join(wrong[:20]) or "all as it should be")
        return 1 if wrong or server.end() else 0


if __name__ == "__main__":
    sys.exit(main())
