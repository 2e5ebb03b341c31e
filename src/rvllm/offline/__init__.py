"""The engine in your own process: `LLM` and what goes with it."""
