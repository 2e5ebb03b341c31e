"""vLLM's name for what requests give back."""

from rvllm.text.embedding import EmbeddingOutput, EmbeddingRequestOutput
from rvllm.text.outputs import CompletionOutput, RequestOutput

__all__ = ["CompletionOutput", "EmbeddingOutput", "EmbeddingRequestOutput", "RequestOutput"]
