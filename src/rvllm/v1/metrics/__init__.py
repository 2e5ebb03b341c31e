"""vLLM's folder names."""
