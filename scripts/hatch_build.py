"""Builds the CPU kernels' libraries before the package is put together (docs/decisions/0010)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface):  # type: ignore[type-arg]
    """Runs for a wheel and for an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Builds what is stale; the libraries are artifacts of the wheel."""
        sys.path.insert(0, str(Path(self.root) / "src"))
        from rvllm.backends.cpu.compiled.codegen.build import build_all

        build_all()
