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

_RULES: tuple[tuple[PreTokenizer, tuple[str, ...]], ...] = (
    (PreTokenizer((_GPT2,)), (
        "gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "jina-v1-en", "jina-v2-es", "jina-v2-de",
        "jina-v2-code", "gigachat", "a.x-4.0", "mellum", "modern-bert", "granite-docling", "trillion",
    )),
    (PreTokenizer((r"\p{N}", _GPT2)), (
        "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b",
    )),
    (PreTokenizer((_PUNCTUATION, _GPT2, _THREE_DIGITS)), ("falcon",)),
    (PreTokenizer((_SEED_CODER,)), ("seed-coder",)),
    (PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True), (
        "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "midm-2.0", "pixtral", "lfm2",
    )),
    (PreTokenizer((_LLAMA3,)), ("dbrx", "smaug-bpe", "chatglm-bpe", "glm4")),
    (PreTokenizer((_QWEN2,)), (
        "qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "kormo", "grok-2",
    )),
    (PreTokenizer((_QWEN35,)), ("qwen35",)),
    (PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True), ("tekken",)),
    (PreTokenizer((_GPT4O,)), ("gpt-4o", "llama4", "minimax-m2")),
    (PreTokenizer((
        r"[\r\n]",
        rf"\s?[{_CASED_LETTERS}]+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"(?<!\s)\s+$",  # the look-behind changes no match, but spares a quadratic search
        r"[一-龥ࠀ-一가-퟿]+",
        r"\p{N}+",
    )), ("deepseek-llm",)),
    (PreTokenizer((
        r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}",
    )), ("deepseek-coder",)),
    (PreTokenizer((r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3)), ("deepseek-v3", "hunyuan-dense")),
)  # fmt: skip
PRE_TOKENIZERS = {name: rule for rule, names in _RULES for name in names}

DEFAULT = PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", _THREE_DIGITS))
"""For files with no `tokenizer.ggml.pre`, or one that says `default`: llama.cpp's guess."""
