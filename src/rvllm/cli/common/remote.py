"""A running server to talk to, over OpenAI's API."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
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


def get_json(url: str, path: str, api_key: str | None, timeout: float = 30.0) -> Any:
    """What a server answers to a GET. Raises RvllmError when it cannot be reached or refuses."""
    return _json(url, "GET", path, api_key, None, timeout)


def post_json(url: str, path: str, api_key: str | None, body: Any, timeout: float = 30.0) -> Any:
    """What a server answers to a POST. Raises RvllmError when it cannot be reached or refuses."""
    return _json(url, "POST", path, api_key, json.dumps(body).encode(), timeout)


def _json(url: str, method: str, path: str, api_key: str | None, data: bytes | None, timeout: float) -> Any:
    connect, prefix = connector(url, timeout)
    connection = connect()
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    try:
        connection.request(method, prefix + path, data, headers)
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise RvllmError(f"cannot reach {url}: {error}") from None
    finally:
        connection.close()
    if response.status != 200:
        raise RvllmError(f"{url} answers {response.status}: {_message(body)}")
    try:
        return json.loads(body)
    except ValueError:
        raise RvllmError(f"{url} answers something else than JSON; is it a server of this kind?") from None


class RemoteTalker:
    """Talks to a server's `/v1/chat/completions`."""

    def __init__(self, url: str, model: str | None, api_key: str | None) -> None:
        """model: None takes the first one the server lists. Raises RvllmError when it cannot be reached."""
        self._connect, self._path = connector(url, timeout=600)
        self._url = url
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._model = model or self._first_model()

    def _first_model(self) -> str:
        connection, response = self._request("GET", "/v1/models", None)
        try:
            return str(json.loads(response.read())["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError):
            raise RvllmError(f"{self._url} lists no models; is it a server of this kind?") from None
        finally:
            connection.close()

    def answer(self, conversation: Conversation, sampling: Sampling, answer: Answer) -> None:
        """Streams the next message into `answer`; KeyboardInterrupt hangs up, which aborts it."""
        body = {"model": self._model, "messages": conversation, "stream": True, **sampling.given()}
        body["stream_options"] = {"include_usage": True}
        connection, response = self._request("POST", "/v1/chat/completions", body)
        try:
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
        except (OSError, http.client.HTTPException) as error:
            raise RvllmError(f"{self._url} broke off: {error}") from None
        finally:
            connection.close()

    def _request(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = self._connect()
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, self._path + path, data, self._headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise RvllmError(f"cannot reach {self._url}: {error}") from None
        if response.status != 200:
            text = response.read(100_000)
            connection.close()
            raise RvllmError(f"{self._url} answers {response.status}: {_message(text)}")
        return connection, response

    def close(self) -> None:
        """Nothing stays open between answers."""


def _message(body: bytes) -> str:
    """The message of an error object, or the beginning of whatever came."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace").strip()
