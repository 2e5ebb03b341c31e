"""Fill in the middle: a prompt that shows what stands before and behind the text to be written.

Models that were trained for it mark the parts with tokens of their own (Bavarian et al. 2022,
arXiv:2207.14255). The marks are found in the vocabulary by name; a GGUF file may also say which they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

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

    def around(self, before: list[int], behind: list[int]) -> list[int]:
        """Token ids of a prompt whose continuation belongs between two texts, given as token ids."""
        if self.middle is None:
            return [self.suffix, *behind, self.prefix, *before]
        return [self.prefix, *before, self.suffix, *behind, self.middle]


def fill_in_of(id_of: Callable[[str], int | None], roles: Mapping[str, int]) -> FillIn | None:
    """The marks of a vocabulary; None when it has none.

    id_of: the id of a token in the vocabulary's spelling.
    roles: tokens whose meaning the model's file tells, under GGUF's names.
    """
    told = [next((roles[name] for name in names if name in roles), None) for names in GGUF_MARKS]
    prefix, suffix, middle = told
    if prefix is None or suffix is None:
        for names in _MARKS:
            ids = [None if name is None else id_of(name) for name in names]
            if all(i is not None or name is None for i, name in zip(ids, names, strict=True)):
                prefix, suffix, middle = ids
                break
    if prefix is None or suffix is None:
        return None
    ends = {prefix, suffix, middle, *(roles.get(name) for name in GGUF_ENDS)}
    ends |= {id_of(name) for name in _ENDS}
    return FillIn(prefix, suffix, middle, frozenset(i for i in ends if i is not None))
