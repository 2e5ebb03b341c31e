"""Builds the CPU kernels' libraries into a source tree, as building the package does (extra `cpu-build`).

PYTHONPATH=src python scripts/build_cpu_kernels.py
"""

from rvllm.backends.cpu.compiled.codegen.build import build_all

if __name__ == "__main__":
    for path in build_all():
        print(f"{path.stat().st_size / 1e3:8.0f} kB  {path}")
