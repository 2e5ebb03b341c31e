"""The bodies of requests, as msgspec Structs: what is read, and of what type.

`None` stands for "not given": the model's own defaults, then OpenAI's, take its place (`sampling.py`).
Fields that are not declared here are ignored, since clients send fields of
services they were written for (docs/decisions/0006-http-surface.md).
"""

from __future__ import annotations

from typing import Any

import msgspec


class StreamOptions(msgspec.Struct, kw_only=True):
    """What a stream reports besides its text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Refused(msgspec.Struct, kw_only=True):
    """Fields we know and do not serve: any value but a neutral one is answered with a 400, never ignored."""

    audio: Any = None
    adaptive_target: Any = None
    best_of: Any = None
    cache_salt: Any = None
    chat_template: Any = None
    dry_multiplier: Any = None
    dynatemp_range: Any = None
    eta_cutoff: Any = None
    epsilon_cutoff: Any = None
    function_call: Any = None
    functions: Any = None
    guided_decoding_backend: Any = None
    kv_transfer_params: Any = None
    length_penalty: Any = None
    logits_processors: Any = None
    lora_path: Any = None
    min_keep: Any = None
    mirostat: Any = None
    mirostat_mode: Any = None
    mm_processor_kwargs: Any = None
    modalities: Any = None
    prediction: Any = None
    prompt_embeds: Any = None
    repeat_last_n: Any = None
    samplers: Any = None
    smoothing_factor: Any = None
    store: Any = None
    tfs_z: Any = None
    thinking_token_budget: Any = None
    top_a: Any = None
    top_n_sigma: Any = None
    truncate_prompt_tokens: Any = None
    typical: Any = None
    typical_p: Any = None
    use_beam_search: Any = None
    web_search_options: Any = None
    xtc_probability: Any = None


# Values of refused fields that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "adaptive_target": (-1,),
    "best_of": (1,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "eta_cutoff": (0,),
    "epsilon_cutoff": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_decoding_backend": ("auto", "guidance", "llguidance"),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "min_keep": (0, 1),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "modalities": (["text"],),
    "repeat_last_n": (-1,),
    "samplers": ([],),
    "smoothing_factor": (0,),
    "store": (False,),
    "tfs_z": (1,),
    "top_a": (0,),
    "top_n_sigma": (-1, 0),
    "typical": (1,),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "xtc_probability": (0,),
}

# What neighbouring servers call a field: llama.cpp's and SGLang's names.
OTHER_NAMES = {
    "repeat_penalty": "repetition_penalty",
    "n_predict": "max_tokens",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
}


class StructuredOutputs(msgspec.Struct, kw_only=True):
    """vLLM's `structured_outputs`: the form of the answer, see `StructuredOutputsParams`."""

    json: dict[str, Any] | bool | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: dict[str, Any] | str | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = None


class GenerationRequest(Refused, kw_only=True):
    """What chat and plain completions share: OpenAI's parameters, then vLLM's."""

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    priority: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None

    response_format: dict[str, Any] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | bool | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    structural_tag: dict[str, Any] | str | None = None

    # The same as llama.cpp and SGLang call it.
    json_schema: dict[str, Any] | bool | str | None = None
    regex: str | None = None
    grammar: str | None = None
    ebnf: str | None = None
    repeat_penalty: float | None = None
    n_predict: int | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None


class Message(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One message of a conversation; templates get its fields under the same names.

    content: a text or a list of parts, of which only text parts are understood; null and absent are two
    things to some templates.
    """

    role: str
    content: str | list[str | dict[str, Any]] | msgspec.UnsetType | None = msgspec.UNSET
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChatOptions(GenerationRequest, kw_only=True):
    """What a chat asks for besides its messages."""

    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None


class ChatRequest(ChatOptions, kw_only=True):
    """The body of `/v1/chat/completions`."""

    messages: list[Message]


class ChatBatchRequest(ChatOptions, kw_only=True):
    """The body of `/v1/chat/completions/batch`: several conversations with the same options."""

    messages: list[list[Message]]


class CompletionRequest(GenerationRequest, kw_only=True):
    """The body of `/v1/completions`. `prompt` is a text, token ids, or a list of either.

    suffix: what stands behind the text to be written, for models with tokens for that.
    """

    prompt: str | list[str | int | list[int]]
    suffix: str | None = None
    logprobs: int | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """The body of `/tokenize`: a text, or a conversation to be rendered first."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """The body of `/detokenize`."""

    model: str | None = None
    tokens: list[int]
