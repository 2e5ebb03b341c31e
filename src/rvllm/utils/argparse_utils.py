"""vLLM's names for what its scripts import from `vllm.utils.argparse_utils`."""

from rvllm.vllm.engine_args import FlexibleArgumentParser

__all__ = ["FlexibleArgumentParser"]
