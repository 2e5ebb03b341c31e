"""The bodies of requests, as msgspec Structs: what is read, and of what type.

`None` stands for "not given": the model's own defaults, then OpenAI's, take its place (`sampling.py`).
Fields that are not declared here are ignored, since clients send fields of
services they were written for (docs/decisions/0006-http-surface.md).
"""

from __future__ import annotations

from typing import Annotated, Any, get_type_hints

import msgspec


class StreamOptions(msgspec.Struct, kw_only=True):
    """What a stream reports besides its text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Refused(msgspec.Struct, kw_only=True):
    """Fields we know and do not serve: any value but a neutral one is answered with a 400, never ignored.

    The annotations are the neutral values, which ask for nothing.
    """

    audio: Any = None
    adaptive_target: Annotated[Any, (-1,)] = None
    best_of: Annotated[Any, (1,)] = None
    cache_salt: Any = None
    chat_template: Any = None
    dry_multiplier: Annotated[Any, (0,)] = None
    dynatemp_range: Annotated[Any, (0,)] = None
    eta_cutoff: Annotated[Any, (0,)] = None
    epsilon_cutoff: Annotated[Any, (0,)] = None
    function_call: Annotated[Any, ("none",)] = None
    functions: Annotated[Any, ([],)] = None
    guided_decoding_backend: Annotated[Any, ("auto", "guidance", "llguidance")] = None
    kv_transfer_params: Any = None
    length_penalty: Annotated[Any, (1, 1.0)] = None
    logits_processors: Annotated[Any, ([],)] = None
    lora_path: Any = None
    min_keep: Annotated[Any, (0, 1)] = None
    mirostat: Annotated[Any, (0,)] = None
    mirostat_mode: Annotated[Any, (0,)] = None
    mm_processor_kwargs: Any = None
    modalities: Annotated[Any, (["text"],)] = None
    prompt_embeds: Any = None
    repeat_last_n: Annotated[Any, (-1,)] = None
    samplers: Annotated[Any, ([],)] = None
    smoothing_factor: Annotated[Any, (0,)] = None
    store: Annotated[Any, (False,)] = None
    tfs_z: Annotated[Any, (1,)] = None
    thinking_token_budget: Any = None
    top_a: Annotated[Any, (0,)] = None
    top_n_sigma: Annotated[Any, (-1, 0)] = None
    truncate_prompt_tokens: Any = None
    typical: Annotated[Any, (1,)] = None
    typical_p: Annotated[Any, (1,)] = None
    use_beam_search: Annotated[Any, (False,)] = None
    web_search_options: Any = None
    xtc_probability: Annotated[Any, (0,)] = None


NEUTRAL: dict[str, tuple[Any, ...]] = {
    name: getattr(hint, "__metadata__", ((),))[0]
    for name, hint in get_type_hints(Refused, include_extras=True).items()
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


class TokenRequest(msgspec.Struct, kw_only=True):
    """The body of `/inference/v1/generate`. sampling_params: as the fields of `/v1/completions`."""

    token_ids: list[int]
    sampling_params: dict[str, Any] = {}
    model: str | None = None
    request_id: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = None
    cache_salt: str | None = None
    features: dict[str, Any] | None = None
    kv_transfer_params: dict[str, Any] | None = None


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
