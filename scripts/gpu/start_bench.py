"""From the start of `rvllm serve` to ready, and to the first answer over HTTP.

    PYTHONPATH=src python scripts/gpu/start_bench.py MODEL [--times 3] [--device cuda] [-- flags of serve]

MODEL: a folder with weights, or with a config.json alone and `-- --load-format dummy`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

PATIENCE = 120  # seconds


def once(model: str, device: str, flags: list[str], log: Path) -> tuple[float, float]:
    """Seconds from the process's start to ready, and to the end of the first answer."""
    began = time.perf_counter()
    words = [model, "--device", device, "--skip-tokenizer-init", "--port", "0", "--served-model-name", "m"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "rvllm", "serve", *words, *flags], stdout=file, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": ""},  # compiled once, as an installed package is
        )  # fmt: skip
    try:
        while not (found := re.search(r"listening on (http://\S+)", log.read_text())):
            if process.poll() is not None or time.perf_counter() > began + PATIENCE:
                raise SystemExit(log.read_text())
            time.sleep(0.005)
        ready = time.perf_counter() - began
        body = {"model": "m", "prompt": [[*range(5, 37)]], "max_tokens": 1, "temperature": 0}
        asked = urllib.request.Request(
            found[1] + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            answer.read()
        return ready, time.perf_counter() - began
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def main() -> None:
    """Prints the figures."""
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(words[:at])
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        for _ in range(args.times):
            ready, answered = once(args.model, args.device, words[at + 1 :], log)
            print(f"ready after {ready:.2f} s, first answer after {answered:.2f} s", flush=True)
            lines = log.read_text().splitlines()
            print(*(line for line in lines if line.startswith("  start ")), sep="\n", flush=True)


if __name__ == "__main__":
    main()
