"""How text is cut before byte-level merges apply: one rule a name in GGUF's `tokenizer.ggml.pre`.

A rule is a list of regular expressions. Each isolates its matches within the pieces that the one before
left, as `tokenizers` does; the byte-level alphabet is applied last. The expressions are those the models
were trained with (their published tokenizer.json); llama.cpp names the rules.
"""

from __future__ import annotations

from dataclasses import dataclass

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}|{_SYMBOLS}"
_QWEN2 = rf"{_CONTRACTIONS}|{_LEAD}\p{{L}}+|\p{{N}}|{_SYMBOLS}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|{_LEAD}[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED_LETTERS = r"\p{Lu}\p{Ll}\p{Lt}"  # scripts with capitals; Lo and Lm stay out


@dataclass(frozen=True)
class PreTokenizer:
    """One rule.

    splits: the expressions, in order. ignore_merges: a piece that is a token is taken whole.
    add_bos: texts begin with BOS unless the file says otherwise.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_PUNCTUATION = r"[\p{P}$+<=>^~|`]+"
_THREE_DIGITS = r"[0-9][0-9][0-9]"
_SEED_CODER = rf"{_CONTRACTIONS}|{_LEAD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGITS_GPT2 = PreTokenizer((r"\p{N}", _GPT2))
_PLAIN_GPT2 = PreTokenizer((_GPT2,))
_LLAMA3_RULE = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_LLAMA3_MERGED = PreTokenizer((_LLAMA3,))
_QWEN2_RULE = PreTokenizer((_QWEN2,))
_DEEPSEEK3_RULE = PreTokenizer((r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": _PLAIN_GPT2,
    "gpt2": _PLAIN_GPT2,
    "phi-2": _PLAIN_GPT2,
    "mpt": _PLAIN_GPT2,
    "olmo": _PLAIN_GPT2,
    "jais": _PLAIN_GPT2,
    "jina-v1-en": _PLAIN_GPT2,
    "jina-v2-es": _PLAIN_GPT2,
    "jina-v2-de": _PLAIN_GPT2,
    "jina-v2-code": _PLAIN_GPT2,
    "gigachat": _PLAIN_GPT2,
    "a.x-4.0": _PLAIN_GPT2,
    "mellum": _PLAIN_GPT2,
    "modern-bert": _PLAIN_GPT2,
    "granite-docling": _PLAIN_GPT2,
    "falcon": PreTokenizer((_PUNCTUATION, _GPT2, _THREE_DIGITS)),
    "seed-coder": PreTokenizer((_SEED_CODER,)),
    "trillion": _PLAIN_GPT2,
    "smollm": _DIGITS_GPT2,
    "starcoder": _DIGITS_GPT2,
    "refact": _DIGITS_GPT2,
    "command-r": _DIGITS_GPT2,
    "codeshell": _DIGITS_GPT2,
    "exaone": _DIGITS_GPT2,
    "minerva-7b": _DIGITS_GPT2,
    "llama-bpe": _LLAMA3_RULE,
    "llama3": _LLAMA3_RULE,
    "llama-v3": _LLAMA3_RULE,
    "falcon3": _LLAMA3_RULE,
    "falcon-h1": _LLAMA3_RULE,
    "midm-2.0": _LLAMA3_RULE,
    "pixtral": _LLAMA3_RULE,
    "lfm2": _LLAMA3_RULE,
    "dbrx": _LLAMA3_MERGED,
    "smaug-bpe": _LLAMA3_MERGED,
    "chatglm-bpe": _LLAMA3_MERGED,
    "glm4": _LLAMA3_MERGED,
    "qwen2": _QWEN2_RULE,
    "deepseek-r1-qwen": _QWEN2_RULE,
    "stablelm2": _QWEN2_RULE,
    "hunyuan": _QWEN2_RULE,
    "megrez": _QWEN2_RULE,
    "kormo": _QWEN2_RULE,
    "grok-2": _QWEN2_RULE,
    "qwen35": PreTokenizer((_QWEN35,)),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "gpt-4o": PreTokenizer((_GPT4O,)),
    "llama4": PreTokenizer((_GPT4O,)),
    "minimax-m2": PreTokenizer((_GPT4O,)),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[{_CASED_LETTERS}]+",
            r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
            r"(?<!\s)\s+$",  # the look-behind changes no match, but spares a quadratic search
            r"[一-龥ࠀ-一가-퟿]+",
            r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    "deepseek-v3": _DEEPSEEK3_RULE,
    "hunyuan-dense": _DEEPSEEK3_RULE,
}

DEFAULT = PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", _THREE_DIGITS))
"""For files with no `tokenizer.ggml.pre`, or one that says `default`: llama.cpp's guess."""
