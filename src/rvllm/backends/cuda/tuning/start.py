"""The strategy of products that a start runs with: as asked, or for auto from what was measured here."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from functools import cache as once
from pathlib import Path

from rvllm.backends.base import Progress
from rvllm.backends.cuda.device.catalog import Catalog
from rvllm.backends.cuda.device.driver import DeviceFacts, Stream, call
from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.backends.cuda.layout.fusion import fuse
from rvllm.backends.cuda.layout.joining import joined
from rvllm.backends.cuda.ops.gemm import cublas, cutlass
from rvllm.backends.cuda.ops.gemm.strategy import Choice, GemmStrategy, ProductShape, Provider
from rvllm.backends.cuda.tuning.cache import Conditions, TuningCache
from rvllm.backends.cuda.tuning.candidates import Candidate, plan_of, shapes_of
from rvllm.backends.cuda.tuning.check import checks, forget_wrong
from rvllm.backends.cuda.tuning.choose import Lookup, known_times, told, tune
from rvllm.backends.cuda.tuning.measure import GemmTimer, fill_kernel
from rvllm.config import EngineConfig, kernel_cache_dir
from rvllm.errors import MissingKernelError, UsageError
from rvllm.kernels import build
from rvllm.kernels.external import missing_headers
from rvllm.kernels.gemm.cutlass.specs import SPECS as CUTLASS_SPECS
from rvllm.kernels.gemm.specs import SPECS as NATIVE_SPECS
from rvllm.kernels.manifest import MANIFEST
from rvllm.kernels.types import SHORT
from rvllm.program.ops.dense import Program

LIBRARY = "cublaslt"


def tuning_dir() -> Path:
    """Where what was measured is kept."""
    return kernel_cache_dir().parent / "autotune"


def strategy_for(
    program: Program, config: EngineConfig, facts: DeviceFacts, report: Progress
) -> GemmStrategy:
    """What products are planned with. For auto what is not known of this GPU is measured now.

    program: as the GPU keeps it. Raises MissingKernelError, CapacityError or UsageError.
    """
    if config.gemm_strategy != "auto":
        return GemmStrategy(config.gemm_strategy)
    strategy, lines = tuned(program, facts, report)
    log = logging.getLogger("rvllm")
    for line in lines:
        log.warning("--gemm-strategy auto: %s", line)
    return strategy


def known_strategy(program: Program, config: EngineConfig, facts: DeviceFacts) -> GemmStrategy:
    """As `strategy_for`, but nothing is measured: where a time is lacking, auto has made no choice yet."""
    if config.gemm_strategy != "auto":
        return GemmStrategy(config.gemm_strategy)
    shapes = shapes_of(fuse(joined(program)))
    lookup, kept = (
        _lookup(program, facts, providers_here(facts.capability, SHORT[program.dtype.value])[0]),
        _kept(),
    )
    if any(known_times(shape, lookup, kept)[1] for shape in shapes):
        return GemmStrategy("auto")
    return GemmStrategy("auto", tune(shapes, lookup, kept, _no_timer, lambda done, text: None)[0])


def _kept() -> TuningCache:
    return TuningCache.open(tuning_dir())


def _lookup(program: Program, facts: DeviceFacts, providers: Sequence[Provider]) -> Lookup:
    """How this program's times on this GPU are found."""
    chip, tag = facts.info, SHORT[program.dtype.value]
    return Lookup(
        Conditions(facts.name, int(call("cuDriverGetVersion")), tag),
        chip,
        providers,
        lambda shape, tokens, candidate: code_of(shape, tokens, candidate, tag, chip),
        facts.memory_rate,
    )


def tuned(
    program: Program, facts: DeviceFacts, report: Progress, afresh: bool = False
) -> tuple[GemmStrategy, list[str]]:
    """Auto's choices for a program's products, and what to tell of them. afresh: nothing kept is believed.

    What is kept is checked on the GPU first, in a fraction of the time that it took to measure.
    """
    shapes = shapes_of(fuse(joined(program)))
    tag = SHORT[program.dtype.value]
    providers, lines = providers_here(facts.capability, tag)
    lookup, kept = _lookup(program, facts, providers), _kept()
    if kept.damaged:
        lines.append(f"{kept.damaged} lines of {kept.path} are damaged: measured again where wanted")
    believed = TuningCache(kept.path) if afresh else kept
    choices, forgotten, timed = _measured(shapes, lookup, believed, tag, report)
    if forgotten:
        lines.append(f"{forgotten} times in {kept.path} are not what this GPU shows now: measured again")
    if timed:
        kept.entries.update(believed.entries)
        try:
            kept.save()
            lines.append(f"{timed} kernels timed, kept in {kept.path}")
        except UsageError as error:
            if not forgotten:
                raise
            lines.append(
                f"{timed} kernels timed; {error}"
            )  # a cache that is only to be read has served until now
    strategy = GemmStrategy("auto", choices)
    return strategy, [*lines, *told(strategy)]


def providers_here(capability: int, tag: str) -> tuple[list[Provider], list[str]]:
    """Whose kernels can be compared on this machine, and a line for each that cannot."""
    found: list[Provider] = ["native"]
    lines = []
    specs = [spec for spec in CUTLASS_SPECS if f"_{tag}_" in spec.name]
    units = build.units(specs, build.target_of(capability))
    built = all(build.find(unit, kernel_cache_dir()) for unit in units)
    absent = "" if built else missing_headers("cutlass")
    if capability != cutlass.CAPABILITY:
        lines.append(f"without cutlass: {cutlass.refusal(capability)}")
    elif absent:
        lines.append(f"without cutlass: {absent}")
    else:
        found.append("cutlass")
    try:
        cublas.library()
        found.append("cublas")
    except MissingKernelError as error:
        lines.append(f"without cublas: {error}")
    return found, lines


def code_of(shape: ProductShape, tokens: int, candidate: Candidate, tag: str, chip: DeviceInfo) -> str:
    """The hash of a candidate's source and how it is compiled; of cuBLASLt its version."""
    plan = plan_of(shape, tokens, candidate, tag, chip)
    return f"{LIBRARY} {cublas.version()}" if plan is None else _hash_of(plan.kernel, chip.capability)


@once
def _hash_of(kernel: str, capability: int) -> str:
    spec = MANIFEST[kernel]
    unit = build.Unit(spec.source, (spec.symbol,), build.target_of(capability), spec.extra)
    return unit.key[:16]


def kernels_of(tag: str, capability: int, providers: Sequence[Provider]) -> list[str]:
    """The kernels that may be timed. Whole families: a release has them in units of all their kernels."""
    specs = [*NATIVE_SPECS, *(CUTLASS_SPECS if "cutlass" in providers else ())]
    kinds = ("_gemm_", "_cutlass_")
    return [
        spec.name
        for spec in specs
        if spec.runs_on(capability) and f"_{tag}_" in spec.name and "_pack_" not in spec.name
        if any(kind in spec.name for kind in kinds)
    ]


def _no_timer(
    shape: ProductShape, tokens: int, wanted: Sequence[Candidate], rounds: int
) -> dict[Candidate, float]:
    raise AssertionError(f"{shape} at {tokens} tokens is known")


def _measured(
    shapes: Sequence[ProductShape],
    lookup: Lookup,
    believed: TuningCache,
    tag: str,
    report: Progress,
) -> tuple[dict[ProductShape, Choice], int, int]:
    """(choices, times that were forgotten, times that were measured). Gives back what it takes of the GPU.

    A start that knows all loads only the kernels it checks, and one with nothing to choose from none at all.
    """
    chip, draw = lookup.chip, secrets.randbelow(1 << 16)

    def complete() -> bool:
        return not any(known_times(shape, lookup, believed)[1] for shape in shapes)

    looked_at = list(checks(shapes, lookup, believed, draw))
    if complete() and not looked_at:
        return tune(shapes, lookup, believed, _no_timer, report)[0], 0, 0
    catalog, stream = Catalog(chip.capability, kernel_cache_dir()), Stream()
    plans = (plan_of(*group, c, tag, chip) for group, candidates in looked_at for c in candidates)
    catalog.require([fill_kernel(tag), *(plan.kernel for plan in plans if plan)])
    timer = GemmTimer(catalog, stream, chip, tag, shapes)
    try:
        forgotten = forget_wrong(shapes, lookup, believed, timer, draw)
        if not complete():
            catalog.require(
                kernels_of(tag, chip.capability, lookup.providers),
                lambda done, count: report(done / count, "compiling kernels"),
            )
        choices, timed = tune(shapes, lookup, believed, timer, report)
        return choices, forgotten, timed
    finally:
        timer.close()
        catalog.close()
        stream.close()
