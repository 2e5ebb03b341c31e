"""The engine's main loop: what it does with time in which nothing is asked."""

from __future__ import annotations

from typing import Any, cast

from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.messages import Abort, FromEngine, Shutdown, ToEngine
from rvllm.engine.loop import EngineLoop


class Idle:
    """A core without work that prepares so many times, and a link; what both are asked is written down."""

    def __init__(self, left: int, came: list[list[ToEngine]]) -> None:
        self.left, self.came, self.log = left, came, list[str]()

    def has_work(self) -> bool:
        return False

    def prepare(self) -> bool:
        self.log.append("prepare")
        self.left -= 1
        return self.left >= 0

    def step(self) -> list[Any]:
        return []

    def abort(self, ids: list[str]) -> None:
        self.log.append("abort")

    def receive(self, wait: bool) -> list[ToEngine]:
        self.log.append("wait" if wait else "look")
        return self.came.pop(0) if wait or len(self.came) > 1 else []

    def send(self, message: FromEngine) -> None:
        raise AssertionError("nothing was asked")


def run(idle: Idle) -> list[str]:
    EngineLoop(cast(EngineCore, idle), idle).run()
    return idle.log


def test_idle_time_prepares_steps_before_it_is_slept_through() -> None:
    log = run(Idle(2, [[Shutdown()]]))
    assert log == ["look", "prepare", "look", "prepare", "look", "prepare", "wait"]


def test_a_message_is_taken_between_two_preparations() -> None:
    log = run(Idle(9, [[], [], [Abort(["a"])], [Shutdown()]]))
    assert log[: log.index("abort")] == ["look", "prepare", "look", "prepare", "look"]
    assert log.count("wait") == 1
