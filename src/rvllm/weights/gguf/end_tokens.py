"""The tokens that end an answer of a GGUF model, by llama.cpp's rules.

A file names one end token, seldom more, where the publisher's generation_config often has several: Qwen's
chat models end a turn with <|im_end|> and a text with <|endoftext|>, and the file knows the first alone. So
tokens whose spelling says that they end a turn, a message or a text do so too, whatever their type says:
converters have written such tokens as plain ones. They are control tokens then. In one thing we do not
follow llama.cpp: `</s>` typed as plain text stays text, for it is an HTML tag that code models write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rvllm.weights.gguf.archs import Metadata
from rvllm.weights.gguf.container import Strings

NORMAL, CONTROL = 1, 3  # in tokenizer.ggml.token_type
SPELLINGS = frozenset(
    (
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
        "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
        "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
        "<｜end▁of▁sentence｜>", "[e~[",
    )
)  # fmt: skip
# What else ends an answer, unless the file names another token for the purpose.
_FILL_IN = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
_PLAIN_END = (("<|return|>", "<|call|>"), ("<|calls|>", "<|flush|>"), ("<|call|>", "<|flush|>"))
_PLAIN_S = ("<|tool_response>", "<|plamo:eos|>")


_LOOKED_FOR = SPELLINGS.union(*_FILL_IN.values(), _PLAIN_S)


def end_tokens(metadata: Metadata) -> list[int]:
    """Ids that end an answer: those that the file names (end of sequence, turn, message) first."""
    named = [metadata.opt_count(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    tokens = metadata.values.get("tokenizer.ggml.tokens")
    found = [token for token in named if token is not None]
    if isinstance(tokens, Strings):  # else the tokenizer says what is wrong, if one is asked for
        places = _places(tokens)
        found += _spelled(places, metadata.values.get("tokenizer.ggml.token_type"))
        for kind, spellings in _FILL_IN.items():
            index = metadata.opt_count(f"tokenizer.ggml.{kind}_token_id")
            found += [index] if index is not None else sorted(places[s] for s in spellings if s in places)[:1]
        found = [token for token in found if token < len(tokens)]
    return list(dict.fromkeys(found))


def spelled_ends(tokens: Sequence[str], types: Any = None) -> list[int]:
    """Ids of the tokens whose spelling makes them ends. types: the file's token_type.

    `<|end|>` is none beside gpt-oss' or Solar's marks, where it ends a message and not the turn, and `</s>`
    is plain text to Gemma 4 and PLaMo.
    """
    return _spelled(_places(tokens), types)


def _places(tokens: Sequence[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens) if token in _LOOKED_FOR}


def _spelled(places: dict[str, int], types: Any) -> list[int]:
    found = {token: index for token, index in places.items() if token in SPELLINGS}
    if any(all(mark in found for mark in marks) for marks in _PLAIN_END):
        found.pop("<|end|>", None)
    index = found.get("</s>")
    if index is not None and (_is_plain(types, index) or any(mark in places for mark in _PLAIN_S)):
        del found["</s>"]
    return list(found.values())


def _is_plain(types: Any, index: int) -> bool:
    try:
        return int(types[index]) == NORMAL
    except (TypeError, ValueError, IndexError):  # the file has none, or something else in their place
        return False
