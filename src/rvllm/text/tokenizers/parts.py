"""What every source of tokenizers yields, and what their readers share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from rvllm.errors import ModelError

if TYPE_CHECKING:
    import tokenizers

DEFAULT_TEMPLATE = "default"
Built = TypeVar("Built")


def built(make: Callable[[], Built], what: str) -> Built:
    """What `make` builds with the tokenizers library; where it cannot, a ModelError that begins with `what`.

    On some broken vocabularies the library panics, which comes as a BaseException of its own.
    """
    try:
        return make()
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{what}: {reason[0]}") from None


@dataclass
class TokenizerParts:
    """What a source of tokenizers yields.

    special_tokens: what chat templates may name: bos_token, eos_token, unk_token, pad_token, ...
    chat_templates: by name; a model's only one is called "default".
    origin: what to call it in messages.
    roles: tokens whose meaning the model's file tells, under GGUF's names (`text/chat/fim.py`).
    """

    backend: tokenizers.Tokenizer
    origin: str
    special_tokens: dict[str, str] = field(default_factory=dict)
    chat_templates: dict[str, str] = field(default_factory=dict)
    roles: dict[str, int] = field(default_factory=dict)


def frame(backend: tokenizers.Tokenizer, before: str | None, after: str | None) -> None:
    """Makes `encode` put the token `before` in front of a text and `after` behind it; None puts nothing."""
    from tokenizers import processors

    single = " ".join(part for part in (before, "$A", after) if part)
    ids = [(token, backend.token_to_id(token)) for token in {before, after} if token]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
