"""Puts a new version beside the old one, gives it more and more of the traffic, and goes on or rolls back.

    python canary.py --old http://127.0.0.1:8001 --new http://127.0.0.1:8002 \
        --start "systemctl start rvllm@green" --stop-new "systemctl stop rvllm@green" \
        --stop-old "systemctl stop rvllm@blue" --shift "deploy/rollout/shift-haproxy.sh {percent}"

1. Starts the new version and waits until it is ready. 2. Compares both by `rvllm race --gate`, before any
client meets the new one. 3. Step by step gives it a share of the traffic and compares what clients saw of
both (mean times of the same stretches, answers with 5xx). 4. Gives it all traffic and stops the old one.

Exit codes: 0 rolled out; 3 rolled back, something was worse; 4 rolled back, it could not be told; 1, 2 errors
(rolled back as well). The benchmark of step 2 takes part of both servers' capacity while it runs.
"""

from __future__ import annotations

import argparse
import http.client
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from rvllm.bench.gate import ROLL_BACK, ROLL_OUT, UNCLEAR, Limits, judge_all, page
from rvllm.bench.live import Reading, failure_share, live_figures, reading
from rvllm.errors import RvllmError


def main() -> int:
    """Runs the roll-out; whatever goes wrong gives all traffic back to the old version."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--old", required=True, help="URL of the running version")
    parser.add_argument("--new", required=True, help="URL of the new one")
    parser.add_argument("--start", help="command that starts the new version, unless it runs")
    parser.add_argument("--stop-new", help="command that stops it after a roll-back")
    parser.add_argument("--stop-old", help="command that stops the old version after a roll-out")
    parser.add_argument(
        "--shift", required=True, help="command that gives {percent} of the traffic to the new"
    )
    parser.add_argument("--steps", default="5,25,50", help="percents, one after the other [5,25,50]")
    parser.add_argument("--hold", type=float, default=300, help="seconds of each step [300]")
    parser.add_argument("--windows", type=int, default=6, help="stretches of a step that are compared [6]")
    parser.add_argument(
        "--max-failures", type=float, default=0.01, help="more 5xx than the old one had [0.01]"
    )
    parser.add_argument("--tolerance", type=float, default=0.1, help="a change that is no loss [0.1]")
    parser.add_argument(
        "--noise", type=float, default=0.5, help="noise above which nothing can be told [0.5]"
    )
    parser.add_argument("--ready-timeout", type=float, default=900, help="seconds the new one may take [900]")
    parser.add_argument(
        "--race", default="--turns 5 --n 1,4", help='words for `rvllm race`; "" leaves it out'
    )
    args = parser.parse_args()
    code = 1
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # rolls back, as Ctrl-C does
    try:
        code = roll(args, Limits(args.tolerance, args.noise))
    except (
        OSError,
        ValueError,
        RvllmError,
        http.client.HTTPException,
        subprocess.CalledProcessError,
    ) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr, flush=True)
    finally:
        if code != ROLL_OUT:
            say(f"rolling back (exit code {code})")
            shift(args, 0)
            if args.stop_new:
                subprocess.run(shlex.split(args.stop_new), check=False)
    return code


def roll(args: argparse.Namespace, limits: Limits) -> int:
    """The steps; returns the exit code, without rolling back."""
    shift(args, 0)
    if args.start:
        say("starting the new version")
        subprocess.run(shlex.split(args.start), check=True)
    wait_ready(args.new, args.ready_timeout)
    if args.race:
        say("comparing both without clients")
        command = [sys.executable, "-m", "rvllm", "race", "--subject", f"new={args.new}", "--against",
                   f"old={args.old}", "--ways", "http", "--gate", "--gate-tolerance", str(args.tolerance),
                   "--gate-noise", str(args.noise), *shlex.split(args.race)]  # fmt: skip
        if code := subprocess.run(command, check=False).returncode:
            return code
    for percent in map(int, args.steps.split(",")):
        say(f"{percent} % of the traffic to the new version")
        shift(args, percent)
        if code := watch(args, limits):
            return code
    say("all traffic to the new version")
    shift(args, 100)
    if args.stop_old and subprocess.run(shlex.split(args.stop_old), check=False).returncode:  # it drains
        say("the new version has all traffic, but the old one could not be stopped")
    return ROLL_OUT


def watch(args: argparse.Namespace, limits: Limits) -> int:
    """Compares what clients see of both during one step."""
    old, new = [scrape(args.old)], [scrape(args.new)]
    for _ in range(args.windows):
        time.sleep(args.hold / args.windows)
        old.append(scrape(args.old))
        new.append(scrape(args.new))
        if failure_share([new[0], new[-1]]) > failure_or_none(old) + args.max_failures:
            say(f"{failure_share(new):.1%} of the new version's answers are failures")
            return ROLL_BACK
    figures = live_figures(old, new)
    if not figures:
        say("too little traffic reached one of them to compare; a longer --hold or a larger first step")
        return UNCLEAR
    checks, code = judge_all(figures, limits)
    print(page(checks, code), flush=True)
    return code


def failure_or_none(readings: list[Reading]) -> float:
    """The share of failures, 0 where there were no answers."""
    share = failure_share(readings)
    return 0.0 if math.isnan(share) else share


def scrape(url: str) -> Reading:
    """Reads a server's metrics. Raises OSError or ValueError."""
    status, body = get(url, "/metrics")
    if status != 200:
        raise ValueError(f"{url}/metrics answers {status}")
    return reading(body)


def wait_ready(url: str, timeout: float) -> None:
    """Waits for /health. Raises TimeoutError."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        try:
            if get(url, "/health")[0] == 200:
                return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.5)
    raise TimeoutError(f"{url} was not ready after {timeout:.0f} s")


def get(url: str, path: str) -> tuple[int, str]:
    """(status, body) of a GET."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    try:
        connection.request("GET", parts.path.rstrip("/") + path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def shift(args: argparse.Namespace, percent: int) -> None:
    """Gives a share of the traffic to the new version."""
    command = [word.replace("{percent}", str(percent)) for word in shlex.split(args.shift)]
    subprocess.run(command, check=True, env={**os.environ, "PERCENT": str(percent)})


def say(text: str) -> None:
    """A line for whoever watches."""
    print(f"{Path(__file__).name}: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
