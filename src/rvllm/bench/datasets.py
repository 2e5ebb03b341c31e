"""Prompts for measurements from files, under the names and by the rules of vLLM's `bench`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rvllm.errors import UsageError
from rvllm.settings import read_text

FROM_FILES = ("sharegpt", "custom", "sonnet")
NAMES = ("random", "prefix_repetition", *FROM_FILES)
_SONNET = "Pick as many lines as you can from these poem lines:\n"
_MIN, _MAX_PROMPT, _MAX_TOTAL = 4, 1024, 2048  # tokens of a ShareGPT turn and of both together

Count = Callable[[str], int]  # how many tokens a text has


@dataclass(frozen=True)
class Asked:
    """A prompt, as text or as token ids, and how many tokens its answer may have."""

    prompt: str | list[int]
    output_len: int


def check_name(name: str) -> None:
    """Raises UsageError for a data set of vLLM's that is not read here, naming those that are."""
    if name not in NAMES:
        raise UsageError(
            f"--dataset-name {name}: nothing is fetched and no picture read; there are {', '.join(NAMES)} "
            "(a JSON line with a prompt for each request is --dataset-name custom)"
        )


def from_file(
    name: str, path: str | None, count: int, seed: int, output_len: int | None, tokens: Count, options: Any
) -> list[Asked]:
    """`count` prompts of a file; of a shorter one, over and over.

    output_len: of every answer; None: what the file or vLLM's defaults say. options: has `sonnet_input_len`
    and `sonnet_prefix_len`, and may have `no_oversample` (fewer prompts of a short file) and
    `disable_shuffle`. Raises UsageError naming what is wrong with the file.
    """
    if path is None:
        raise UsageError(f"--dataset-name {name} needs --dataset-path FILE")
    source, file = random.Random(seed), Path(path)
    if name == "sonnet":
        return _sonnet(file, count, source, output_len or 150, tokens, options)
    mixed = None if getattr(options, "disable_shuffle", False) else source
    found = (
        list(_sharegpt(file, mixed, output_len, tokens)) if name == "sharegpt" else _custom(file, output_len)
    )
    if not found:
        raise UsageError(f"--dataset-path {file}: holds no prompt of a fitting length")
    if getattr(options, "no_oversample", False):
        return found[:count]
    return [found[i % len(found)] for i in range(count)]


def prefix_repetition(
    count: int, seed: int, prefixes: int, prefix_len: int, suffix_len: int, output_len: int, vocab_size: int
) -> list[Asked]:
    """Random token ids of which groups of equal size begin alike."""
    source, low = random.Random(seed), min(1000, vocab_size // 2)

    def ids(length: int) -> list[int]:
        return [source.randrange(low, vocab_size) for _ in range(length)]

    shared = [ids(prefix_len) for _ in range(prefixes)]
    found = [Asked([*shared[i % prefixes], *ids(suffix_len)], output_len) for i in range(count)]
    source.shuffle(found)
    return found


def _json(file: Path, text: str, where: str = "") -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UsageError(f"--dataset-path {file}: {where}no JSON") from None


def _sharegpt(
    file: Path, source: random.Random | None, output_len: int | None, tokens: Count
) -> Iterator[Asked]:
    """The first turn of each conversation of two or more, with its answer's length."""
    entries = _json(file, read_text("--dataset-path", file))
    if not isinstance(entries, list):
        raise UsageError(f"--dataset-path {file}: must hold a list of conversations")
    talks = [e.get("conversations") for e in entries if isinstance(e, dict)]
    turns = [talk for talk in talks if isinstance(talk, list) and len(talk) >= 2]
    if source is not None:
        source.shuffle(turns)
    for first, second, *_ in turns:
        try:
            prompt, answer = str(first["value"]), str(second["value"])
        except (TypeError, KeyError):
            raise UsageError(f"--dataset-path {file}: a turn of a conversation has no value") from None
        length, written = tokens(prompt), output_len or tokens(answer)
        long = length > _MAX_PROMPT or length + written > _MAX_TOTAL
        if length >= _MIN and (output_len is not None or written >= _MIN) and not long:
            yield Asked(prompt, written)


def _custom(file: Path, output_len: int | None) -> list[Asked]:
    """The prompts of a file with a JSON object a line; `output_tokens` in it is the answer's length."""
    found = []
    for number, line in enumerate(read_text("--dataset-path", file).splitlines(), 1):
        if not line.strip():
            continue
        entry = _json(file, line, f"line {number} is ")
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise UsageError(f"--dataset-path {file}: line {number} has no prompt")
        length = entry.get("output_tokens") if output_len in (None, -1) else output_len
        found.append(Asked(entry["prompt"], length if isinstance(length, int) and length > 0 else 256))
    return found


def _sonnet(
    file: Path, count: int, source: random.Random, output_len: int, tokens: Count, options: Any
) -> list[Asked]:
    """Lines of a poem drawn at random up to a length, the first of them alike in all prompts."""
    lines = [line + "\n" for line in read_text("--dataset-path", file).splitlines() if line.strip()]
    if not lines:
        raise UsageError(f"--dataset-path {file}: holds no lines")
    average = max(1.0, tokens("".join(lines[:200])) / len(lines[:200]))
    base = tokens(_SONNET)
    if options.sonnet_input_len <= base:
        raise UsageError(f"--sonnet-input-len must be more than the {base} tokens of the question")
    wanted = max(1, round((options.sonnet_input_len - base) / average))
    alike = min(wanted, max(0, round((options.sonnet_prefix_len - base) / average)))
    return [
        Asked(_SONNET + "".join([*lines[:alike], *source.choices(lines, k=wanted - alike)]), output_len)
        for _ in range(count)
    ]
