"""vLLM's name for `LLM`."""

from rvllm.offline.llm import LLM

__all__ = ["LLM"]
