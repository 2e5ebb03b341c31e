"""Where the seconds of a served run went, from the steps that --trace-steps wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from rvllm.telemetry.step_trace import TracedStep

PAUSE = 0.5  # seconds without a step that end a period of work
COLUMNS = ("", "steps", "seqs", "tokens", "padded", "ms", "us/token", "s", "%", "idle s")


def periods(steps: Sequence[TracedStep]) -> list[list[TracedStep]]:
    """Runs of steps between which the engine waited for requests."""
    found: list[list[TracedStep]] = []
    for step in steps:
        if not found or (step.alone and step.outside > PAUSE):
            found.append([])
        found[-1].append(step)
    return found


def wall_of(steps: Sequence[TracedStep]) -> float:
    """Seconds from the first step's begin to the last one's end, but for what the device waited before it."""
    first, last = steps[0], steps[-1]
    return last.began + last.schedule + last.launch + max(last.collect, last.device) - first.began


def size_of(step: TracedStep) -> str:
    """Its kind and what it was padded to, in a form that sorts."""
    return f"{step.kind} {step.padded:>5}"


def tables(steps: Sequence[TracedStep]) -> list[str]:
    """Lines of a period: the device by kinds of steps, what it waited for, the host, and steps by size."""
    wall = wall_of(steps)
    device = sum(s.device for s in steps)
    idle = [s.idle for s in steps[1:]]
    dry = sum(s.idle for s in steps[1:] if s.alone)
    captured = sum(min(s.idle, s.capture) for s in steps[1:] if not s.alone)
    draws = sum(s.draws for s in steps)
    return [
        f"{len(steps)} steps in {wall:.3f} s: {draws} tokens drawn, {draws / wall:.1f} a second, "
        f"{sum(s.prompt_tokens for s in steps)} prompt tokens",
        f"device: {device:.3f} s in steps ({device / wall:.1%}), {sum(idle):.3f} s idle between them: "
        f"{dry:.3f} with no step under way, {captured:.3f} for graphs, "
        f"{sum(idle) - dry - captured:.3f} for the rest",
        _host(steps),
        "",
        *_table(steps, wall, lambda s: s.kind),
        "",
        *_table(steps, wall, size_of),
    ]


def _host(steps: Sequence[TracedStep]) -> str:
    """What the engine's thread did."""
    captures = [s.capture for s in steps if s.capture]
    return (
        f"host: scheduling {sum(s.schedule for s in steps):.3f} s, launching "
        f"{sum(s.launch - s.capture for s in steps):.3f}, capturing {len(captures)} steps' graphs "
        f"{sum(captures):.3f}, booking results {sum(s.update for s in steps):.3f}, messages and nothing to "
        f"do {sum(s.outside for s in steps[1:]):.3f}, waiting for the device "
        f"{sum(s.collect for s in steps):.3f}"
    )


def _table(steps: Iterable[TracedStep], wall: float, key: Callable[[TracedStep], str]) -> Iterator[str]:
    groups: dict[str, list[TracedStep]] = {}
    for step in steps:
        groups.setdefault(key(step), []).append(step)
    yield "{:>14} {:>6} {:>5} {:>7} {:>7} {:>7} {:>8} {:>7} {:>5} {:>7}".format(*COLUMNS)
    for name in sorted(groups):
        rows = groups[name]
        n, device, tokens = len(rows), sum(s.device for s in rows), sum(s.tokens for s in rows)
        seqs, padded = sum(s.decodes + s.prompts for s in rows), sum(s.padded for s in rows)
        yield (
            f"{name:>14} {n:6} {seqs / n:5.0f} {tokens / n:7.0f} {padded / n:7.0f} {1e3 * device / n:7.2f} "
            f"{1e6 * device / max(1, tokens):8.1f} {device:7.3f} {100 * device / wall:5.1f} "
            f"{sum(s.idle for s in rows):7.3f}"
        )
