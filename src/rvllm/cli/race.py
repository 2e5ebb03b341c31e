"""`rvllm race`: the same work for several engines, one after the other, and a report of who was faster."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rvllm.cli.common.gate import add_gate, gate_limits
from rvllm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rvllm.bench.load import Sent
    from rvllm.bench.race.engines import Engine
    from rvllm.bench.race.goodput import Bounds
    from rvllm.bench.race.measure import Entry, Plan
    from rvllm.bench.race.server import Server


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("race", help="measure engines beside each other", allow_abbrev=False)
    who = parser.add_argument_group("engines").add_argument
    who("--model", default="smollm2-135m", help="the model of all that are started here [smollm2-135m]")
    who("--subject", metavar="NAME=URL", help="a running server in our place, which is then not started")
    who("--against", default="", metavar="LIST",
        help="vllm, sglang, llama.cpp, a name of --engines, URL or NAME=URL; by commas")  # fmt: skip
    who("--at", action="append", default=[], metavar="NAME=PATH",
        help="where an engine is: its environment's Python, or llama.cpp's folder of programs")  # fmt: skip
    who("--args", action="append", default=[], metavar="NAME=WORDS", help="more words for a server's command")
    who(
        "--engines",
        metavar="FILE",
        help="TOML: [engines.NAME] with serve, direct, version, env, body, size ...",
    )
    who("--start-timeout", type=float, default=600, metavar="S", help="seconds a server has to start [600]")
    who("--stall-timeout", type=float, default=600, metavar="S",
        help="seconds without a token after which a request has failed [600]")  # fmt: skip
    work = parser.add_argument_group("work").add_argument
    work("--prompts", default="random", help="random, fixed, sharegpt or long [random]")
    work("--n", default="1,4,16", metavar="LIST", help="requests at once, one measurement each [1,4,16]")
    work("--input-len", type=int, default=128, metavar="INT", help="tokens of a prompt [128]")
    work("--output-len", type=int, default=64, metavar="INT", help="tokens of an answer [64]")
    work("--vocab-size", type=int, default=30000, metavar="INT", help="random ids lie below [30000]")
    work("--seed", type=int, default=0, metavar="INT", help="of prompts and arrivals [0]")
    work("--turns", type=int, default=3, metavar="INT", help="how often each engine is started [3]")
    work("--runs", type=int, default=1, metavar="INT", help="measurements of a size after each start [1]")
    work(
        "--ways",
        default="http,direct",
        metavar="LIST",
        help="http, direct (without HTTP) or both [http,direct]",
    )
    work("--goodput", nargs="+", default=[], metavar="NAME:MS",
         help="ttft:MS, tpot:MS, e2el:MS: find the highest rate of arrivals that keeps them")  # fmt: skip
    work("--goodput-share", type=float, default=0.95, metavar="X", help="share of requests that must [0.95]")
    work("--goodput-requests", type=int, default=40, metavar="INT", help="requests at each rate [40]")
    work("--goodput-rate", type=float, default=1.0, metavar="R", help="the first rate, requests a second [1]")
    out = parser.add_argument_group("results")
    out.add_argument("--out", metavar="DIR", help="write report.md, report.json and plots there")
    add_gate(out, None, "be no worse than any other")


def main(args: argparse.Namespace) -> int:
    """Runs the race; prints the report."""
    from rvllm.bench.gate import judge_all, page
    from rvllm.bench.race.goodput import bounds_of
    from rvllm.bench.race.measure import race
    from rvllm.bench.race.report import figures, make_folder, markdown, write

    engines = _engines(args)
    bounds = bounds_of(args.goodput, args.goodput_share) if args.goodput else None
    limits = gate_limits(args) if args.gate else None
    if limits and len(engines) < 2:
        raise UsageError("--gate needs somebody to be compared with (--against)")
    if limits and args.turns * args.runs < 3:
        raise UsageError("--gate needs 3 measurements to know the noise: raise --turns or --runs")
    plan = _plan(args, engines)
    if limits and "http" not in plan.ways:
        raise UsageError("--gate judges what goes over HTTP: --ways must have http")
    if args.out:
        make_folder(Path(args.out))
    about = _about(args, plan)

    def keep(turns: int, entries: list[Entry]) -> None:
        """What was measured until now: a race of hours may be cut short."""
        about.update(turns=turns, load_after=round(os.getloadavg()[0], 2))
        if args.out:
            write(Path(args.out), about, entries)

    with _sigterm_unwinds():
        entries = race(plan, engines, _say, _after(args, bounds) if bounds else None, keep)
    print(markdown(about, entries, []), end="")
    if limits:
        checks, code = judge_all([f for other in entries[1:] for f in figures(entries, other)], limits)
        print("\n" + page(checks, code))
        return code
    return int(any("http" in e.absent and "http" in plan.ways for e in entries))


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Lets a SIGTERM end the servers that were started, as Ctrl-C does: they are sessions of their own."""

    def end(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _engines(args: argparse.Namespace) -> list[Engine]:
    from rvllm.bench.race.engines import engines_of

    names = [name for name in args.against.split(",") if name]
    subject = args.subject or "rvllm"
    if args.subject and "://" not in args.subject:
        raise UsageError(f"--subject: expected NAME=URL, got {args.subject!r}")
    config = Path(args.engines) if args.engines else None
    return engines_of([subject, *names], _pairs("--at", args.at), _pairs("--args", args.args), config)


def _pairs(flag: str, words: Sequence[str]) -> dict[str, str]:
    found = {}
    for word in words:
        name, mark, value = word.partition("=")
        if not mark or not value:
            raise UsageError(f"{flag}: expected NAME=VALUE, got {word!r}")
        found[name] = value
    return found


def _plan(args: argparse.Namespace, engines: Sequence[Engine]) -> Plan:
    from rvllm.bench.race.measure import Plan
    from rvllm.bench.race.server import api_key
    from rvllm.bench.race.workload import checked

    sizes = [size.strip() for size in args.n.split(",")]
    if not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise UsageError(f"--n: expected whole numbers of at least 1, got {args.n!r}")
    ways = tuple(way for way in args.ways.split(",") if way)
    if not ways or set(ways) - {"http", "direct"}:
        raise UsageError(f"--ways: expected http, direct or both, got {args.ways!r}")
    for name in ("turns", "runs", "start_timeout", "stall_timeout", "goodput_requests", "goodput_rate"):
        if not getattr(args, name) > 0:
            raise UsageError(f"--{name.replace('_', '-')} must be above 0")
    work = checked(args.prompts, args.input_len, args.output_len, args.vocab_size, args.seed)
    model = args.model
    if any(engine.serve for engine in engines):  # files, the same for all
        from rvllm.cli.common.models import fetch

        model = str(fetch(model).absolute())
    return Plan(model, work, tuple(map(int, dict.fromkeys(sizes))), args.turns, args.runs, ways,
                args.start_timeout, args.stall_timeout, api_key())  # fmt: skip


def _about(args: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    import dataclasses

    from rvllm.bench.race.machine import machine

    return {
        "model": plan.model,
        "model_name": args.model if "/" not in args.model else Path(args.model).name,
        "workload": dataclasses.asdict(plan.workload),
        "sizes": list(plan.sizes),
        "turns": plan.turns,
        "runs": plan.runs,
        "goodput": f"{' '.join(args.goodput)}, kept by {args.goodput_share:.0%}" if args.goodput else None,
        "command": shlex.join(["rvllm", *sys.argv[1:]]),
        "machine": machine(),
    }


def _after(args: argparse.Namespace, bounds: Bounds) -> Any:
    """Looks for the highest rate while the server of the last turn runs."""
    from rvllm.bench.race.goodput import search
    from rvllm.bench.race.measure import send

    def look(entry: Entry, engine: Engine, server: Server, plan: Plan) -> None:
        def measure(rate: float) -> Sequence[Sent]:
            _say(f"{entry.name}: {rate:g} requests/s")
            turn = 10_001 + len(entry.goodput)
            return send(plan, engine, server, args.goodput_requests, turn, rate=rate)

        search(measure, bounds, args.goodput_rate, entry.goodput)

    return look


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
