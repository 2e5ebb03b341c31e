"""The canary script with servers that only have metrics: when it goes on, rolls back, and what it leaves."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from rvllm.bench.live import failure_share, live_figures, reading

CANARY = Path(__file__).parent.parent / "deploy" / "rollout" / "canary.py"


@contextmanager
def server(latency: float, failures: float = 0.0, traffic: bool = True) -> Iterator[str]:
    """A server whose metrics go on with every look: answers of this latency (s), a share of which fails."""
    registry = CollectorRegistry()
    names = ("vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds")
    histograms = [Histogram(name, "x", registry=registry) for name in names]
    answers = Counter("rvllm:http_responses", "x", ("path", "status"), registry=registry)
    looks = 0

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            nonlocal looks
            if self.path == "/metrics" and traffic:
                looks += 1
                for number in range(20):
                    for histogram in histograms:
                        histogram.observe(latency * (1 + 0.02 * ((looks + number) % 3)))
                    status = "500" if number < 20 * failures else "200"
                    answers.labels("/v1/completions", status).inc()
                answers.labels("/health", "503").inc(1000)  # a probe's answer is no client's failure
            body = generate_latest(registry)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}"
    finally:
        listening.shutdown()
        listening.server_close()


@pytest.mark.parametrize(
    ("new", "code", "shifts"),
    [
        ({"latency": 0.1}, 0, "0 25 50 100"),
        ({"latency": 0.13}, 3, "0 25 0"),  # slower
        ({"latency": 0.1, "failures": 0.1}, 3, "0 25 0"),  # fast and wrong
        ({"latency": 0.1, "traffic": False}, 4, "0 25 0"),  # nobody came
    ],
)
def test_traffic_goes_on_or_back(tmp_path: Path, new: dict[str, float], code: int, shifts: str) -> None:
    log = tmp_path / "log"
    tell = f"sh -c 'echo -n \"{{}} \" >> {log}'"
    with server(0.1) as old_url, server(**new) as new_url:  # type: ignore[arg-type]
        command = [sys.executable, str(CANARY), "--old", old_url, "--new", new_url, "--steps", "25,50",
                   "--hold", "0.04", "--windows", "4", "--race", "", "--shift", tell.format("{percent}"),
                   "--start", tell.format("start"), "--stop-new", tell.format("stop-new"),
                   "--stop-old", tell.format("stop-old").removesuffix("'") + "; false'"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    ended = "stop-old" if code == 0 else "stop-new"
    assert "Traceback" not in done.stderr
    assert log.read_text().split() == ["0", "start", *shifts.split()[1:], ended]


def test_a_version_that_does_not_start_gets_no_traffic(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with server(0.1) as old_url:
        command = [sys.executable, str(CANARY), "--old", old_url, "--new", "http://127.0.0.1:9", "--race", "",
                   "--ready-timeout", "0.1", "--shift", f"sh -c 'echo {{percent}} >> {log}'"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "not ready" in done.stderr and "Traceback" not in done.stderr
    assert log.read_text().split() == ["0", "0"]


def test_a_rollout_that_is_told_to_end_rolls_back(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with server(0.1) as old_url, server(0.1) as new_url:
        command = [sys.executable, str(CANARY), "--old", old_url, "--new", new_url, "--race", "",
                   "--hold", "600", "--steps", "25",
                   "--shift", f"sh -c 'echo {{percent}} >> {log}'"]  # fmt: skip
        process = subprocess.Popen(command)
        while not log.exists() or "25" not in log.read_text():
            assert process.poll() is None
            time.sleep(0.02)
        process.terminate()
        assert process.wait(60) == 143
    assert log.read_text().split() == ["0", "25", "0"]


def test_the_drills_clients_count_answers_and_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200 if len(asked) < 4 else 503)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for text in ("a", "b"):
                self.wfile.write(f'data: {{"choices": [{{"index": 0, "text": "{text}"}}]}}\n\n'.encode())
            self.wfile.write(b"data: [DONE]\n\n")

    monkeypatch.syspath_prepend(str(CANARY.parent))
    drill = importlib.import_module("drill")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        monkeypatch.setattr(drill, "PROXY", listening.server_port)
        clients = drill.Clients()
        clients.start()
        while clients.done < 6 and clients.is_alive():
            time.sleep(0.01)
        clients.ending = True
        clients.join()
        listening.shutdown()
    assert clients.done >= 6 and len(clients.failures) == clients.done - 3
    assert all(body["stream"] and body["ignore_eos"] for body in asked)


def test_readings_are_means_of_stretches() -> None:
    def page(first: float, between: float, good: int, bad: int) -> str:
        return "".join(
            f'{name}_sum{{engine="0"}} {total}\n{name}_count{{engine="0"}} {good}\n'
            for name, total in (
                ("vllm:time_to_first_token_seconds", first),
                ("vllm:inter_token_latency_seconds", between),
            )
        ) + "".join(
            f'rvllm:http_responses_total{{path="/v1/messages",status="{status}"}} {count}\n'
            for status, count in (("200", good), ("503", bad))
        )

    readings = [
        reading(page(*values)) for values in ((0, 0, 0, 0), (1, 2, 4, 0), (1, 2, 4, 0), (4, 3, 10, 1))
    ]
    (first, between) = live_figures([*readings, readings[-1]], readings * 2) or (None, None)
    assert first is None and between is None  # two stretches with answers tell no noise
    more = [*readings, reading(page(6, 4, 14, 1))]
    first, between = live_figures(more, more)
    assert first.baseline == [0.25, 0.5, 0.5] and between.candidate == [0.5, 1 / 6, 0.25]
    assert failure_share(more) == 1 / 15
