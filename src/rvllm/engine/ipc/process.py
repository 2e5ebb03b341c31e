"""The engine's own process: `python -m rvllm.engine.ipc.process`, started by `EngineClient`.

Its standard input is a socket to the parent. The first frame on it says what to run; after that it only
shows whether the other side lives: its end of file means that the parent is gone, and the process ends
too. Everything else goes over a ZeroMQ socket in a directory that only this user can enter.

Heavy modules are imported after the settings are read, which may say how many threads they start.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import zmq

from rvllm.backends import opening
from rvllm.config import EngineConfig
from rvllm.engine.ipc.messages import Failed, FromEngine, Loading, ToEngine
from rvllm.errors import RvllmError

if TYPE_CHECKING:
    from rvllm.backends.base import Progress
    from rvllm.engine.core import EngineCore

    MakeCore = Callable[[EngineConfig, Progress], EngineCore]

STACK = 64 << 20  # bytes of a thread's stack; only what is touched takes memory
LINGER_MS = 2000  # how long a last message may take to leave


class Launch(msgspec.Struct):
    """What the parent sends first: where to connect and what to load."""

    directory: str
    address: str
    config: EngineConfig


class ZmqLink:
    """The engine's end of the conversation, msgpack over one ZeroMQ socket."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(0)  # bounded by the requests alive, which the API limits
        self._socket.connect(address)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(ToEngine).decode

    def receive(self, wait: bool) -> list[ToEngine]:
        """All messages that have come; with `wait`, sleeps until there is one."""
        if wait:
            self._socket.poll()
        messages: list[ToEngine] = []
        while True:
            try:
                messages.append(self._decode(self._socket.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return messages

    def send(self, message: FromEngine) -> None:
        """Sends a message; never blocks."""
        self._socket.send(self._encode(message))

    def close(self) -> None:
        """Closes once the last messages have left."""
        self._socket.close(LINGER_MS)
        self._context.term()


def _load(config: EngineConfig, progress: Progress) -> EngineCore:
    opening.begin(config)  # before what takes long to import
    from rvllm.engine.core import EngineCore

    return EngineCore.from_config(config, progress)


def main(make_core: MakeCore = _load) -> int:
    """Runs the engine until it is told to stop; the exit code is the error's when it fails."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then says what to do
    # Grammars recurse in native code: threads here have many times the stack on which each was tried out.
    threading.stack_size(STACK)
    os.environ.setdefault("RUST_MIN_STACK", str(STACK))
    parent = _take_over_stdin()
    launch = msgspec.msgpack.decode(_read_frame(parent), type=Launch)
    threading.Thread(target=_die_with, args=(parent, launch.directory), daemon=True).start()
    link = ZmqLink(launch.address)
    try:
        _serve(make_core, launch.config, link)
        return 0
    except RvllmError as error:
        link.send(Failed(str(error), error.exit_code))
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        link.send(Failed(f"{type(error).__name__}: {error}"))
        return 1
    finally:
        link.close()


def _serve(make_core: MakeCore, config: EngineConfig, link: ZmqLink) -> None:
    began = time.perf_counter()
    core = make_core(config, _reporter(link))
    from rvllm.engine.loop import EngineLoop

    core.ready.load_seconds = time.perf_counter() - began
    gc.freeze()  # what is loaded stays: the collector need not walk over it between steps
    link.send(core.ready)
    EngineLoop(core, link).run()
    core.close()


def _reporter(link: ZmqLink) -> Progress:
    """Tells the parent of progress, ten times a second at most."""
    last_time, last_text = 0.0, ""

    def report(fraction: float, text: str) -> None:
        nonlocal last_time, last_text
        now = time.monotonic()
        if text != last_text or now - last_time > 0.1:
            last_time, last_text = now, text
            link.send(Loading(fraction, text))

    return report


def _take_over_stdin() -> socket.socket:
    """The socket that came as standard input, moved where no child process inherits it."""
    parent = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)  # the parent's standard output is for its own words
    return parent


def _read_frame(parent: socket.socket) -> bytes:
    """Four bytes of length, then as many bytes."""
    data = b""
    while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "little"):
        piece = parent.recv(1 << 16)
        if not piece:
            raise SystemExit("rvllm.engine.ipc.process is started by rvllm itself, not by hand")
        data += piece
    return data[4:]


def _die_with(parent: socket.socket, directory: str) -> None:
    """Ends this process when the parent has ended, whatever it is doing.

    A child forked by the parent may hold the other end open, so the parent's id is looked at as well.
    """
    pid = os.getppid()
    parent.settimeout(2.0)
    while True:
        try:
            if not parent.recv(1):
                break
        except TimeoutError:
            if os.getppid() != pid:
                break
        except OSError:
            break
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
