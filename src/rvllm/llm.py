"""`rvllm.llm.LLM`, where scripts of before look for it."""

from rvllm.offline.llm import LLM

__all__ = ["LLM"]
