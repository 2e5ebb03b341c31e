"""vLLM's name for the asynchronous engine."""

from rvllm.offline.async_llm import AsyncLLM

__all__ = ["AsyncLLM"]
