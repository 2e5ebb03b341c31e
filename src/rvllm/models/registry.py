"""From an architecture's name to the file that emits its program."""

from __future__ import annotations

import importlib
from typing import cast

from rvllm.errors import ModelError
from rvllm.models.config import ModelConfig
from rvllm.models.pooling import CLASSIFIER, TOKEN_CLASSIFIER, classification, embedding
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Program

# Name in `architectures` of a config → module in models/archs with `build(config, dtype) -> Program`.
ARCHITECTURES: dict[str, str] = {
    "BertModel": "bert",
    "Cohere2ForCausalLM": "cohere2",
    "CohereForCausalLM": "cohere",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "GPTNeoXForCausalLM": "gpt_neox",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "GemmaForCausalLM": "gemma",
    "GraniteForCausalLM": "granite",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "NemotronHForCausalLM": "nemotron_h",
    "Phi3ForCausalLM": "phi3",
    "Phi3SmallForCausalLM": "phi3small",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "RobertaModel": "bert",
    "SmolLM3ForCausalLM": "smollm3",
    "StableLmForCausalLM": "stablelm",
    "XLMRobertaModel": "bert",
}


def supported() -> list[str]:
    """The supported architectures, in alphabetical order."""
    return sorted(ARCHITECTURES)


def build_program(config: ModelConfig, dtype: DType) -> Program:
    """The program of a model: it generates, or gives a vector or classes for each text.

    `XModel`, `XForSequenceClassification` and `XForTokenClassification` are XForCausalLM's layers, pooled; so
    is XForCausalLM itself where modules.json says how, or `--runner pooling` asks. Raises ModelError for an
    unknown architecture or a wrong config field.
    """
    name = config.architecture
    classifies = name.endswith((CLASSIFIER, TOKEN_CLASSIFIER))
    stem = name
    for suffix in (CLASSIFIER, TOKEN_CLASSIFIER, "Model", "ForCausalLM"):
        stem = stem.removesuffix(suffix)
    whole = f"{stem}Model" if classifies else name
    if whole in ARCHITECTURES and not whole.endswith("ForCausalLM"):
        return _built(config, dtype, whole)
    decoder = f"{stem}ForCausalLM"
    if decoder not in ARCHITECTURES:
        raise ModelError(
            f"{config.origin}: architecture {name!r} is not supported; supported: {', '.join(supported())}, "
            "and these with ForSequenceClassification, ForTokenClassification or Model at their end"
        )
    program = _built(config, dtype, decoder)
    if classifies:
        return classification(program, config)
    runner, sentence = config.str("runner", "auto"), config.section("sentence_transformers")
    said = name.endswith("Model") or (sentence is not None and sentence.has("pooling"))
    if runner == "pooling" or (runner == "auto" and said):
        return embedding(program, config)
    return program


def _built(config: ModelConfig, dtype: DType, name: str) -> Program:
    module = importlib.import_module(f"rvllm.models.archs.{ARCHITECTURES[name]}")
    return cast(Program, module.build(config, dtype))
