"""Builds a tokenizer from the metadata of a GGUF file (`tokenizer.ggml.*`, as llama.cpp defines it).

The text is handed to the merges as it stands: a GGUF file names no Unicode normalisation, so none is done.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rvllm.errors import ModelError
from rvllm.text.chat.fim import GGUF_ENDS, GGUF_MARKS
from rvllm.text.tokenizers.parts import DEFAULT_TEMPLATE, TokenizerParts, built, byte_level, frame, wordpiece
from rvllm.text.tokenizers.pretokenizers import DEFAULT, PRE_TOKENIZERS, PreTokenizer
from rvllm.text.tokenizers.spelling import byte_piece
from rvllm.weights.gguf.end_tokens import spelled_ends

if TYPE_CHECKING:
    import tokenizers

_log = logging.getLogger(__name__)
KEY = "tokenizer.ggml."
CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type

_SPECIAL_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "sep_token": "seperator_token_id",  # spelled so in the format
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}


def read_gguf(path: Path) -> TokenizerParts:
    """The tokenizer in a .gguf file. Raises ModelError naming the file and field."""
    from rvllm.weights.open import open_checkpoint

    return from_metadata(open_checkpoint(path).metadata, str(path))


def from_metadata(metadata: Mapping[str, Any], origin: str) -> TokenizerParts:
    """The tokenizer that a GGUF file's metadata describes.

    Raises ModelError naming `origin` and the field that is missing, broken or not supported.
    """
    kind = metadata.get(KEY + "model")
    builders = {
        "gpt2": _byte_level, "llama": _sentencepiece, "bert": _wordpiece, "t5": _unigram, "gemma4": _by_lines,
    }  # fmt: skip
    if not isinstance(kind, str) or kind not in builders:
        known = ", ".join(builders)
        raise ModelError(f"{origin}: {KEY}model is {kind!r}; supported: {known}")
    if kind == "gemma4":  # converters wrote false here at first; llama.cpp reads them so, too
        metadata = {**metadata, KEY + "add_bos_token": True}
    try:
        with _no_collection():
            tokens = _strings(metadata, "tokens", origin)
            backend = builders[kind](metadata, tokens, origin)
            special = _special_tokens(metadata, tokens, origin)
            _add_special(backend, metadata, tokens)
            if kind != "bert":
                # Files that do not say: SentencePiece's begin with BOS, and some pre-tokenizers'.
                begins = kind == "llama" or (kind == "gpt2" and _rule(metadata).add_bos)
                before = metadata.get(KEY + "add_bos_token", begins)
                after = metadata.get(KEY + "add_eos_token", False)
                frame(
                    backend, special.get("bos_token") if before else None,
                    special.get("eos_token") if after else None,
                )  # fmt: skip
    except ModelError:
        raise
    except Exception as error:  # values of the wrong type, or what the tokenizers package refuses
        raise ModelError(f"{origin}: {KEY}*: {type(error).__name__}: {error}") from None
    return TokenizerParts(backend, origin, special, _chat_templates(metadata), _roles(metadata, tokens))


def _rule(metadata: Mapping[str, Any]) -> PreTokenizer:
    """The pre-tokenizer a byte-level file names. Raises KeyError for one that is not known."""
    name = metadata.get(KEY + "pre")
    return DEFAULT if name in (None, "default") else PRE_TOKENIZERS[str(name)]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Hundreds of thousands of small objects are made at once; collecting between them doubles the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _strings(metadata: Mapping[str, Any], name: str, origin: str) -> list[str]:
    value = metadata.get(KEY + name)
    if value is None:
        raise ModelError(f"{origin}: {KEY}{name} is missing")
    values = list(value)
    if not values or not all(type(v) is str for v in values):
        raise ModelError(f"{origin}: {KEY}{name} must be a list of strings")
    try:
        "".join(values).encode()
    except UnicodeEncodeError:  # bytes in the file that are not UTF-8 came as surrogates
        return [value.encode("utf-8", "replace").decode() for value in values]
    return values


def _merges(metadata: Mapping[str, Any], origin: str) -> list[tuple[str, str]]:
    split = (line.partition(" ") for line in _strings(metadata, "merges", origin))
    return [(left, right) for left, _, right in split]


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], origin: str) -> tokenizers.Tokenizer:
    """Byte-level BPE (GPT-2's kind) with one of the known pre-tokenizers."""
    from tokenizers import models

    if metadata.get(KEY + "pre") is None:
        _log.warning(
            "%s names no pre-tokenizer (%spre): text is cut by a guess, answers may suffer", origin, KEY
        )
    try:
        rule = _rule(metadata)
    except KeyError:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise ModelError(f"{origin}: {KEY}pre is {metadata[KEY + 'pre']!r}; supported: {known}") from None
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = _merges(metadata, origin)
    model = built(
        lambda: models.BPE(vocab=vocab, merges=merges, ignore_merges=rule.ignore_merges),
        f"{origin}: {KEY}merges do not fit {KEY}tokens",
    )
    return byte_level(model, rule.splits)


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], origin: str) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: the file has no merges but scores, the better merged first."""
    from tokenizers import Tokenizer, models

    vocab = {token: index for index, token in enumerate(tokens)}
    if metadata.get(KEY + "merges") is not None:
        merges = _merges(metadata, origin)
    else:
        merges = merges_from_scores(tokens, _scores(metadata, tokens, origin))
    unknown = metadata.get(KEY + "unknown_token_id")
    model = built(
        lambda: models.BPE(
            vocab=vocab,
            merges=merges,
            unk_token=tokens[unknown] if isinstance(unknown, int) and 0 <= unknown < len(tokens) else None,
            fuse_unk=True,
            byte_fallback=_has_bytes(tokens),
        ),
        f"{origin}: {KEY}merges do not fit {KEY}tokens",
    )
    backend = Tokenizer(model)
    _spell_spaces(backend, metadata)
    return backend


def _by_lines(metadata: Mapping[str, Any], tokens: list[str], origin: str) -> tokenizers.Tokenizer:
    """Gemma 4's: SentencePiece's spelling with merges of its own, within lines and runs of line ends."""
    from tokenizers import Regex, pre_tokenizers

    backend = _sentencepiece(metadata, tokens, origin)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|\n+"), behavior="isolated")
    return backend


def merges_from_scores(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """The merges that SentencePiece's BPE applies implicitly, best first.

    SentencePiece joins the neighbouring pair whose joined token has the highest score, so each way to cut
    a token into two tokens is a merge of that token's score; ties go to the lower ids.
    """
    index = {token: i for i, token in enumerate(tokens)}
    found: list[tuple[float, int, int, str, str]] = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            i, j = index.get(left), index.get(right)
            if i is not None and j is not None:
                found.append((-score, i, j, left, right))
    found.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in found]


def _scores(metadata: Mapping[str, Any], tokens: list[str], origin: str) -> list[float]:
    scores = metadata.get(KEY + "scores")
    if scores is None or len(scores) != len(tokens):
        raise ModelError(f"{origin}: {KEY}scores must hold one number for each of {len(tokens)} tokens")
    return [float(score) for score in scores]


def _unigram(metadata: Mapping[str, Any], tokens: list[str], origin: str) -> tokenizers.Tokenizer:
    """SentencePiece's unigram model: the most likely way to cut the text, by the tokens' scores."""
    from tokenizers import Tokenizer, models

    vocab = list(zip(tokens, _scores(metadata, tokens, origin), strict=True))
    unknown = metadata.get(KEY + "unknown_token_id")
    model = built(
        lambda: models.Unigram(vocab, unknown, byte_fallback=_has_bytes(tokens)), f"{origin}: {KEY}tokens"
    )
    backend = Tokenizer(model)
    _spell_spaces(backend, metadata)
    return backend


def _has_bytes(tokens: list[str]) -> bool:
    return any(byte_piece(token) is not None for token in tokens)


def _spell_spaces(backend: tokenizers.Tokenizer, metadata: Mapping[str, Any]) -> None:
    """SentencePiece's way with text: normalised as the file says, ▁ for a space, bytes for the unknown."""
    from tokenizers import Regex, decoders, normalizers

    prefix = bool(metadata.get(KEY + "add_space_prefix", True))
    steps: list[normalizers.Normalizer] = []
    if (table := metadata.get(KEY + "precompiled_charsmap")) is not None and len(table):
        steps.append(normalizers.Precompiled(bytes(table)))
    if metadata.get(KEY + "remove_extra_whitespaces", False):
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefix else back)


def _wordpiece(metadata: Mapping[str, Any], tokens: list[str], origin: str) -> tokenizers.Tokenizer:
    """BERT's WordPiece. The format writes ▁ before pieces that begin a word and drops the ## of the rest."""
    types = _types(metadata, tokens)
    vocab = {}
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if token.startswith("▁"):
            token = token[1:]
        elif kind not in (CONTROL, USER_DEFINED) and not (token.startswith("[") and token.endswith("]")):
            token = "##" + token
        vocab[token] = index
    tokens[:] = sorted(vocab, key=lambda token: vocab[token])
    special = _special_tokens(metadata, tokens, origin)
    cls, sep = special.get("cls_token") or "[CLS]", special.get("sep_token") or "[SEP]"
    return wordpiece(vocab, cls, sep, f"{origin}: {KEY}tokens hold", special.get("unk_token"))


def _types(metadata: Mapping[str, Any], tokens: list[str]) -> list[int]:
    """The type of each token; one whose spelling says that it ends something is a control token."""
    types = [int(kind) for kind in metadata.get(KEY + "token_type", ())]
    if len(types) != len(tokens):
        types = [1] * len(tokens)
    for index in spelled_ends(tokens, types):
        if types[index] != CONTROL:
            _log.info(
                "%r is typed %d in the file, and taken for a control token", tokens[index], types[index]
            )
            types[index] = CONTROL
    return types


def _special_tokens(metadata: Mapping[str, Any], tokens: list[str], origin: str) -> dict[str, str]:
    found = {}
    for name, key in _SPECIAL_KEYS.items():
        index = metadata.get(KEY + key)
        if index is None:
            continue
        if not isinstance(index, int) or not 0 <= index < len(tokens):
            raise ModelError(f"{origin}: {KEY}{key} is {index!r}, but there are {len(tokens)} tokens")
        found[name] = tokens[index]
    return found


def _roles(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, int]:
    """Tokens with a meaning that only some models have; what is no token of the vocabulary is left out."""
    names = (*(name for names in GGUF_MARKS for name in names), *GGUF_ENDS)
    found = {name: metadata.get(f"{KEY}{name}_token_id") for name in names}
    return {name: i for name, i in found.items() if isinstance(i, int) and 0 <= i < len(tokens)}


def _add_special(backend: tokenizers.Tokenizer, metadata: Mapping[str, Any], tokens: list[str]) -> None:
    """Control tokens become special ones, user-defined tokens are matched whole but stay text."""
    from tokenizers import AddedToken

    types = _types(metadata, tokens)
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL and t]
    defined = [t for t, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED and t]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in defined])


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    templates = {}
    if isinstance(metadata.get("tokenizer.chat_template"), str):
        templates[DEFAULT_TEMPLATE] = metadata["tokenizer.chat_template"]
    prefix = "tokenizer.chat_template."
    for key, value in metadata.items():
        if key.startswith(prefix) and isinstance(value, str):
            templates[key.removeprefix(prefix)] = value
    return templates
