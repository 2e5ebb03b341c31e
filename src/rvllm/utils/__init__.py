"""vLLM's names for what its scripts import from `vllm.utils`."""

from rvllm.vllm.engine_args import FlexibleArgumentParser

__all__ = ["FlexibleArgumentParser"]
