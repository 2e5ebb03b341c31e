"""The listening socket and the stop signals: what exists before the model and the HTTP side are loaded."""

from __future__ import annotations

import asyncio
import os
import signal
import socket

from rvllm.config import ServerConfig
from rvllm.errors import UsageError


def bind(config: ServerConfig) -> socket.socket:
    """A bound socket that does not listen yet, so that a taken port is known before the model loads.

    Raises UsageError naming address and port.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise UsageError(f"--host: {config.host!r} is no address of this machine: {error.strerror}") from None
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        reason = os.strerror(error.errno or 0).lower()
        raise UsageError(
            f"cannot listen on {config.host} port {config.port}: {reason}; choose another with --port"
        ) from None
    return sock


def url_of(sock: socket.socket) -> str:
    """The address clients on this machine use."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if sock.family == socket.AF_INET6 else f"http://{host}:{port}"


class StopSignals:
    """SIGTERM and SIGINT as events: the first asks for a drain, the second for the end."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.signal = signal.SIGTERM

    def install(self) -> None:
        """Takes over both signals in the running loop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._received, number)

    def _received(self, number: signal.Signals) -> None:
        if self.first.is_set():
            self.second.set()
        else:
            self.signal = number
            self.first.set()

    @property
    def exit_code(self) -> int:
        """0 after a drain that SIGTERM asked for; 128 + the signal when cut short or for Ctrl-C."""
        if self.signal == signal.SIGTERM and not self.second.is_set():
            return 0
        return 128 + self.signal
