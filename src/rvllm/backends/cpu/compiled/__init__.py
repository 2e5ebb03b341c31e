"""Compiled CPU kernels, built with the package: see docs/decisions/0010-compiled-cpu-kernels.md."""
