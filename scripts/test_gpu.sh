#!/usr/bin/env bash
# Runs everything that needs an NVIDIA GPU: kernels against their NumPy references, the CUDA backend against
# the CPU backend, invariance, the thousand-request soak, and, with compute-sanitizer at hand, a memory check.
#   pip install ".[test,cuda]" && scripts/test_gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pytest -m gpu "$@"
if command -v compute-sanitizer >/dev/null; then
  compute-sanitizer --tool memcheck --error-exitcode 9 python scripts/gpu/tiny_run.py
else
  echo "compute-sanitizer is not installed: no memory check"
fi
