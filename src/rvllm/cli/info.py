"""`rvllm info`: version, devices, every setting with its origin, and what a model would take."""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rvllm.cli.common.models import read
from rvllm.config import EngineConfig, ServerConfig, SourceConfig
from rvllm.errors import RvllmError
from rvllm.settings import add_flags, build, env_of, flag_of, settings_of, shown
from rvllm.version import __version__

if TYPE_CHECKING:
    from rvllm.program.ops.dense import Program
    from rvllm.weights.checkpoint import Checkpoint

Section = list[tuple[str, str]]


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "info",
        help="print version, devices, settings and the memory plan",
        description="Prints version, devices and every setting with where its value comes from; with --model "
        "also the model's facts and the memory it would take here.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--all", action="store_true", help="also the settings that have their defaults")
    add_flags(parser, EngineConfig, "engine")
    add_flags(parser, ServerConfig, "server")


def main(args: argparse.Namespace) -> int:
    """Runs `rvllm info`; raises RvllmError, for what does not fit after all else has been printed."""
    sections: dict[str, Section] = {"rvllm": versions(), "devices": devices()}
    for title, cls in (("engine settings", EngineConfig), ("server settings", ServerConfig)):
        sections[title] = settings(cls, vars(args))
    sections["source settings"] = settings(SourceConfig, {})
    if args.model is not None or os.environ.get("RVLLM_MODEL"):
        config = build(EngineConfig, vars(args))
        from rvllm.cli.common.matrices import matrices

        model = describe(config)
        sections["model"] = model.facts
        packed = {}
        if model.device == "cpu":
            from rvllm.backends.cpu.compiled.model import packed_weights

            packed = packed_weights(model.program, model.checkpoint, config)
        sections["matrices"] = matrices(model.program, model.checkpoint, packed)
        try:
            rows = memory_rows(model.program, model.checkpoint, config, model.device)
            sections[f"memory plan ({model.device})"] = rows
        except RvllmError:
            show(sections, as_json=args.json, everything=args.all)
            raise
    show(sections, as_json=args.json, everything=args.all)
    return 0


def show(sections: dict[str, Section], *, as_json: bool, everything: bool) -> None:
    """Prints the sections: as JSON and with `everything` all of them, else what matters first."""
    from rvllm.cli.common.tables import facts

    if as_json:
        print(json.dumps({title: dict(rows) for title, rows in sections.items()}, indent=1))
        return
    if not everything:
        sections = _telling(sections)
    print("\n\n".join(facts(title, rows) for title, rows in sections.items()), flush=True)


def _telling(sections: dict[str, Section]) -> dict[str, Section]:
    """The memory plan and the settings that were changed first; those with their defaults are left out."""
    settings = {title: rows for title, rows in sections.items() if title.endswith(" settings")}
    changed = [row for rows in settings.values() for row in rows if not row[1].endswith("  (default)")]
    kept = sum(map(len, settings.values())) - len(changed)
    changed.append(("(others)", f"{kept} have their defaults; --all shows them"))
    plans = {title: rows for title, rows in sections.items() if title.startswith("memory plan")}
    rest = {title: rows for title, rows in sections.items() if title not in settings and title not in plans}
    return {**plans, "settings": changed, **rest}


def versions() -> Section:
    import numpy

    return [
        ("version", __version__),
        ("python", platform.python_version()),
        ("numpy", numpy.__version__),
        ("system", f"{platform.system()} {platform.machine()}"),
    ]


def devices() -> Section:
    """The CPU with its memory, and each GPU the driver shows; nothing of CUDA is imported."""
    from rvllm.backends.cpu.threads import available_cores
    from rvllm.backends.free_memory import free_bytes
    from rvllm.backends.load import cuda_packages_present
    from rvllm.backends.opening import gpu_present
    from rvllm.bench.race.machine import cpu_name
    from rvllm.cli.common.tables import human_bytes

    rows = [("cpu", f"{available_cores()} cores, {human_bytes(free_bytes())} of memory free, {cpu_name()}")]
    for index, path in enumerate(sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))):
        model = next(
            (line for line in path.read_text().splitlines() if line.startswith("Model:")), "Model: GPU"
        )
        rows.append((f"gpu {index}", f"{model.partition(':')[2].strip()} at {path.parent.name}"))
    if not gpu_present():
        rows.append(("gpu", "none"))
    elif len(rows) == 1:
        rows.append(("gpu", "present"))
    rows.append(("cuda extra", "installed" if cuda_packages_present() else "not installed"))
    return rows


def settings(cls: type, given: dict[str, Any]) -> Section:
    """Each setting's value and whether a flag, a variable or the default gave it."""
    values: Any = build(cls, given)
    rows = []
    for f, known in settings_of(cls):
        value = getattr(values, f.name)
        if given.get(f.name) is not None:
            origin = flag_of(f.name)
        elif os.environ.get(env_of(f.name, known)):
            origin = env_of(f.name, known)
        else:
            origin = "default"
        text = "derived" if value is None else "(set)" if known.secret else shown(value)
        rows.append((f.name, f"{text}  ({origin})"))
    return rows


@dataclass(frozen=True)
class Described:
    """A model, and the device it would run on."""

    program: Program
    checkpoint: Checkpoint
    device: str
    facts: Section


def describe(config: EngineConfig) -> Described:
    """Reads the model's files but for its weights. Raises RvllmError: what is wrong with them, or no GPU."""
    from rvllm.backends.load import choose_device
    from rvllm.weights.checkpoint import stored_formats
    from rvllm.weights.formats import with_formats

    model, device = read(config), choose_device(config)
    checkpoint, program = model.checkpoint, model.program
    if device != "cpu":
        program = with_formats(program, model.stored, config.gpu_quantization)
    formats, stored = stored_formats(checkpoint)
    facts = [
        *_place(checkpoint.path),
        ("architecture", program.architecture),
        ("parameters", f"{sum(w.elements for w in program.weights):,}"),
        ("vocabulary", str(program.vocab_size)),
        ("positions", str(program.max_position)),
        ("layers with attention", str(_attentions(program))),
        ("ops", str(len(program.ops))),
        ("tensors", formats or "none (config only)"),
        ("stored bytes", str(stored)),
        ("end of sequence", ", ".join(map(str, model.config.eos_token_ids)) or "none"),
    ]
    return Described(program, checkpoint, device, facts)


def _place(path: Path) -> Section:
    """Where the model lies: its folder, and its file if it is a single one."""
    folder = str(path.parent if path.is_file() else path)
    home = str(Path.home())
    if folder.startswith(f"{home}/"):
        folder = "~" + folder.removeprefix(home)
    return [("folder", folder), *([("file", path.name)] if path.is_file() else [])]


def memory_rows(program: Program, checkpoint: Checkpoint, config: EngineConfig, device: str) -> Section:
    """Weights, KV cache and limits, in bytes and tokens."""
    from rvllm.cli.common.tables import human_bytes
    from rvllm.program.cost import kv_bytes_per_token

    per_token = kv_bytes_per_token(program)
    stored = checkpoint if config.load_format != "dummy" and checkpoint.tensors else None
    if device != "cpu":
        from rvllm.backends.cuda.layout.preview import preview_here

        seen = preview_here(program, stored, config)
        return [
            *[(name, f"{nbytes} bytes ({human_bytes(nbytes)})") for name, nbytes in seen.lines.items()],
            ("sum", f"{seen.total} bytes ({human_bytes(seen.total)}), all the device has"),
            ("kv cache per token", f"{per_token} bytes"),
            *[(name, str(value)) for name, value in seen.limits.items()],
        ]
    from rvllm.backends.cpu.compiled.model import weight_lines
    from rvllm.backends.cpu.memory import plan_memory

    plan = plan_memory(program, config, weight_lines(program, stored, config))
    limits = plan.limits
    return [
        *[(line.name, f"{line.nbytes} bytes ({human_bytes(line.nbytes)})") for line in plan.lines],
        ("kv cache per token", f"{per_token} bytes"),
        ("kv blocks", f"{limits.num_blocks} of {limits.block_size} tokens"),
        ("tokens it holds", str(limits.num_blocks * limits.block_size)),
        ("max_model_len", str(limits.max_model_len)),
        ("max_num_seqs", str(limits.max_num_seqs)),
        ("max_num_batched_tokens", str(limits.max_num_batched_tokens)),
    ]


def _attentions(program: Program) -> int:
    """Layers that attend, to a cache or within a text."""
    from rvllm.program.ops.encoder import TextAttention

    return len(program.caches) + sum(isinstance(op, TextAttention) for op in program.ops)
