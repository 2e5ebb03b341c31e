"""Text to token ids and back, for every tokenizer a model may bring.

A `Tokenizer` wraps a `tokenizers.Tokenizer`, read from a directory's tokenizer.json (`huggingface.py`) or
built from a GGUF file's metadata (`gguf.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rvllm.errors import UsageError
from rvllm.text.chat.fim import FillIn, fill_in_of
from rvllm.text.tokenizers.length_bound import LengthBound, length_bound
from rvllm.text.tokenizers.parts import DEFAULT_TEMPLATE, TokenizerParts
from rvllm.text.tokenizers.spelling import spelling_of

if TYPE_CHECKING:
    from tokenizers import Encoding


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
        return self._id_of("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of `eos_token`; a model's generation config may name further ones."""
        return self._id_of("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._id_of("pad_token")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with `add_special_tokens`, what the model puts around it (BOS, [CLS] ...).

        Other threads run meanwhile: unlike `encode`, a batch lets go of Python's lock.
        """
        (encoding,) = self._encodings([text], add_special_tokens)
        return list(encoding.ids)

    def _encodings(self, texts: Sequence[str], add_special_tokens: bool) -> list[Encoding]:
        """Of each text. Raises UsageError for one that the tokenizer cannot encode: an unknown token that its
        own vocabulary lacks, say, shows only with a text that needs it."""
        inputs = [_well_formed(text) for text in texts]
        try:
            return list(self.backend.encode_batch_fast(inputs, add_special_tokens=add_special_tokens))
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UsageError(f"{self.origin} cannot encode this text: {reason[0][:200]}") from None

    @cached_property
    def fill_in(self) -> FillIn | None:
        """How to ask the model for the text between two others; None when its vocabulary has no marks."""
        return fill_in_of(self.convert_tokens_to_ids, self._roles)

    def encode_around(self, before: list[int], after: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt whose continuation belongs between `before` and `after`.

        before: token ids without what the model puts in front of a text; that is added here.
        Raises UsageError when the vocabulary has no marks for it.
        """
        if self.fill_in is None:
            raise UsageError(f"{self.origin} cannot fill in: its vocabulary has no tokens that mark a gap")
        marked = self.fill_in.around(before, self._continued(after))
        bos = self.bos_token_id
        framed = add_special_tokens and bos is not None and self.encode("")[:1] == [bos]
        return [bos, *marked] if framed and bos is not None else marked

    def _continued(self, text: str) -> list[int]:
        """Token ids of a text that goes on where another has stopped.

        SentencePiece puts a space before every text. Behind a line break, whose tokens are then dropped, the
        text itself gets none.
        """
        if self.spelling.kind == "pieces":
            lead = self.encode("\n", add_special_tokens=False)
            ids = self.encode("\n" + text, add_special_tokens=False)
            if ids[: len(lead)] == lead:
                return ids[len(lead) :]
        return self.encode(text, add_special_tokens=False)

    @cached_property
    def _length_bound(self) -> LengthBound | None:
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
        (encoding,) = self._encodings([text], False)
        if room < 0:
            return list(self.backend.post_process(encoding, None, True).ids)[:limit]
        encoding.truncate(room)
        return list(self.backend.post_process(encoding, None, True).ids)

    def encode_pair(self, first: str, second: str, limit: int | None) -> tuple[list[int], int | None]:
        """Token ids of two texts with what the model puts around and between them.

        limit: the most ids in all, None for any; the longer text is cut first. Also the index from which on
        ids are of the second kind (BERT's token types), None where there are no kinds.
        """
        one, two = self._encodings([first, second], False)
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
        return [list(encoding.ids) for encoding in self._encodings(texts, add_special_tokens)]

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
        options = {
            "tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }  # fmt: skip
        text = self.render(chat_template, conversation, options, variables)
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def render(
        self,
        template: str | None,
        messages: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
        variables: Mapping[str, Any],
    ) -> str:
        """A conversation as the model's prompt, by its chat template.

        template: a source or a name of the model's; None: the model's own. options: of `render_chat`.
        """
        from rvllm.text.chat.template import render_chat

        if template is None or template in self.chat_templates:
            template = self.get_chat_template(template, bool(options.get("tools")))
        return render_chat(template, messages, variables={**self.special_tokens, **variables}, **options)


def _well_formed(text: str) -> str:
    """The text with lone surrogates, which JSON can carry but UTF-8 cannot, turned into U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
