"""OpenAI's completions for races: `python openai_peer.py PORT MILLISECONDS_A_TOKEN [TOKENS_LESS]`."""

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PAUSE = float(sys.argv[2]) / 1000
LESS = int(sys.argv[3]) if len(sys.argv) > 3 else 0


class Handler(BaseHTTPRequestHandler):
    """Answers with as many tokens as are asked for, one an event."""

    def log_message(self, *_: object) -> None:
        """Stays silent."""

    def do_GET(self) -> None:
        """The list of models."""
        self._answer(json.dumps({"data": [{"id": "peer"}]}).encode(), "application/json")

    def do_POST(self) -> None:
        """A completion as a stream."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        count = body["max_tokens"] - LESS
        for _ in range(count):
            time.sleep(PAUSE)
            self._event({"choices": [{"text": "x"}]})
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
        self._event({"choices": [], "usage": usage})

    def _event(self, value: dict[str, object]) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
        self.wfile.flush()

    def _answer(self, data: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
