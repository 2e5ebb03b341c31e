"""Fill in the middle: a prompt that shows what stands before and behind the text to be written.

Models that were trained for it mark the parts with tokens of their own (Bavarian et al. 2022,
arXiv:2207.14255). The marks are found in the vocabulary by name; a GGUF file may also say which they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rvllm.text.tokenizers.tokenizer import Tokenizer

# Marks of the part before the gap, the part behind it, and the gap. Without a mark for the gap the part
# behind it comes first, and the text to be written follows the part before it.
_MARKS: tuple[tuple[str, str, str | None], ...] = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma, Granite
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, StarCoder2
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # CodeLlama
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
    ("[PREFIX]", "[SUFFIX]", None),  # Codestral
)
# Tokens after which nothing belongs into the gap any more: ends of files and texts.
_ENDS = (
    "<|endoftext|>", "<|end_of_text|>", "<|fim_pad|>", "<fim_pad>", "<|repo_name|>", "<|file_sep|>",
    "<file_sep>", "<|file_separator|>", "▁<EOT>", "<EOT>", "<|EOT|>", "<｜end▁of▁sentence｜>",
)  # fmt: skip
# GGUF's names for the same, after `tokenizer.ggml.` and before `_token_id`; the older ones come second.
GGUF_MARKS = (("fim_pre", "prefix"), ("fim_suf", "suffix"), ("fim_mid", "middle"))
GGUF_ENDS = ("eot", "fim_pad", "fim_rep", "fim_sep")


@dataclass(frozen=True)
class FillIn:
    """A vocabulary's marks, as token ids; ends: tokens that end the text in the gap."""

    prefix: int
    suffix: int
    middle: int | None
    ends: frozenset[int]

    def prompt(
        self, tokenizer: Tokenizer, before: list[int], after: str, add_special_tokens: bool = True
    ) -> list[int]:
        """Token ids of a prompt whose continuation belongs between `before` and `after`.

        before: token ids without what the model puts in front of a text; that is added here.
        """
        behind = _inner(tokenizer, after)
        if self.middle is None:
            marked = [self.suffix, *behind, self.prefix, *before]
        else:
            marked = [self.prefix, *before, self.suffix, *behind, self.middle]
        bos = tokenizer.bos_token_id
        framed = add_special_tokens and bos is not None and tokenizer.encode("")[:1] == [bos]
        return [bos, *marked] if framed and bos is not None else marked


def fill_in_of(tokenizer: Tokenizer, roles: Mapping[str, int]) -> FillIn | None:
    """The marks of a vocabulary; None when it has none.

    roles: tokens whose meaning the model's file tells, under GGUF's names.
    """
    told = [next((roles[name] for name in names if name in roles), None) for names in GGUF_MARKS]
    prefix, suffix, middle = told
    if prefix is None or suffix is None:
        for names in _MARKS:
            ids = [None if name is None else tokenizer.convert_tokens_to_ids(name) for name in names]
            if all(i is not None or name is None for i, name in zip(ids, names, strict=True)):
                prefix, suffix, middle = ids
                break
    if prefix is None or suffix is None:
        return None
    ends = {prefix, suffix, middle, *(roles.get(name) for name in GGUF_ENDS)}
    ends |= {tokenizer.convert_tokens_to_ids(name) for name in _ENDS}
    return FillIn(prefix, suffix, middle, frozenset(i for i in ends if i is not None))


def _inner(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text that goes on where another has stopped.

    SentencePiece puts a space before every text. Behind a line break, whose tokens are then dropped, the
    text itself gets none.
    """
    if tokenizer.spelling.kind == "pieces":
        lead = tokenizer.encode("\n", add_special_tokens=False)
        ids = tokenizer.encode("\n" + text, add_special_tokens=False)
        if ids[: len(lead)] == lead:
            return ids[len(lead) :]
    return tokenizer.encode(text, add_special_tokens=False)
