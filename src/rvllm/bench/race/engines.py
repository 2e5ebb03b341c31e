"""Who runs in a race: how each engine is started, asked for its version, weighed, and driven without HTTP."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import msgspec

from rvllm.errors import UsageError

OURS = "rvllm"


@dataclass(frozen=True)
class Engine:
    """An engine. In commands {model}, {port}, {at}, {seqs}, {context} and {total} are filled in.

    serve: starts its server. direct: measures without HTTP (see `direct.py`). version: prints its version.
    url: a running server instead of all of these. at: a Python of its environment, or llama.cpp's folder.
    body: fields that each request has. settings: of its in-process API. size: files and folders weighed.
    """

    name: str
    serve: list[str] = field(default_factory=list)
    direct: list[str] = field(default_factory=list)
    version: list[str] = field(default_factory=list)
    url: str = ""
    at: str = ""
    env: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=lambda: {"ignore_eos": True})
    settings: dict[str, Any] = field(default_factory=dict)
    size: list[str] = field(default_factory=list)


_BIND = ["--host", "127.0.0.1", "--port", "{port}"]
# {seqs} requests at once of at most {context} tokens each, {total} together.
KNOWN = {
    OURS: Engine(
        OURS, ["{at}", "-m", "rvllm", "serve", "--model", "{model}", *_BIND], ["{at}", "python"],
        ["{at}", "-m", "rvllm", "--version"], at=sys.executable,
    ),
    "vllm": Engine(
        "vllm", ["{at}", "-m", "vllm.entrypoints.openai.api_server", "--model", "{model}", *_BIND],
        ["{at}", "python"], ["{at}", "-c", "import vllm; print(vllm.__version__)"],
    ),
    "sglang": Engine(
        "sglang", ["{at}", "-m", "sglang.launch_server", "--model-path", "{model}", *_BIND],
        ["{at}", "python"], ["{at}", "-c", "import sglang; print(sglang.__version__)"],
    ),
    "llama.cpp": Engine(
        "llama.cpp", ["{at}/llama-server", "-m", "{model}", "-np", "{seqs}", "-c", "{total}", *_BIND],
        ["{at}/llama-batched-bench", "-m", "{model}", "-c", "{total}", "--output-format", "jsonl"],
        ["{at}/llama-server", "--version"],
    ),
}  # fmt: skip


def engines_of(
    names: Sequence[str], places: Mapping[str, str], extra: Mapping[str, str], config: Path | None
) -> list[Engine]:
    """Those of `names`, in order: a known one, one of the configuration file, a URL, or NAME=URL.

    places: where an engine is, by name; extra: more words for its server. Raises UsageError.
    """
    told = _read(config) if config else {}
    found = [_engine(name, told) for name in names]
    if len({engine.name for engine in found}) < len(found):
        raise UsageError("--against: each engine runs once")
    for name in (*places, *extra):
        if name not in {engine.name for engine in found}:
            raise UsageError(f"{name} does not take part; there are {', '.join(e.name for e in found)}")
    return [
        _placed(
            replace(e, at=places.get(e.name, e.at), serve=[*e.serve, *shlex.split(extra.get(e.name, ""))])
        )
        for e in found
    ]


def _engine(name: str, told: Mapping[str, dict[str, Any]]) -> Engine:
    label, _, url = name.rpartition("=")
    if url.startswith(("http://", "https://")):
        return Engine(label or url, url=url.rstrip("/").removesuffix("/v1"))
    if name not in KNOWN and name not in told:
        known = ", ".join(sorted({*KNOWN, *told} - {OURS}))
        raise UsageError(f"--against: {name!r} is neither a URL nor one of {known} (or of --engines)")
    values = told.get(name, {})
    try:
        checked = msgspec.convert({"name": name, **values}, Engine)
    except msgspec.ValidationError as error:
        raise UsageError(f"--engines: {name}: {error}") from None
    base = KNOWN.get(name, Engine(name))
    return replace(base, **{each: getattr(checked, each) for each in values})  # a table changes what it names


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))["engines"]
    except OSError as error:
        raise UsageError(f"--engines: cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError):
        raise UsageError(f"--engines: {path} is no TOML file with [engines.NAME] tables") from None
    known = {each.name for each in fields(Engine)} - {"name"}
    for name, values in found.items():
        if wrong := set(values) - known:
            raise UsageError(
                f"--engines: {name} has {min(wrong)!r}, which is none of {', '.join(sorted(known))}"
            )
    return dict(found)


def _placed(engine: Engine) -> Engine:
    """Finds out where it is, when its commands need that. Raises UsageError."""
    if engine.at and not Path(engine.at).exists():
        raise UsageError(f"--at {engine.name}={engine.at}: there is no such file or folder")
    if engine.url or engine.at or not any("{at}" in word for word in (*engine.serve, *engine.direct)):
        return engine
    if engine.name == "llama.cpp":
        if server := shutil.which("llama-server"):
            return replace(engine, at=str(Path(server).parent))
        raise UsageError("llama.cpp: there is no llama-server here: --at llama.cpp=FOLDER")
    raise UsageError(
        f"{engine.name} runs in an environment of its own: --at {engine.name}=/path/to/its/bin/python"
    )


def filled(words: Sequence[str], values: Mapping[str, object]) -> list[str]:
    """A command with its {names} replaced."""
    return [_fill(word, values) for word in words]


def _fill(word: str, values: Mapping[str, object]) -> str:
    for name, value in values.items():
        word = word.replace("{" + name + "}", str(value))
    return word


def weighed(engine: Engine) -> tuple[list[str], int]:
    """(what is weighed, its bytes): the paths told, else the virtual environment or folder it runs from."""
    if engine.url:
        return [], 0
    paths = engine.size or ([_root(engine.at)] if engine.at else [])
    return paths, sum(_bytes_under(Path(path)) for path in paths)


def _root(at: str) -> str:
    place = Path(at)
    for folder in (place.parent.parent, place.parent):  # bin/python of a virtual environment
        if (folder / "pyvenv.cfg").exists():
            return str(folder)
    return at


def _bytes_under(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    seen: dict[tuple[int, int], int] = {}
    for folder, _, names in os.walk(path):
        for name in names:
            stat = os.lstat(os.path.join(folder, name))
            seen[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(seen.values())
