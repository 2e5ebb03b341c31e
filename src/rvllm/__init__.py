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
    "LLM": "rvllm.offline.llm",
    "AsyncEngineArgs": "rvllm.vllm.engine_args",
    "AsyncLLM": "rvllm.offline.async_llm",
    "EngineArgs": "rvllm.vllm.engine_args",
    "LLMEngine": "rvllm.offline.llm_engine",
    "RequestOutputKind": "rvllm.engine.sampling_params",
    "SamplingParams": "rvllm.engine.sampling_params",
    "StructuredOutputsParams": "rvllm.engine.sampling_params",
    "RvllmError": "rvllm.errors",
    "EmbeddingOutput": "rvllm.text.embedding",
    "EmbeddingRequestOutput": "rvllm.text.embedding",
    "PoolingParams": "rvllm.text.embedding",
    "ScoringOutput": "rvllm.text.embedding",
    "ScoringRequestOutput": "rvllm.text.embedding",
    "ClassificationOutput": "rvllm.text.pooling",
    "ClassificationRequestOutput": "rvllm.text.pooling",
    "PoolingOutput": "rvllm.text.pooling",
    "PoolingRequestOutput": "rvllm.text.pooling",
    "CompletionOutput": "rvllm.text.outputs",
    "Logprob": "rvllm.text.outputs",
    "RequestOutput": "rvllm.text.outputs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rvllm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
