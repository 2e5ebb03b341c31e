"""vLLM's name for the engine that is driven step by step."""

from rvllm.offline.llm_engine import LLMEngine

__all__ = ["LLMEngine"]
