"""The tokens that end an answer of a GGUF model.

A file names one end token, seldom more, where the publisher's generation_config often has several: Qwen's
chat models end a turn with <|im_end|> and a text with <|endoftext|>, and the file knows the first alone. So
control tokens whose spelling says that they end a turn, a message or a text do so too, as in llama.cpp.
"""

from __future__ import annotations

import numpy as np

from rvllm.weights.gguf.archs import Metadata
from rvllm.weights.gguf.container import Strings

CONTROL = 3  # in tokenizer.ggml.token_type
SPELLINGS = frozenset(
    (
        "<|im_end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<end_of_turn>",
    )
)


def end_tokens(metadata: Metadata) -> list[int]:
    """Ids that end an answer: those that the file names (end of sequence, turn, message) first."""
    named = [metadata.opt_count(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    ends = [token for token in named if token is not None]
    return list(dict.fromkeys([*ends, *_spelled(metadata)])) if ends else []


def _spelled(metadata: Metadata) -> list[int]:
    tokens = metadata.values.get("tokenizer.ggml.tokens")
    kinds = metadata.values.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, Strings) or not isinstance(kinds, np.ndarray) or len(tokens) != len(kinds):
        return []  # the tokenizer says what is wrong, if one is asked for
    return [token for token in np.flatnonzero(kinds == CONTROL).tolist() if tokens[token] in SPELLINGS]
