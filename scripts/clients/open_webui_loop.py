"""Open WebUI's own server in front of ours: sign up, models, chat, a title, vectors, a question over a text.

    python open_webui_loop.py OPEN_WEBUI_URL MODEL ENCODER

What its page asks of its server is asked here, with the standard library alone.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from typing import Any

TEXT = "The station of Oerlikon has eight tracks.\n\nThe lake of Zug is 198 metres deep.\n"


class WebUi:
    """Requests to Open WebUI's server, as the user who signs up first (its administrator)."""

    def __init__(self, url: str) -> None:
        self._url, self._headers = url, {"Content-Type": "application/json"}
        user = self.post("/api/v1/auths/signup", name="a", email="a@example.com", password="secret-words-1")
        self._headers["Authorization"] = f"Bearer {user['token']}"

    def _open(self, path: str, body: Any = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, self._headers)
        with urllib.request.urlopen(request, timeout=600) as answer:
            found: str = answer.read().decode()
        return found

    def get(self, path: str) -> Any:
        """An answer to a GET."""
        return json.loads(self._open(path))

    def post(self, path: str, **body: Any) -> Any:
        """An answer to a POST."""
        return json.loads(self._open(path, body))

    def events(self, path: str, **body: Any) -> list[Any]:
        """The data of a stream's events."""
        lines = self._open(path, body).splitlines()
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert data[-1] == "[DONE]", data[-1]
        return [json.loads(each) for each in data[:-1]]


def main(url: str, model: str, encoder: str) -> None:
    """The loop; fails with an assertion where an answer is not what it should be."""
    ui = WebUi(url)
    names = {each["id"] for each in ui.get("/api/models")["data"]}
    assert {model, encoder} <= names, names

    question = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    asked: dict[str, Any] = {"model": model, "messages": question, "max_tokens": 8, "temperature": 0}
    answer = ui.post("/api/chat/completions", stream=False, **asked)
    assert "Paris" in answer["choices"][0]["message"]["content"], answer
    options = {"include_usage": True}
    chunks = ui.events("/api/chat/completions", stream=True, stream_options=options, **asked)
    deltas = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk.get("choices", ())]
    assert "Paris" in "".join(deltas), chunks
    assert any(chunk.get("usage") for chunk in chunks), "no usage at the end of the stream"

    title = ui.post("/api/v1/tasks/title/completions", model=model, messages=question, chat_id="local:1")
    assert title["choices"][0]["message"]["content"], title

    (vector,) = ui.post("/api/embeddings", model=encoder, input=["a text"])["data"]
    assert len(vector["embedding"]) == 384

    kept = ui.post("/api/v1/retrieval/process/text", name="facts", content=TEXT)
    found = ui.post("/api/v1/retrieval/query/doc", collection_name=kept["collection_name"],
                    query="How deep is the lake?", k=1)  # fmt: skip
    assert "198" in json.dumps(found), found
    print("Open WebUI: models, chat, stream, title, vectors, retrieval: fine")


if __name__ == "__main__":
    main(*sys.argv[1:])
