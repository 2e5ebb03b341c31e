"""Reads the tokenizer of a Hugging Face directory: tokenizer.json and the small files beside it."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rvllm.errors import ModelError
from rvllm.text.tokenizers.parts import DEFAULT_TEMPLATE, TokenizerParts, built, byte_level, wordpiece
from rvllm.text.tokenizers.pretokenizers import PRE_TOKENIZERS
from rvllm.text.tokenizers.spelling import state_of

if TYPE_CHECKING:
    import tokenizers

_log = logging.getLogger(__name__)
_HAS_PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_directory(path: Path) -> TokenizerParts:
    """The tokenizer of a model directory. Raises ModelError naming file and field.

    What is put around a text is tokenizer.json's alone: `add_bos_token` and `add_eos_token` in
    tokenizer_config.json are for tokenizers that have no such file, as in Transformers.
    """
    from tokenizers import Tokenizer

    file = path / "tokenizer.json"
    config = _read_json(path / "tokenizer_config.json")
    named: dict[str, str] = {}  # special tokens that the vocabulary's own file names
    templates: dict[str, str] = {}  # of a file that has none, as its family writes conversations
    if file.is_file():
        _check_merges(file)
        backend = built(lambda: Tokenizer.from_file(str(file)), str(file))
    elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        backend = _from_merges(path, config)
    elif (path / "tokenizer.model").is_file():
        parts = _from_sentencepiece(path, config)
        backend, named = parts.backend, parts.special_tokens
    elif (path / "vocab.txt").is_file():
        backend = _from_wordpieces(path, config)
    elif tiktoken := sorted(path.glob("*.tiktoken")):
        from rvllm.text.tokenizers.tiktoken import from_tiktoken

        backend = from_tiktoken(tiktoken[0], config.get("tokenizer_class"))
    elif (path / "tekken.json").is_file():
        from rvllm.text.tokenizers.tekken import from_tekken

        parts = from_tekken(path / "tekken.json")
        backend, named, templates = parts.backend, parts.special_tokens, parts.chat_templates
    else:
        raise ModelError(
            f"{path}: no tokenizer (looked for tokenizer.json, vocab.json with merges.txt, tokenizer.model, "
            "vocab.txt, a .tiktoken file and tekken.json); --skip-tokenizer-init runs on token ids alone"
        )
    backend.no_padding()
    backend.no_truncation()
    extra = _read_json(path / "special_tokens_map.json")
    special = named | _special_tokens(config, extra)
    _complete(backend, _with_added(config, _read_json(path / "added_tokens.json")), special)
    _add_more(backend, config, extra)
    _check_ids(backend, special, path)
    return TokenizerParts(backend, str(path), special, _chat_templates(path, config) or templates)


def _check_merges(file: Path) -> None:
    """Raises ModelError for merges at which the tokenizers library (seen in 0.23.3) ends the process.

    It cuts the length of a BPE model's `continuing_subword_prefix` from the second part of each merge without
    looking; half a character is then no text, and its error about that aborts. Hardly any model has a prefix.
    """
    data = file.read_bytes()
    if not _HAS_PREFIX.search(data):
        return
    try:
        model = json.loads(data)["model"]
        prefix, merges = model["continuing_subword_prefix"], model.get("merges", [])
        seconds = [(m.split(" ") if isinstance(m, str) else m)[1] for m in merges]
        cut = [second.encode()[len(prefix.encode()) :] for second in seconds]
    except (ValueError, LookupError, TypeError, AttributeError):
        return  # the library says what is wrong with it
    for second, rest in zip(seconds, cut, strict=True):
        if rest[:1] and 0x80 <= rest[0] < 0xC0:  # not the first byte of a character
            fits = f"{prefix[:20]!r} does not fit the merge with {second[:20]!r}"
            raise ModelError(f"{file}: continuing_subword_prefix {fits}")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON: {_first_line(error)}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ModelError(f"{path}: cannot read the file: {reason}") from None


def _text_of(token: Any) -> str | None:
    """A token given as text or as an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _special_tokens(config: dict[str, Any], extra: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name in _NAMES:
        token = _text_of(config.get(name)) or _text_of(extra.get(name))
        if token:
            found[name] = token
    return found


def _complete(backend: tokenizers.Tokenizer, config: dict[str, Any], special: dict[str, str]) -> None:
    """Adds what only tokenizer_config.json or special_tokens_map.json name, in the order of the ids."""
    from tokenizers import AddedToken

    declared = config.get("added_tokens_decoder") or {}
    if not isinstance(declared, dict):
        return
    for key, entry in sorted(declared.items(), key=lambda item: int(item[0]) if item[0].isdigit() else 0):
        content = _text_of(entry)
        if content is None or not key.isdigit():
            continue
        if backend.token_to_id(content) is None or int(key) not in backend.get_added_tokens_decoder():
            flags = {k: bool(entry.get(k, False)) for k in ("single_word", "lstrip", "rstrip", "normalized")}
            token = AddedToken(content, special=bool(entry.get("special", False)), **flags)
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    missing = [t for t in special.values() if t not in known and backend.token_to_id(t) is not None]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in missing])


def _with_added(config: dict[str, Any], added: dict[str, Any]) -> dict[str, Any]:
    """The config with the tokens of added_tokens.json, where older checkpoints keep them: content to id."""
    declared = config.get("added_tokens_decoder") or {}
    if not added or not isinstance(declared, dict):
        return config
    older = {str(index): {"content": token} for token, index in added.items() if isinstance(index, int)}
    return {**config, "added_tokens_decoder": {**older, **declared}}


def _add_more(backend: tokenizers.Tokenizer, *sources: dict[str, Any]) -> None:
    """Makes special the tokens that `additional_special_tokens` and `extra_special_tokens` name."""
    from tokenizers import AddedToken

    names: list[str] = []
    for source in sources:
        for key in ("additional_special_tokens", "extra_special_tokens"):
            value = source.get(key) or ()
            entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
            names += [text for entry in entries if (text := _text_of(entry)) is not None]
    known = {token.content for token in backend.get_added_tokens_decoder().values()}  # with their own flags
    missing = [n for n in dict.fromkeys(names) if n not in known and backend.token_to_id(n) is not None]
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in missing])


def _check_ids(backend: tokenizers.Tokenizer, special: dict[str, str], path: Path) -> None:
    """Tells of named tokens that the vocabulary lacks. Raises ModelError where that is the end token."""
    for name, token in list(special.items()):
        if backend.token_to_id(token) is None:
            if name == "eos_token":
                raise ModelError(f"{path}: eos_token is {token!r}, which is no token of the vocabulary")
            _log.warning("%s: %s is %r, which is no token of the vocabulary", path, name, token)


def _chat_templates(path: Path, config: dict[str, Any]) -> dict[str, str]:
    """Templates by name; files beside the config win over what is inside it."""
    templates: dict[str, str] = {}
    inside = config.get("chat_template")
    if isinstance(inside, str):
        templates[DEFAULT_TEMPLATE] = inside
    elif isinstance(inside, list):
        for entry in inside:
            if isinstance(entry, dict) and isinstance(entry.get("template"), str):
                templates[str(entry.get("name", DEFAULT_TEMPLATE))] = entry["template"]
    legacy = _read_json(path / "chat_template.json").get("chat_template")
    if isinstance(legacy, str):
        templates[DEFAULT_TEMPLATE] = legacy
    for file in sorted((path / "additional_chat_templates").glob("*.jinja")):
        templates[file.stem] = _read_text(file)
    if (path / "chat_template.jinja").is_file():
        templates[DEFAULT_TEMPLATE] = _read_text(path / "chat_template.jinja")
    return templates


def _from_merges(path: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """Byte-level BPE from GPT-2's two files; how text is cut and normalised is the tokenizer's class'."""
    from tokenizers import models, normalizers

    files = str(path / "vocab.json"), str(path / "merges.txt")
    model = built(lambda: models.BPE.from_file(*files), f"{path}: vocab.json or merges.txt")
    kind = str(config.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    splits = PRE_TOKENIZERS["qwen2"].splits if kind == "Qwen2Tokenizer" else ()
    backend = byte_level(model, splits, bool(config.get("add_prefix_space", False)))
    if kind in ("Qwen2Tokenizer", "GPTNeoXTokenizer"):
        backend.normalizer = normalizers.NFC()
    elif kind not in _LIKE_GPT2:
        _log.warning("%s: text is cut as GPT-2's is, which %s may do otherwise", path, kind)
    return backend


_LIKE_GPT2 = ("GPT2Tokenizer", "CodeGenTokenizer", "PreTrainedTokenizer", "TokenizersBackend")


def _from_sentencepiece(path: Path, config: dict[str, Any]) -> TokenizerParts:
    """SentencePiece's own file, with BOS and EOS as tokenizer_config.json asks for them."""
    from rvllm.text.tokenizers.gguf import KEY, from_metadata
    from rvllm.text.tokenizers.sentencepiece import read_model

    metadata = read_model(path / "tokenizer.model")
    for name, default in (("add_bos_token", True), ("add_eos_token", False)):
        metadata[KEY + name] = bool(config.get(name, default))
    if isinstance(config.get("add_prefix_space"), bool):
        metadata[KEY + "add_space_prefix"] = config["add_prefix_space"]
    parts = from_metadata(metadata, str(path / "tokenizer.model"))
    if metadata[KEY + "model"] == "llama" and config.get("legacy") is False:
        _space_before_the_first_word(parts.backend, bool(metadata.get(KEY + "add_space_prefix", True)))
    return parts


def _space_before_the_first_word(backend: tokenizers.Tokenizer, prefix: bool) -> None:
    """What `legacy: false` means: no space behind special tokens, nor before a text that begins with one."""
    from tokenizers import normalizers, pre_tokenizers

    spelled = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if prefix and state_of(backend.normalizer) == state_of(spelled):
        backend.normalizer = normalizers.Sequence([])
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)


def _from_wordpieces(path: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """BERT's WordPiece from vocab.txt, one token a line."""
    lines = _read_text(path / "vocab.txt").splitlines()
    cls, sep = (_text_of(config.get(n)) or d for n, d in (("cls_token", "[CLS]"), ("sep_token", "[SEP]")))
    return wordpiece(
        {token: index for index, token in enumerate(lines)}, cls, sep, f"{path / 'vocab.txt'}: holds",
        _text_of(config.get("unk_token")), lowercase=bool(config.get("do_lower_case", True)),
        strip_accents=config.get("strip_accents"),
        chinese=bool(config.get("tokenize_chinese_chars", True)),
    )  # fmt: skip
