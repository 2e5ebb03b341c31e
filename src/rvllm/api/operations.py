"""The table of all endpoints: who answers, what is taken and what is given. `app.py` makes routes of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from rvllm.api import system
from rvllm.api.anthropic.messages import count_tokens, messages
from rvllm.api.batches.endpoints import Batches, BatchRequest
from rvllm.api.batches.files import Files
from rvllm.api.batches.store import Batch, FileEntry
from rvllm.api.generate.generation import Service
from rvllm.api.http.errors import ErrorBody
from rvllm.api.http.exchange import Exchange
from rvllm.api.http.pagination import Page
from rvllm.api.openai.chat import chat_batch, chat_completions, render_chat
from rvllm.api.openai.completions import completions, render_completion
from rvllm.api.openai.embeddings import classify, embeddings, pooling, rerank, score
from rvllm.api.openai.generate import generate, generate_tokens
from rvllm.api.responses.conversations import ConversationRequest, Conversations, ItemsRequest
from rvllm.api.responses.endpoints import Responses
from rvllm.api.responses.store import Conversation
from rvllm.api.schemas import answers, anthropic, requests
from rvllm.api.schemas import embeddings as pooled
from rvllm.api.schemas.responses import ResponseAnswer, ResponsesRequest
from rvllm.api.system import Health


@dataclass(frozen=True)
class Operation:
    """One method of one path.

    handler: is called with whoever answers (see `GROUPS`), the exchange and the body as `request`.
    events: it can answer as a stream, with such data in its events; form: the body is a form with a file;
    bare: it may come without a body; generates: an encoder refuses it.
    """

    method: str
    path: str
    handler: Callable[[Any, Exchange, Any], Awaitable[None]]
    summary: str
    request: type[msgspec.Struct] | None = None
    answer: Any = None
    query: tuple[str, ...] = ()
    events: Any = None
    form: bool = False
    content: str = "application/json"
    open: bool = False  # needs no key
    error: type[msgspec.Struct] = ErrorBody
    bare: bool = False
    most: int = 100  # of a list's entries on a page
    generates: bool = False


_generates = partial(Operation, "POST", generates=True)
_LIST = ("after", "limit", "order")

GROUPS: tuple[tuple[type, tuple[Operation, ...]], ...] = (
    (Service, (
        _generates("/v1/chat/completions", chat_completions, "The assistant's next message.",
                   requests.ChatRequest, answers.ChatAnswer, events=answers.ChatChunk),
        _generates("/v1/chat/completions/batch", chat_batch, "Several conversations' next messages.",
                   requests.ChatBatchRequest, answers.ChatAnswer),
        _generates("/v1/chat/completions/render", render_chat,
                   "The tokens of its prompt; nothing is generated.", requests.ChatRequest, answers.Rendered),
        _generates("/v1/completions", completions, "Continuations of texts.", requests.CompletionRequest,
                   answers.CompletionAnswer, events=answers.CompletionAnswer),
        _generates("/v1/completions/render", render_completion,
                   "The tokens of each prompt; nothing is generated.", requests.CompletionRequest,
                   list[answers.Rendered]),
        _generates("/generate", generate, "A text and what follows it, as vLLM's plain server has it.",
                   requests.CompletionRequest, answers.GeneratedTexts),
        _generates("/inference/v1/generate", generate_tokens, "Token ids that follow token ids.",
                   requests.TokenRequest, answers.GeneratedTokens, events=answers.GeneratedTokens),
        _generates("/v1/messages", messages, "The assistant's next message, in Anthropic's form.",
                   anthropic.MessagesRequest, anthropic.MessageAnswer, events=dict[str, Any],
                   error=anthropic.MessageError),
        _generates("/v1/messages/count_tokens", count_tokens, "How many tokens a conversation has.",
                   anthropic.CountTokensRequest, anthropic.TokenCount, error=anthropic.MessageError),
    )),
    (Responses, (
        Operation("POST", "/v1/responses", Responses.create, "An answer that the server keeps.",
                  ResponsesRequest, ResponseAnswer, events=dict[str, Any]),
        Operation("GET", "/v1/responses/{id}", Responses.retrieve, "A kept answer, or its events again.",
                  None, ResponseAnswer, ("stream", "starting_after"), events=dict[str, Any]),
        Operation("DELETE", "/v1/responses/{id}", Responses.delete, "Forgets an answer."),
        Operation("POST", "/v1/responses/{id}/cancel", Responses.cancel,
                  "Ends an answer made in the background.", None, ResponseAnswer),
        Operation("GET", "/v1/responses/{id}/input_items", Responses.input_items, "What an answer answers.",
                  None, Page[Any], _LIST),
    )),
    (Conversations, (
        Operation("POST", "/v1/conversations", Conversations.create, "A new conversation.",
                  ConversationRequest, Conversation, bare=True),
        Operation("GET", "/v1/conversations/{id}", Conversations.retrieve, "A conversation.", None,
                  Conversation),
        Operation("POST", "/v1/conversations/{id}", Conversations.update, "Changes its metadata.",
                  ConversationRequest, Conversation),
        Operation("DELETE", "/v1/conversations/{id}", Conversations.delete, "Forgets a conversation."),
        Operation("POST", "/v1/conversations/{id}/items", Conversations.add_items, "Adds items.",
                  ItemsRequest, Page[Any]),
        Operation("GET", "/v1/conversations/{id}/items", Conversations.list_items, "Its items.", None,
                  Page[Any], _LIST),
        Operation("GET", "/v1/conversations/{id}/items/{item}", Conversations.get_item, "One item.", None,
                  dict[str, Any]),
        Operation("DELETE", "/v1/conversations/{id}/items/{item}", Conversations.delete_item,
                  "Forgets an item.", None, Conversation),
    )),
    (Files, (
        Operation("POST", "/v1/files", Files.create, "Uploads a file.", None, FileEntry, form=True),
        Operation("GET", "/v1/files", Files.list_all, "All files.", None, Page[FileEntry],
                  ("purpose", *_LIST), most=10_000),
        Operation("GET", "/v1/files/{id}", Files.retrieve, "A file's entry.", None, FileEntry),
        Operation("DELETE", "/v1/files/{id}", Files.delete, "Deletes a file."),
        Operation("GET", "/v1/files/{id}/content", Files.content, "A file's content.",
                  content="application/octet-stream"),
    )),
    (Batches, (
        Operation("POST", "/v1/batches", Batches.create, "Answers a file of requests.", BatchRequest, Batch),
        Operation("GET", "/v1/batches", Batches.list_all, "All batches.", None, Page[Batch], _LIST),
        Operation("GET", "/v1/batches/{id}", Batches.retrieve, "A batch.", None, Batch),
        Operation("DELETE", "/v1/batches/{id}", Batches.delete,
                  "Forgets a batch that has ended; its files stay."),
        Operation("POST", "/v1/batches/{id}/cancel", Batches.cancel,
                  "Ends a batch; what was answered is kept.", None, Batch),
    )),
    (Service, (
        Operation("POST", "/v1/embeddings", embeddings, "Vectors of texts.", pooled.EmbeddingRequest,
                  pooled.EmbeddingAnswer),
        Operation("POST", "/classify", classify, "Classes of texts.", pooled.ClassifyRequest,
                  pooled.ClassifyAnswer),
        Operation("POST", "/pooling", pooling, "What the model gives for texts.", pooled.PoolingRequest,
                  pooled.PoolingAnswer),
        *(
            Operation("POST", path, score, "How alike texts are.", pooled.ScoreRequest, pooled.ScoreAnswer)
            for path in ("/v1/score", "/score")
        ),
        *(
            Operation("POST", path, rerank, "Documents in order of likeness.", pooled.RerankRequest,
                      pooled.RerankAnswer)
            for path in ("/v1/rerank", "/v2/rerank", "/rerank")
        ),
        Operation("GET", "/v1/models", system.list_models, "The model served.", None, answers.ModelList),
        Operation("GET", "/v1/models/{name:path}", system.get_model, "The model served.", None,
                  answers.ModelCard),
        Operation("POST", "/tokenize", system.tokenize, "A text's or conversation's tokens.",
                  requests.TokenizeRequest, answers.Tokens),
        Operation("POST", "/detokenize", system.detokenize, "The text of tokens.",
                  requests.DetokenizeRequest, answers.Text),
        Operation("GET", "/tokenizer_info", system.tokenizer_info, "Special tokens and the chat template.",
                  None, answers.TokenizerInfo),
    )),
    (Health, (
        Operation("GET", "/health", Health.health, "200 while requests are answered.", open=True),
        *(
            Operation(method, "/ping", Health.health, "The same as /health.", open=True)
            for method in ("GET", "POST")
        ),
        Operation("GET", "/ready", Health.health, "The same as /health.", open=True),
        Operation("GET", "/v2/health/ready", Health.ready, "Whether requests are answered.", None,
                  dict[str, bool], open=True),
        Operation("GET", "/v2/health/live", Health.live, "200 while the process answers.", None,
                  dict[str, bool], open=True),
    )),
    (Service, (
        Operation("GET", "/load", system.load, "Choices that run or wait.", None, dict[str, int]),
        Operation("POST", "/sleep", system.sleep, "Gives the engine's memory back (--enable-sleep-mode).",
                  None, dict[str, Any], ("level", "kv_cache")),
        Operation("POST", "/wake_up", system.wake_up, "Takes it again.", None, dict[str, Any]),
        Operation("GET", "/is_sleeping", system.is_sleeping, "Whether the model is asleep.", None,
                  dict[str, bool]),
        Operation("GET", "/server_info", system.server_info, "What is served, and how.", None,
                  dict[str, Any]),
        Operation("GET", "/metrics", system.metrics, "Figures for Prometheus.", content="text/plain",
                  open=True),
        Operation("GET", "/version", system.version, "The server's version.", None, dict[str, str],
                  open=True),
    )),
)  # fmt: skip
"""(whose methods answer, or the model that the request is for, the endpoints)."""
OPERATIONS = tuple(operation for _, operations in GROUPS for operation in operations)
