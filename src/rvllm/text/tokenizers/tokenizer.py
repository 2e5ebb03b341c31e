"""Text to token ids and back, for every tokenizer a model may bring.

A `Tokenizer` wraps a `tokenizers.Tokenizer`, read from a directory's tokenizer.json (`huggingface.py`) or
built from a GGUF file's metadata (`gguf.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rvllm.errors import ModelError, UsageError

if TYPE_CHECKING:
    import tokenizers

    from rvllm.text.chat.fim import FillIn
    from rvllm.text.tokenizers.length_bound import LengthBound

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


class Tokenizer:
    """Encodes and decodes; safe to use from several threads."""

    def __init__(self, parts: TokenizerParts) -> None:
        self.backend = parts.backend
        self.origin = parts.origin
        self.special_tokens = parts.special_tokens
        self.chat_templates = parts.chat_templates
        self._roles = parts.roles
        added = parts.backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.spelling = spelling_of(parts.backend)

    @staticmethod
    def load(path: Path) -> Tokenizer:
        """The tokenizer of a model directory or .gguf file.

        Raises ModelError naming the file and what is wrong or missing in it.
        """
        if path.is_dir():
            from rvllm.text.tokenizers.huggingface import read_directory

            return Tokenizer(read_directory(path))
        from rvllm.text.tokenizers.gguf import read_gguf

        return Tokenizer(read_gguf(path))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model's logits may be padded beyond it."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    @property
    def bos_token(self) -> str | None:
        """The token a text begins with, if the model has one."""
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The token that ends a text or a turn, as the tokenizer's files name it."""
        return self.special_tokens.get("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        """Id of `bos_token`."""
        return self._id_of("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of `eos_token`; a model's generation config may name further ones."""
        return self._id_of("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Id of the padding token."""
        return self._id_of("pad_token")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with `add_special_tokens`, what the model puts around it (BOS, [CLS] ...).

        Other threads run meanwhile: unlike `encode`, a batch lets go of Python's lock.
        """
        inputs = [_well_formed(text)]
        (encoding,) = self.backend.encode_batch_fast(inputs, add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    @cached_property
    def fill_in(self) -> FillIn | None:
        """How to ask the model for the text between two others; None when its vocabulary has no marks."""
        from rvllm.text.chat.fim import fill_in_of

        return fill_in_of(self, self._roles)

    @cached_property
    def _length_bound(self) -> LengthBound | None:
        from rvllm.text.tokenizers.length_bound import length_bound

        return length_bound(self.backend, self.spelling)

    def surely_reaches(self, text: str, count: int) -> bool:
        """Whether a text's size alone says that it has `count` tokens or more; False also means "unknown"."""
        if len(text) < count:  # most texts: not worth reading the vocabulary for
            return False
        bound = self._length_bound
        return bound is not None and bound.fewest_tokens(text) >= count

    def encode_truncated(self, text: str, limit: int) -> list[int]:
        """Token ids of a text's beginning: `limit` in all, with what the model puts around it."""
        room = limit - self.backend.num_special_tokens_to_add(False)
        (encoding,) = self.backend.encode_batch_fast([_well_formed(text)], add_special_tokens=False)
        if room < 0:
            return list(self.backend.post_process(encoding, None, True).ids)[:limit]
        encoding.truncate(room)
        return list(self.backend.post_process(encoding, None, True).ids)

    def encode_pair(self, first: str, second: str, limit: int | None) -> tuple[list[int], int | None]:
        """Token ids of two texts with what the model puts around and between them.

        limit: the most ids in all, None for any; the longer text is cut first. Also the index from which on
        ids are of the second kind (BERT's token types), None where there are no kinds.
        """
        inputs = [_well_formed(first), _well_formed(second)]
        one, two = self.backend.encode_batch(inputs, add_special_tokens=False)
        if limit is not None:
            room = max(0, limit - self.backend.num_special_tokens_to_add(True))
            left, right = len(one.ids), len(two.ids)
            if left + right > room:
                shorter = min(left, right, room // 2)
                left = shorter if left <= right else min(left, room - shorter)
                one.truncate(left)
                two.truncate(min(right, room - left))
        both = self.backend.post_process(one, two, True)
        ids = list(both.ids)[:limit]
        return ids, next((i for i, kind in enumerate(both.type_ids[: len(ids)]) if kind == 1), None)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of several texts, on all cores."""
        inputs = [_well_formed(text) for text in texts]
        found = self.backend.encode_batch_fast(inputs, add_special_tokens=add_special_tokens)
        return [list(encoding.ids) for encoding in found]

    def decode(self, ids: int | Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids; ids beyond the vocabulary decode to nothing.

        Raises UsageError for what can be no token id at all.
        """
        ids = [ids] if isinstance(ids, int) else list(ids)
        try:
            (text,) = self.backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError):
            raise UsageError(f"token ids must be whole numbers from 0 to {(1 << 32) - 1}") from None
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, which need not be whole characters; empty for an unknown id."""
        token = self.backend.id_to_token(token_id)
        return b"" if token is None else self.spelling.bytes_of(token)

    def token_text(self, token_id: int) -> str:
        """A token's text by itself; bytes that are no whole character become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str | None]:
        """The vocabulary's own spelling of tokens."""
        return [self.backend.id_to_token(i) for i in ids]

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """Id of a token in the vocabulary's own spelling."""
        return self.backend.token_to_id(token)

    def __len__(self) -> int:
        return self.vocab_size

    def get_chat_template(self, name: str | None = None, tools: bool = False) -> str:
        """A chat template's source: the named one, else `tool_use` for tools if there is, else the default.

        Raises UsageError when the model has none of that name.
        """
        known = self.chat_templates
        if name is None and tools and "tool_use" in known:
            name = "tool_use"
        chosen = known.get(name or DEFAULT_TEMPLATE)
        if chosen is not None:
            return chosen
        if not known:
            raise UsageError(f"{self.origin} has no chat template; give one with --chat-template")
        names = ", ".join(sorted(known))
        raise UsageError(f"{self.origin} has no chat template {name or DEFAULT_TEMPLATE!r}, only {names}")

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **variables: Any,
    ) -> str | list[int]:
        """A conversation as the model's prompt: token ids, or the text with `tokenize=False`.

        chat_template: the name of one of the model's templates or a template's source.
        variables: further values the template may use (enable_thinking ...).
        Raises UsageError naming what is wrong with template or messages.
        """
        from rvllm.text.chat.template import render_chat

        source = chat_template
        if source is None or source in self.chat_templates:
            source = self.get_chat_template(source, bool(tools))
        text = render_chat(
            source,
            conversation,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables={**self.special_tokens, **variables},
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text


def _well_formed(text: str) -> str:
    """The text with lone surrogates, which JSON can carry but UTF-8 cannot, turned into U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@dataclass(frozen=True)
class Spelling:
    """How a vocabulary's strings stand for bytes, after the tokenizer's decoder.

    kind: "bytes" for byte-level BPE (each character is a byte), "pieces" for SentencePiece (▁ is a space,
    <0xNN> a byte), "other" for all else.
    strip_left: a leading space of the whole text is dropped.
    """

    kind: str
    strip_left: bool = False

    def bytes_of(self, token: str) -> bytes:
        """The bytes of one token in the vocabulary's spelling."""
        if self.kind == "bytes":
            try:
                return bytes([CHARACTER_BYTES[c] for c in token])
            except KeyError:  # an added token holding a character outside of the alphabet stands for itself
                return token.encode()
        if self.kind == "pieces":
            byte = byte_piece(token)
            return token.replace("▁", " ").encode() if byte is None else bytes([byte])
        return token.encode()


def byte_piece(token: str) -> int | None:
    """The byte that a SentencePiece token such as `<0x0A>` stands for; None for any other token."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None


def spelling_of(backend: tokenizers.Tokenizer) -> Spelling:
    """Reads from the tokenizer's decoder how its vocabulary is spelled."""
    if backend.decoder is None:
        return Spelling("other")
    state = json.loads(backend.decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return Spelling("bytes")
    replaces = [s for s in steps if s["type"] == "Replace"]
    pieces = all(s["pattern"] == {"String": "▁"} and s["content"] == " " for s in replaces)
    if replaces and pieces and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        strips = [s for s in steps if s["type"] == "Strip"]
        simple = all(s["content"] == " " and s["start"] <= 1 and s["stop"] == 0 for s in strips)
        if simple and "ByteFallback" in kinds and "Fuse" in kinds:
            return Spelling("pieces", strip_left=any(s["start"] == 1 for s in strips))
    return Spelling("other")


def frame(backend: tokenizers.Tokenizer, before: str | None, after: str | None) -> None:
    """Makes `encode` put the token `before` in front of a text and `after` behind it; None puts nothing."""
    from tokenizers import processors

    single = " ".join(part for part in (before, "$A", after) if part)
    ids = [(token, backend.token_to_id(token)) for token in {before, after} if token]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)


def byte_characters() -> dict[int, str]:
    """Byte-level BPE's alphabet: a printable character for each byte (GPT-2, Radford et al. 2019)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    characters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in characters:
            characters[byte] = chr(256 + len(characters) - len(printable))
    return characters


CHARACTER_BYTES = {character: byte for byte, character in byte_characters().items()}
