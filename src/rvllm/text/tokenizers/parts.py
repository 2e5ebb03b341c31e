"""What every source of tokenizers yields, and what their readers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from rvllm.errors import ModelError

if TYPE_CHECKING:
    import tokenizers
    from tokenizers.models import Model

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


def byte_level(model: Model, splits: Sequence[str], prefix: bool = False) -> tokenizers.Tokenizer:
    """A tokenizer whose text each of `splits` cuts in turn (none: as GPT-2's) before it becomes bytes.

    prefix: a space is put before a text.
    """
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers

    backend = Tokenizer(model)
    if splits:
        steps = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in splits]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, to_bytes])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    return backend


def wordpiece(
    vocab: dict[str, int], cls: str, sep: str, what: str, unknown: str | None, *, lowercase: bool = True,
    strip_accents: bool | None = None, chinese: bool = True,
) -> tokenizers.Tokenizer:  # fmt: skip
    """BERT's tokenizer. Raises ModelError, beginning with `what`, where `cls` or `sep` is no token."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    if cls not in vocab or sep not in vocab:
        raise ModelError(f"{what} no {cls} or no {sep}")
    backend = Tokenizer(models.WordPiece(vocab, unk_token=unknown or "[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=chinese
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.BertProcessing((sep, vocab[sep]), (cls, vocab[cls]))
    return backend
