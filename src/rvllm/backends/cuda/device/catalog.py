"""The kernel catalog at run time: names resolved to loaded functions, or a list of all that is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from rvllm.backends.cuda.device.driver import Function, Module
from rvllm.errors import MissingKernelError
from rvllm.kernels import build
from rvllm.kernels.manifest import MANIFEST, released
from rvllm.kernels.spec import KernelSpec


class Catalog:
    """The kernels a program needs on one GPU, each resolved to exactly one entry of the manifest."""

    def __init__(self, capability: int, cache_dir: Path) -> None:
        self.capability = capability
        self._cache_dir = cache_dir
        self._functions: dict[str, Function] = {}
        self._modules: list[Module] = []

    def require(self, names: Iterable[str], progress: Callable[[int, int], None] | None = None) -> None:
        """Builds or reads, loads and resolves all `names`.

        Raises MissingKernelError listing every name that the manifest lacks or that this GPU cannot run.
        """
        specs, missing = select(names, self.capability)
        if missing:
            raise MissingKernelError(
                f"no kernel for compute capability {self.capability / 10:.1f}: " + ", ".join(missing)
            )
        new = [spec for spec in specs if spec.name not in self._functions]
        target = build.target_of(self.capability)
        smem = {(spec.source, spec.symbol): spec for spec in new}
        units = released(build.units(new, target), self.capability)
        for cubin in build.load(units, self._cache_dir, progress=progress):
            module = Module(cubin.code)
            self._modules.append(module)
            for symbol, mangled in cubin.names.items():
                found = smem.get((cubin.unit.source, symbol))
                if found is None:  # of a release's unit, and not wanted
                    continue
                self._functions[found.name] = module.function(mangled, found.name, found.smem)

    def __contains__(self, name: object) -> bool:
        return name in self._functions

    def __getitem__(self, name: str) -> Function:
        return self._functions[name]

    def close(self) -> None:
        for module in self._modules:
            module.close()


def select(names: Iterable[str], capability: int) -> tuple[list[KernelSpec], list[str]]:
    """(specs, names that are missing or do not run on the GPU), each name once, in order."""
    specs, missing = [], []
    for name in dict.fromkeys(names):
        spec = MANIFEST.get(name)
        if spec is None or not spec.runs_on(capability):
            missing.append(name)
        else:
            specs.append(spec)
    return specs, missing
