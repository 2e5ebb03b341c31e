"""The race itself: engines in turns, each started alone, warmed up, and given the same requests."""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rvllm.bench.arrivals import Traffic
from rvllm.bench.load import Sent, Target, run
from rvllm.bench.race.engines import Engine, filled, weighed
from rvllm.bench.race.server import Server, end, running
from rvllm.bench.race.workload import Workload
from rvllm.bench.stats import median, percentile, rate
from rvllm.errors import RvllmError

WARM_UP = 4  # requests, of 8 tokens each
MAX_DIRECT = 3600.0  # seconds that all sizes may take without HTTP, beside the start
Say = Callable[[str], None]
Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Plan:
    """What each engine is asked. sizes: requests at once; turns: how often each engine is started anew."""

    model: str
    workload: Workload
    sizes: tuple[int, ...]
    turns: int = 3
    runs: int = 1
    ways: tuple[str, ...] = ("http", "direct")
    start_timeout: float = 600.0
    stall_timeout: float = 600.0
    key: str | None = None

    def values(self) -> dict[str, object]:
        """What commands are filled in with."""
        seqs, context = max(self.sizes), self.workload.longest
        return {"model": self.model, "seqs": seqs, "context": context, "total": seqs * context}


@dataclass
class Entry:
    """What is known of one engine after the race.

    http, direct: samples by batch size and figure. absent: what was not measured, with the reason.
    """

    name: str
    version: str = "unknown"
    size_bytes: int = 0
    size_of: list[str] = field(default_factory=list)
    started: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    http: dict[int, Samples] = field(default_factory=dict)
    direct: dict[int, Samples] = field(default_factory=dict)
    goodput: list[dict[str, Any]] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    failed: int = 0
    wrong_length: int = 0

    def told(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


After = Callable[[Entry, Engine, Server, Plan], None]
Keep = Callable[[int, list[Entry]], None]


def race(
    plan: Plan, engines: Sequence[Engine], say: Say, after: After | None = None, keep: Keep | None = None
) -> list[Entry]:
    """Measures all engines; their order turns round from one turn to the next.

    after: called with each engine's running server in the last turn. keep: called with what there is after
    every turn, and their number. An engine that cannot be measured has the reason in `absent`.
    """
    entries = {}
    for engine in engines:
        size_of, size = weighed(engine)
        entries[engine.name] = Entry(engine.name, _version(engine), size, size_of)
    for turn in range(plan.turns):
        for engine in engines if turn % 2 == 0 else list(reversed(engines)):
            entry = entries[engine.name]
            last = after if turn == plan.turns - 1 else None
            for way in plan.ways:
                if way in entry.absent:
                    continue
                say(f"turn {turn + 1} of {plan.turns}: {engine.name}, {way}")
                try:
                    _http(plan, engine, entry, turn, last) if way == "http" else _direct(
                        plan, engine, entry, turn
                    )
                except RvllmError as error:
                    entry.absent[way] = str(error)
                    say(str(error))
        if keep is not None:
            keep(turn + 1, list(entries.values()))
    return list(entries.values())


def _version(engine: Engine) -> str:
    if engine.url:
        from rvllm.bench.race.server import get

        try:
            return str(get(engine.url, "/version")["version"])
        except Exception:  # any server may have anything, or nothing, there
            return "unknown"
    if not engine.version:
        return "unknown"
    try:
        done = subprocess.run(
            filled(engine.version, {"at": engine.at}),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = (done.stdout + done.stderr).strip().splitlines()
    said = [line for line in lines if "version" in line.lower()] or lines[-1:]
    return said[0].strip() if said and done.returncode == 0 else "unknown"


def _http(plan: Plan, engine: Engine, entry: Entry, turn: int, after: After | None) -> None:
    began = time.perf_counter()
    with running(engine, plan.values(), plan.start_timeout) as server:
        first = send(plan, engine, server, 1, -1 - turn, output_len=2)
        if not engine.url and not first[0].error:
            entry.started.append(server.started)
            entry.first_token.append(first[0].first - first[0].start + server.started)
        warm = send(plan, engine, server, WARM_UP, -101 - turn, output_len=8)
        if failed := next((one.error for one in (*first, *warm) if one.error), ""):
            raise RvllmError(
                f"{engine.name} refuses the warm-up after {time.perf_counter() - began:.0f} s: {failed}"
            )
        for size in plan.sizes:
            for number in range(plan.runs):
                used = time.process_time()
                sent = send(plan, engine, server, size, turn * plan.runs + number)
                used = time.process_time() - used
                _note(plan, entry, size, turn * plan.runs + number, sent, used)
        if server.process is not None:
            entry.memory.append(float(server.memory()))
        if after is not None:
            after(entry, engine, server, plan)


def send(
    plan: Plan, engine: Engine, server: Server, count: int, turn: int,
    output_len: int | None = None, rate: float = float("inf"),
) -> list[Sent]:  # fmt: skip
    """Sends `count` requests of a turn, all at once or at a rate; output_len: less than the workload's."""
    requests = plan.workload.requests(count, turn)
    bodies = [each.body(server.model, engine.body) for each in requests]
    if output_len is not None:
        bodies = [{**body, "max_tokens": output_len} for body in bodies]
    headers = (("Authorization", f"Bearer {plan.key}"),) if plan.key else ()
    target = Target(server.url + "/v1/completions", headers, stall=plan.stall_timeout)
    lengths = [len(each.ids) for each in requests]
    arrivals = Traffic(rate).arrivals(len(bodies), plan.workload.seed)
    return asyncio.run(run(target, bodies, lengths, arrivals=arrivals))


def _note(plan: Plan, entry: Entry, size: int, turn: int, sent: Sequence[Sent], used: float) -> None:
    """Adds one run's figures; failures and answers of another length are counted, not left out."""
    asked = [each.output_len for each in plan.workload.requests(size, turn)]
    entry.failed += sum(1 for one in sent if one.error)
    entry.wrong_length += sum(
        1 for one, length in zip(sent, asked, strict=True) if not one.error and one.output_tokens != length
    )
    done = [one for one in sent if not one.error]
    samples = entry.http.setdefault(size, {})
    wall = max((one.last for one in done), default=0.0) - min((one.start for one in done), default=0.0)
    firsts = [1e3 * (one.first - one.start) for one in done]
    per_token = [
        1e3 * (one.last - one.first) / (one.output_tokens - 1) for one in done if one.output_tokens > 1
    ]
    gaps = [1e3 * gap for one in done for gap in one.gaps]
    for name, value in {
        "tokens_per_s": rate(sum(one.output_tokens for one in done), wall),
        "ttft_ms": median(firsts), "ttft_p99_ms": percentile(firsts, 99),
        "tpot_ms": median(per_token), "itl_p99_ms": percentile(gaps, 99),
        "client_share": rate(used, wall),
    }.items():  # fmt: skip
        samples.setdefault(name, []).append(value)


def _direct(plan: Plan, engine: Engine, entry: Entry, turn: int) -> None:
    if not engine.direct:
        raise RvllmError(f"{engine.name}: a server at a URL has no other way" if engine.url
                         else f"{engine.name}: no `direct` command is known")  # fmt: skip
    if engine.direct[-1] == "python":
        rows = _by_python(plan, engine, turn)
    else:
        rows = _by_batched_bench(plan, engine)
    for size, seconds, first, tokens in rows:
        samples = entry.direct.setdefault(size, {})
        samples.setdefault("tokens_per_s", []).append(rate(tokens, seconds))
        samples.setdefault("first_ms", []).append(1e3 * first)


Row = tuple[int, float, float, int]  # requests at once, seconds, seconds until all had a token, tokens


def _by_python(plan: Plan, engine: Engine, turn: int) -> list[Row]:
    """Runs `direct.py` in the engine's own Python."""
    if plan.workload.kind == "fixed":
        raise RvllmError(
            f"{engine.name}: fixed texts go over HTTP alone, where each engine has its tokenizer"
        )
    source = Path(__file__).with_name("direct.py").read_text()
    warm = plan.workload.requests(WARM_UP, -101 - turn)
    jobs: list[dict[str, Any]] = [{"prompts": [r.ids for r in warm], "outputs": [8] * len(warm)}]
    sizes = [size for size in plan.sizes for _ in range(plan.runs)]
    for number, size in enumerate(sizes):
        requests = plan.workload.requests(size, turn * plan.runs + number % plan.runs)
        others = plan.workload.requests(size, -1001 - turn * plan.runs - number % plan.runs)
        jobs.append({
            "prompts": [r.ids for r in requests], "outputs": [r.output_len for r in requests],
            "first": [r.ids for r in others],
        })  # fmt: skip
    command = [*filled(engine.direct[:-1], {"at": engine.at}), "-c", source, engine.name, plan.model]
    text = _output(engine, command, json.dumps({"settings": engine.settings, "jobs": jobs}), plan)
    told = [json.loads(line[9:]) for line in text.splitlines() if line.startswith("measured ")]
    if len(told) != len(sizes):
        raise RvllmError(f"{engine.name}: {len(told)} of {len(sizes)} runs came to an end without HTTP")
    return [
        (size, row["seconds"], row["first_seconds"], row["output_tokens"])
        for size, row in zip(sizes, told, strict=True)
    ]


def _by_batched_bench(plan: Plan, engine: Engine) -> list[Row]:
    """llama.cpp's own `llama-batched-bench`: prompts of one length, which it makes up itself."""
    work = plan.workload
    if work.kind != "random":
        raise RvllmError(
            f"{engine.name}: llama-batched-bench has prompts of one length alone (--prompts random)"
        )
    rows: list[Row] = []
    for _ in range(plan.runs):
        command = [*filled(engine.direct, {**plan.values(), "at": engine.at}), "-npp", str(work.input_len),
                   "-ntg", str(work.output_len), "-npl", ",".join(map(str, plan.sizes))]  # fmt: skip
        text = _output(engine, command, "", plan)
        told = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        if [row["pl"] for row in told] != list(plan.sizes):
            raise RvllmError(
                f"{engine.name}: llama-batched-bench measured {len(told)} of {len(plan.sizes)} sizes"
            )
        rows += [(row["pl"], row["t"], row["t_pp"], row["pl"] * row["tg"]) for row in told]
    return rows


def _output(engine: Engine, command: Sequence[str], given: str, plan: Plan) -> str:
    """What a command prints; it and all that it started are ended with this."""
    with tempfile.TemporaryDirectory() as folder:  # so that `-c` imports nothing that lies about
        try:
            process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True, cwd=folder, env={**os.environ, **engine.env}, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise RvllmError(f"{engine.name}: cannot be measured without HTTP: {error}") from None
        with process:
            try:
                out, told = process.communicate(given, plan.start_timeout + MAX_DIRECT)
            except subprocess.TimeoutExpired as error:
                raise RvllmError(f"{engine.name}: no end without HTTP after {error.timeout:g} s") from None
            finally:
                end(process)
    if process.returncode:
        lines = (told or out).strip().splitlines() or ["it said nothing"]
        raise RvllmError(f"{engine.name} ended with {process.returncode} without HTTP: {lines[-1][-300:]}")
    return out


def middle(samples: Samples, name: str) -> float:
    """The median of a figure, nan where there is none."""
    values = [value for value in samples.get(name, ()) if math.isfinite(value)]
    return median(values)
