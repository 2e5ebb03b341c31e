"""Compiled CPU kernels (the extra `cpu`): see docs/decisions/0010-compiled-cpu-kernels.md."""
