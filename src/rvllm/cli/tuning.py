"""`rvllm kernels tune | show-tuning`: what `--gemm-strategy auto` measures on a GPU."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rvllm.cli.common.models import read
from rvllm.config import EngineConfig
from rvllm.errors import UsageError
from rvllm.settings import build

if TYPE_CHECKING:
    from rvllm.backends.cuda.tuning.cache import TuningCache

Group = tuple[str, ...]  # the parts of a key up to the number of tokens


def tune(args: argparse.Namespace) -> int:
    """Times every candidate for the products of a model, whatever was kept; prints what is chosen."""
    from rvllm.backends.cuda.formats.choose import kept
    from rvllm.backends.cuda.loaded_model import OpenDevice
    from rvllm.backends.cuda.tuning.start import tuned

    if not args.model:
        raise UsageError("kernels tune: --model names the model whose products are timed")
    asked = {"model": args.model, "device": "cuda", "dtype": args.dtype, "gemm_strategy": "auto"}
    config = build(EngineConfig, asked)
    model = read(config)
    found = OpenDevice.for_program(model.program, config)
    try:
        program = kept(model.program, model.stored, config, found.facts)
        began = time.perf_counter()
        _, lines = tuned(program, found.facts, _progress, afresh=True)
        print("\n".join(lines))
        print(f"{time.perf_counter() - began:.1f} s on {found.facts.name}")
    finally:
        found.device.close()
    return 0


def _progress(done: float, text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text}: {done:4.0%}", end="\n" if done >= 1 else "", file=sys.stderr, flush=True)


def show(args: argparse.Namespace) -> int:
    """Prints the fastest kernel that was measured for each shape and number of tokens. Needs no GPU."""
    from rvllm.backends.cuda.tuning.cache import TuningCache
    from rvllm.backends.cuda.tuning.start import tuning_dir
    from rvllm.cli.common.tables import table

    cache = TuningCache.open(tuning_dir())
    heading = ("GPU", "type", "shape", "tokens", "fastest", "us", "next best of others")
    if cache.entries:
        print(table(heading, summary(cache), right=(3, 5)))
    damaged = f", {cache.damaged} damaged lines" * bool(cache.damaged)
    print(f"{len(cache.entries)} times in {cache.path}{damaged}")
    return 0


def summary(cache: TuningCache) -> list[Sequence[str]]:
    """A row for each GPU, type, shape and number of tokens: the fastest kernel, and whose is the next."""
    groups: dict[Group, dict[str, float]] = {}
    for parts, microseconds in cache.rows():
        if len(parts) == 10:
            groups.setdefault(tuple(parts[:8]), {})[parts[8]] = microseconds
    rows: list[Sequence[str]] = []
    for group, times in sorted(groups.items(), key=lambda item: (*item[0][:7], int(item[0][7]))):
        gpu, _, dtype, quantisation, n, k, epilogue, tokens = group
        best = min(times, key=times.__getitem__)
        others = {name: us for name, us in times.items() if name.split()[0] != best.split()[0]}
        nearest = min(others, key=others.__getitem__, default="")
        behind = f"{nearest} {(others[nearest] / times[best] - 1) * 100:+.0f} %" if nearest else ""
        kind = dtype if quantisation == "none" else f"{dtype} {quantisation}"
        rows.append((gpu, kind, f"{n}x{k} {epilogue}", tokens, best, f"{times[best]:.1f}", behind))
    return rows
