"""Headers of others that some kernels are built from. They come with an extra; cubins need them no more."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from rvllm.errors import MissingKernelError
from rvllm.extras import install_command

# The package carries CUTLASS 4.8.1; its other contents are not used. Part of a cubin's key.
HEADERS = {"cutlass": "sgl-deep-gemm==0.2.5"}
_FOLDERS = {"cutlass": ("deep_gemm", "include", "cutlass/cutlass.h")}


def missing_headers(extra: str) -> str:
    """One line that says how to get the headers of this extra, or nothing where they are there."""
    if _folder(extra) is not None:
        return ""
    return f"kernels built from CUTLASS need its headers: {install_command(extra)}"


def include_of(extra: str) -> Path:
    """The folder to include from. Raises MissingKernelError naming the extra."""
    folder = _folder(extra)
    if folder is None:
        raise MissingKernelError(f"{missing_headers(extra)}, or use --gemm-strategy native")
    return folder


def _folder(extra: str) -> Path | None:
    """Where the headers are; the package is looked up, never imported: it would want torch."""
    package, include, probe = _FOLDERS[extra]
    found = find_spec(package)
    for root in (found.submodule_search_locations or ()) if found is not None else ():
        if (Path(root) / include / probe).exists():
            return Path(root) / include
    return None
