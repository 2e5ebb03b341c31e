"""vLLM's name for the pooling parameters."""

from rvllm.text.embedding import PoolingParams

__all__ = ["PoolingParams"]
