"""A running server to talk to, over OpenAI's API."""

from __future__ import annotations

import argparse
import http.client
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from rvllm.cli.chat import Answer, Conversation, Sampling
from rvllm.errors import RvllmError, UsageError


def connector(url: str, timeout: float) -> tuple[Callable[[], http.client.HTTPConnection], str]:
    """How to connect to a server, and the path in front of its endpoints. Raises UsageError."""
    parts = urlsplit(url if "//" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"--url: expected something like http://127.0.0.1:8000, got {url!r}")
    try:
        port = parts.port
    except ValueError:
        raise UsageError(f"--url: {url!r} has no valid port") from None
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return partial(kind, parts.hostname, port, timeout=timeout), parts.path.rstrip("/").removesuffix("/v1")


def add_server(parser: argparse.ArgumentParser) -> None:
    """Which server a command asks."""
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server [http://127.0.0.1:8000]")
    parser.add_argument(
        "--api-key", default=None, help="its key (better: RVLLM_API_KEY, which other users do not see)"
    )


@contextmanager
def asked(
    url: str, path: str, api_key: str | None, body: Any = None, timeout: float = 30.0
) -> Iterator[http.client.HTTPResponse]:
    """What a server answers to a GET or, with a body, to a POST of it as JSON; its status is 200.

    Raises RvllmError when the server cannot be reached, breaks off or refuses, UsageError for a wrong URL.
    """
    connect, prefix = connector(url, timeout)
    connection = connect()
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    data, broke = None if body is None else json.dumps(body).encode(), f"cannot reach {url}"
    try:
        connection.request("GET" if data is None else "POST", prefix + path, data, headers)
        response = connection.getresponse()
        if response.status != 200:
            raise RvllmError(f"{url} answers {response.status}: {_message(response.read(100_000))}")
        broke = f"{url} broke off" if body is not None else broke
        yield response
    except (OSError, http.client.HTTPException) as error:
        raise RvllmError(f"{broke}: {error}") from None
    finally:
        connection.close()


def ask_json(url: str, path: str, api_key: str | None, body: Any = None) -> Any:
    """The same, where it is JSON. Raises RvllmError when it is not, too."""
    with asked(url, path, api_key, body) as response:
        text = response.read()
    try:
        return json.loads(text)
    except ValueError:
        raise RvllmError(f"{url} answers something else than JSON; is it a server of this kind?") from None


class RemoteTalker:
    """Talks to a server's `/v1/chat/completions`."""

    def __init__(self, url: str, model: str | None, api_key: str | None) -> None:
        """model: None takes the first one the server lists. Raises RvllmError when it cannot be reached."""
        connector(url, 0.0)  # a wrong one is told at once
        self._url, self._key = url, api_key
        self._model = model or self._first_model()

    def _first_model(self) -> str:
        try:
            with asked(self._url, "/v1/models", self._key, timeout=600) as response:
                return str(json.loads(response.read())["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError):
            raise RvllmError(f"{self._url} lists no models; is it a server of this kind?") from None

    def answer(self, conversation: Conversation, sampling: Sampling, answer: Answer) -> None:
        """Streams the next message into `answer`; KeyboardInterrupt hangs up, which aborts it."""
        body = {"model": self._model, "messages": conversation, "stream": True, **sampling.given()}
        body["stream_options"] = {"include_usage": True}
        with asked(self._url, "/v1/chat/completions", self._key, body, timeout=600) as response:
            for line in response:
                if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise RvllmError(str(event["error"]["message"]))
                for choice in event["choices"]:
                    text = choice["delta"].get("content") or ""
                    if text:
                        answer.add(text, 1)
                if event.get("usage"):  # the last event knows how many tokens there really were
                    answer.tokens = int(event["usage"]["completion_tokens"])

    def close(self) -> None:
        """Nothing stays open between answers."""


def _message(body: bytes) -> str:
    """The message of an error object, or the beginning of whatever came."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace").strip()
