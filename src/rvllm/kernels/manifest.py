"""All kernels there are, by name."""

from __future__ import annotations

from rvllm.kernels.spec import KernelSpec


def _collect() -> dict[str, KernelSpec]:
    found: dict[str, KernelSpec] = {}
    listed: list[KernelSpec] = []
    for spec in listed:
        if spec.name in found:
            raise ValueError(f"kernel {spec.name!r} listed twice")
        found[spec.name] = spec
    return found


MANIFEST: dict[str, KernelSpec] = _collect()
