"""vLLM's name for its attention kernels; which one is used here, `rvllm plan` tells."""
