"""The bodies of answers, as msgspec Structs in OpenAI's shapes, with vLLM's extra fields.

Fields with a default of UNSET are left out of the JSON unless they are set; None is sent as null, as OpenAI
does.
"""

from __future__ import annotations

import time

import msgspec
from msgspec import UNSET, UnsetType


class PromptDetails(msgspec.Struct):
    """Of the prompt's tokens, how many came from the prefix cache."""

    cached_tokens: int = 0


class CompletionDetails(msgspec.Struct):
    """Of the tokens written, how many were thoughts with their marks."""

    reasoning_tokens: int = 0


class Usage(msgspec.Struct):
    """Tokens read and written, over all choices; details of the written ones where there can be thoughts."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: PromptDetails = msgspec.field(default_factory=PromptDetails)
    completion_tokens_details: CompletionDetails | UnsetType = UNSET


class TopLogprob(msgspec.Struct):
    """A candidate at one position of a chat answer; `bytes` is its text in UTF-8."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(msgspec.Struct):
    """The token at one position of a chat answer, and the likeliest ones there."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Log-probabilities of a chat choice."""

    content: list[TokenLogprob]


class CompletionLogprobs(msgspec.Struct):
    """Log-probabilities of a plain completion; parallel lists, one entry a token."""

    text_offset: list[int] = []
    token_logprobs: list[float | None] = []
    tokens: list[str] = []
    top_logprobs: list[dict[str, float] | None] = []


class PromptLogprob(msgspec.Struct):
    """vLLM's entry of `prompt_logprobs`: a candidate at one position of the prompt."""

    logprob: float
    rank: int
    decoded_token: str | None


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class FunctionCall(msgspec.Struct):
    """A function's name and its arguments as JSON text; in a stream, what a chunk adds to them."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCall(msgspec.Struct):
    """A call that the assistant makes. index: which one, in streams; id and type come when it begins."""

    function: FunctionCall
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    index: int | UnsetType = UNSET


class ChatMessage(msgspec.Struct):
    """What the assistant said; content is None when it only calls tools or thinks.

    reasoning is always there, as in vLLM, whose clients read it without looking.
    """

    role: str
    content: str | None
    refusal: None = None
    reasoning: str | None = None
    reasoning_content: str | UnsetType = UNSET  # the same under the name of before
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    """One finished chat answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class Envelope(msgspec.Struct, kw_only=True):
    """What an answer, or an event of its stream, begins with."""

    id: str
    object: str
    created: int
    model: str


class ChatAnswer(Envelope, kw_only=True):
    """The answer of `/v1/chat/completions`."""

    object: str = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatDelta(msgspec.Struct):
    """What a chunk adds; the first one carries the role."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET  # the same under the name of before
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    """One choice's share of a chunk."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(Envelope, kw_only=True):
    """One event of a chat stream."""

    object: str = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str | None = None
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One plain completion, whole or its share of a chunk."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionAnswer(Envelope, kw_only=True):
    """The answer of `/v1/completions`, and each event of its stream."""

    object: str = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str | None = None


class GeneratedChoice(msgspec.Struct, kw_only=True):
    """Token ids that follow the prompt."""

    index: int
    token_ids: list[int] = []
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None


class GeneratedTokens(msgspec.Struct):
    """The answer of `/inference/v1/generate`, or an event of it."""

    request_id: str
    choices: list[GeneratedChoice]
    prompt_logprobs: PromptLogprobs | None = None
    usage: Usage | UnsetType | None = UNSET


class GeneratedTexts(msgspec.Struct):
    """The answer of `/generate`: by choice, the prompt and what follows it so far."""

    text: list[str]


class ModelCard(msgspec.Struct, kw_only=True):
    """An entry of `/v1/models`.

    max_model_len, context_length: prompt and output together, in tokens, as vLLM and others name it.
    """

    id: str
    object: str = "model"
    created: int
    owned_by: str = "rvllm"
    root: str
    parent: str | None = None
    max_model_len: int
    context_length: int
    capabilities: dict[str, bool]
    permission: list[str] = []


class ModelList(msgspec.Struct):
    """The answer of `/v1/models`."""

    data: list[ModelCard]
    object: str = "list"


class Tokens(msgspec.Struct):
    """The answer of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Rendered(msgspec.Struct):
    """The answer of `/v1/chat/completions/render`, and each entry of that of `/v1/completions/render`.

    Of what vLLM gives there these are the fields that routers read.
    """

    request_id: str
    model: str
    token_ids: list[int]


class Text(msgspec.Struct):
    """The answer of `/detokenize`."""

    prompt: str


class TokenizerInfo(msgspec.Struct, kw_only=True):
    """The answer of `/tokenizer_info`, under the names of Hugging Face's tokenizer_config.json.

    chat_template: what conversations are rendered with; None when the server has none.
    """

    tokenizer_class: str = "PreTrainedTokenizerFast"
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None
    model_max_length: int


def now() -> int:
    """Seconds since the epoch, for `created`."""
    return int(time.time())
