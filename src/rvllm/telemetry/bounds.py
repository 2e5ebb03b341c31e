"""Bounds of histograms that the engine counts itself."""

# Tokens of a step: at most so many; those of vLLM's histogram of the same.
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
