"""rvLLM: an LLM inference server for one GPU that you understand completely.

    from rvllm import LLM, SamplingParams

Names are loaded on first use, so that `import rvllm` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rvllm.version import __version__

if TYPE_CHECKING:
    from rvllm.engine.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
    from rvllm.errors import RvllmError
    from rvllm.offline.async_llm import AsyncLLM
    from rvllm.offline.llm import LLM
    from rvllm.offline.llm_engine import LLMEngine
    from rvllm.text.embedding import (
        EmbeddingOutput,
        EmbeddingRequestOutput,
        PoolingParams,
        ScoringOutput,
        ScoringRequestOutput,
    )
    from rvllm.text.outputs import CompletionOutput, Logprob, RequestOutput
    from rvllm.text.pooling import (
        ClassificationOutput,
        ClassificationRequestOutput,
        PoolingOutput,
        PoolingRequestOutput,
    )
    from rvllm.vllm.engine_args import AsyncEngineArgs, EngineArgs

__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncLLM",
    "ClassificationOutput",
    "ClassificationRequestOutput",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineArgs",
    "LLMEngine",
    "Logprob",
    "PoolingOutput",
    "PoolingParams",
    "PoolingRequestOutput",
    "RequestOutput",
    "RequestOutputKind",
    "RvllmError",
    "SamplingParams",
    "ScoringOutput",
    "ScoringRequestOutput",
    "StructuredOutputsParams",
    "__version__",
]

_HOMES = {
    "rvllm.offline.llm": ["LLM"],
    "rvllm.offline.async_llm": ["AsyncLLM"],
    "rvllm.offline.llm_engine": ["LLMEngine"],
    "rvllm.vllm.engine_args": ["AsyncEngineArgs", "EngineArgs"],
    "rvllm.engine.sampling_params": ["RequestOutputKind", "SamplingParams", "StructuredOutputsParams"],
    "rvllm.errors": ["RvllmError"],
    "rvllm.text.embedding": ["EmbeddingOutput", "EmbeddingRequestOutput", "PoolingParams", "ScoringOutput",
                             "ScoringRequestOutput"],
    "rvllm.text.pooling": ["ClassificationOutput", "ClassificationRequestOutput", "PoolingOutput",
                           "PoolingRequestOutput"],
    "rvllm.text.outputs": ["CompletionOutput", "Logprob", "RequestOutput"],
}  # fmt: skip


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'rvllm' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
