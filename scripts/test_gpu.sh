#!/usr/bin/env bash
# Runs everything that needs an NVIDIA GPU: kernels against their NumPy references, the CUDA backend against
# the CPU backend, invariance, the thousand-request soak, and, with compute-sanitizer at hand, a memory check.
#   pip install ".[test,cuda]" && scripts/test_gpu.sh
# Eight processes at a time (RVLLM_TEST_PROCESSES), then what counts the GPU's memory or its time: nothing else may use it.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pytest -m "gpu and not alone" -n "${RVLLM_TEST_PROCESSES:-8}" "$@"
python -m pytest -m "gpu and alone" "$@"
if command -v compute-sanitizer >/dev/null; then
  compute-sanitizer --tool memcheck --error-exitcode 9 python scripts/gpu/tiny_run.py
else
  echo "compute-sanitizer is not installed: no memory check"
fi
