"""Starts the engine process, which comes up while this one imports what it takes to talk to it."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

COMMAND = (sys.executable, "-m", "rvllm.engine.ipc.process")


@dataclass(frozen=True)
class Spawned:
    """A process that waits to be told what to load. life: its standard input; its end is the process's."""

    process: subprocess.Popen[bytes]
    life: socket.socket


def spawn(command: Sequence[str] = COMMAND) -> Spawned:
    """Starts the process. Raises OSError when it cannot be."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            return Spawned(subprocess.Popen(command, stdin=theirs.fileno(), start_new_session=True), ours)
        except BaseException:
            ours.close()
            raise
