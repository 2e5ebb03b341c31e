"""The canary from end to end on the CPU: a new version as good as the old one, and one made slow on purpose.

    PYTHONPATH=src python deploy/rollout/drill.py [--model smollm2-135m]

Needs haproxy. Clients stream through the proxy all the time; the slow version has lost its compiled kernels
(`--cpu-kernels numpy`). Expected: exit code 0 and all traffic on the new version; then 3 and all on the old.
No client may see a failure. Takes some minutes.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from canary import get, wait_ready

from rvllm.backends.cpu.compiled.library import missing
from rvllm.bench.gate import ROLL_BACK, ROLL_OUT

HERE = Path(__file__).parent
OLD, NEW, PROXY = 18101, 18102, 18100
URL = "http://127.0.0.1:{}".format


class Clients(threading.Thread):
    """Streams one answer after the other through the proxy until told to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.done, self.failures, self.ending = 0, [], False

    def run(self) -> None:
        """Sends requests, two at a time."""
        import asyncio

        from rvllm.bench.load import Target, run

        number = 0
        while not self.ending:
            number += 1
            bodies = [
                {"model": "m", "prompt": f"({number}.{i}) Tell me about bridges.", "max_tokens": 12,
                 "ignore_eos": True, "skip_special_tokens": False, "stream": True,
                 "stream_options": {"include_usage": True}}
                for i in range(2)
            ]  # fmt: skip
            target = Target(URL(PROXY) + "/v1/completions")
            sent = asyncio.run(run(target, bodies, [8, 8]))
            self.done += len(sent)
            self.failures += [one.error for one in sent if one.error]


def serve(model: str, port: int, *words: str) -> subprocess.Popen[bytes]:
    """Starts a version."""
    command = [sys.executable, "-m", "rvllm", "serve", "--model", model, "--served-model-name", "m", "--port",
               str(port), "--device", "cpu", "--threads", "1", *words]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def answers(port: int) -> float:
    """Completions that a server has answered."""
    lines = get(URL(port), "/metrics")[1].splitlines()
    return sum(
        float(line.split()[-1])
        for line in lines
        if line.startswith("rvllm:http_responses_total") and '"/v1/completions"' in line
    )


def drill(model: str, words: tuple[str, ...], expected: int, env: dict[str, str], canary: list[str]) -> bool:
    """One roll-out with a new version of these flags; whether all went as expected."""
    processes = [serve(model, OLD)]
    clients = Clients()
    try:
        wait_ready(URL(OLD), 120)
        processes.append(subprocess.Popen(["haproxy", "-db", "-f", str(HERE / "haproxy.cfg")], env=env))
        wait_ready(URL(PROXY), 30)
        processes.append(serve(model, NEW, *words))
        wait_ready(URL(NEW), 120)
        time.sleep(2)  # for the proxy's own check of the new one
        clients.start()
        began = time.monotonic()
        command = [sys.executable, str(HERE / "canary.py"), "--old", URL(OLD), "--new", URL(NEW), "--shift",
                   f"{HERE / 'shift-haproxy.sh'} {{percent}}", *canary]  # fmt: skip
        code = subprocess.run(command, env=env, check=False).returncode
        before = {port: answers(port) for port in (OLD, NEW)}
        time.sleep(5)
        served = {port: answers(port) - before[port] for port in (OLD, NEW)}
    finally:
        clients.ending = True
        if clients.is_alive():
            clients.join()
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
            process.wait()
    winner, loser = (NEW, OLD) if expected == ROLL_OUT else (OLD, NEW)
    good = code == expected and served[winner] > 0 and not clients.failures
    print(
        f"drill: {' '.join(words) or 'the same version'}: exit code {code} (expected {expected}) after "
        f"{time.monotonic() - began:.0f} s; {clients.done} streams, {len(clients.failures)} failed"
        f"{clients.failures[:1]}; in the 5 s after it {served[winner]:.0f} answers where they belong, "
        f"{served[loser]:.0f} elsewhere"
    )
    return good


def main() -> int:
    """Both drills."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--canary", nargs=argparse.REMAINDER, default=[], help="other words for canary.py")
    args = parser.parse_args()
    if absent := missing():
        parser.error(f"the slow version is the one without compiled kernels, and {absent}")
    canary = args.canary or ["--steps", "25,50", "--hold", "24", "--windows", "4", "--noise", "3", "--race",
                             "--turns 3 --n 2 --input-len 32 --output-len 24"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "HAPROXY_SOCKET": f"{folder}/haproxy.sock", "HAPROXY_BIND": f"127.0.0.1:{PROXY}",
               "OLD_SERVER": f"127.0.0.1:{OLD}", "NEW_SERVER": f"127.0.0.1:{NEW}"}  # fmt: skip
        same = drill(args.model, (), ROLL_OUT, env, canary)
        slow = drill(args.model, ("--cpu-kernels", "numpy"), ROLL_BACK, env, canary)
    return 0 if same and slow else 1


if __name__ == "__main__":
    sys.exit(main())
