"""Two models on one device, asked in turn: how long a swap takes, the same tokens every time, no byte lost.

    PYTHONPATH=src python scripts/gpu/switch_bench.py CONFIG_DIR CONFIG_DIR [--swaps 50] [--device cuda]

Random weights, a server of its own. Exits with 1 when a token differs or device memory is lost.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from statistics import median
from typing import Any

PROMPTS = [[97 * i + 13 * j + 100 for j in range(40)] for i in range(4)]


class Server:
    """`rvllm serve` with several models."""

    def __init__(self, models: list[str], device: str, log: Path, more: list[str]) -> None:
        flags = [word for model in models for word in ("--model", model)]
        flags += ["--served-model-name", *(f"m{i}" for i in range(len(models))), "--device", device]
        flags += ["--load-format", "dummy", "--skip-tokenizer-init", "--port", "0", "--max-model-len", "4096"]
        flags += ["--capture-graphs", "eager"]  # those captured later take memory, too
        began = time.perf_counter()
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rvllm", "serve", *flags, "--max-num-seqs", "64", *more],
                stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        while not (found := re.search(r"listening on (http://\S+)", log.read_text())):
            if self.process.poll() is not None or time.perf_counter() > began + 120:
                raise SystemExit(log.read_text())
            time.sleep(0.05)
        self.url = found[1]
        print(log.read_text())
        print(f"ready after {time.perf_counter() - began:.2f} s", flush=True)

    def get(self, path: str, body: dict[str, Any] | None = None) -> str:
        """The answer's text."""
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return str(answer.read().decode())

    def tokens(self, model: str, count: int) -> list[list[int]]:
        """What the model says to all prompts."""
        answer = json.loads(self.get("/v1/completions", {
            "model": model, "prompt": PROMPTS, "max_tokens": count, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True,
        }))  # fmt: skip
        return [choice["token_ids"] for choice in answer["choices"]]

    def swap_seconds(self) -> float:
        """Seconds spent on swaps so far."""
        found = re.findall(
            r"^rvllm:backend_model_swap_seconds_total\{.*\} (\S+)$", self.get("/metrics"), re.M
        )
        return float(found[0])

    def free(self) -> int:
        """Bytes of device memory that are free; 0 without a GPU."""
        try:
            from cuda.bindings import driver

            if driver.cuInit(0)[0] != 0:
                return 0
            if not hasattr(self, "context"):
                self.context = driver.cuDevicePrimaryCtxRetain(0)[1]
            driver.cuCtxSetCurrent(self.context)
            return int(driver.cuMemGetInfo()[1])
        except (ImportError, RuntimeError):
            return 0


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", nargs=2)
    parser.add_argument("--swaps", type=int, default=50)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("more", nargs="*", help="further flags of the server, behind --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(args.configs, args.device, Path(folder) / "log", args.more)
        try:
            sys.exit(measure(server, args.swaps))
        finally:
            server.process.terminate()
            server.process.wait(60)


def measure(server: Server, swaps: int) -> int:
    """Swaps so often; 1 when anything is wrong."""
    expected = {name: server.tokens(name, 16) for name in ("m0", "m1")}
    server.tokens("m0", 16)
    free, wrong = server.free(), 0
    times, whole = list[float](), list[float]()
    for number in range(swaps):
        name = f"m{1 - number % 2}"
        before, began = server.swap_seconds(), time.perf_counter()
        server.tokens(name, 1)
        whole.append(time.perf_counter() - began)
        times.append(server.swap_seconds() - before)
        wrong += server.tokens(name, 16) != expected[name]
        if number % 10 == 9 or number < 2:
            print(f"swap {number}: {times[-1]:.3f} s, first answers after {whole[-1]:.3f} s", end="")
            # after every second one m0 is awake, as it was before
            print(f"; {free - server.free()} bytes gone" if number % 2 else "", flush=True)
    if swaps % 2:
        server.tokens("m0", 1)
    lost = free - server.free()
    print(
        f"{swaps} swaps: {median(times):.3f} s median, {max(times):.3f} at most; first answers after "
        f"{median(whole):.3f} s; {wrong} answers with other tokens; {lost} bytes of device memory lost",
        flush=True,
    )
    return int(bool(wrong or lost > 0))


if __name__ == "__main__":
    main()
