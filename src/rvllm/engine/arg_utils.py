"""vLLM's name for the settings of engines."""

from rvllm.vllm.engine_args import AsyncEngineArgs, EngineArgs

__all__ = ["AsyncEngineArgs", "EngineArgs"]
