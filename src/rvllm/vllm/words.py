"""A command line as vLLM's users write it: both spellings of flags, its own flags, `--config FILE.yaml`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rvllm.config import EngineConfig, ServerConfig
from rvllm.errors import UsageError
from rvllm.settings import flag_of, read_text, settings_of
from rvllm.vllm.flags import VLLM_FLAGS, VLLM_VALUES, settle

_SHORT = {short: name for name, flag in VLLM_FLAGS.items() for short in flag.short}
_SHORT["-q"] = "quantization"
# Flags that several words follow.
_MANY = ("lora_modules", "cudagraph_capture_sizes", "middleware", "ignore_patterns", "prompt_adapters",
         "logits_processors", "default_mm_loras")  # fmt: skip

_COMMAS = ("allowed_origins", "allowed_hosts")


def own_words(words: Sequence[str], known: frozenset[str] | None = None) -> list[str]:
    """The words with vLLM's flags taken out or in our spelling.

    known: the settings that the command has; None: all of them.
    Raises UsageError for a flag that asks for what we do not do, naming what to use instead.
    """
    classes = (EngineConfig, ServerConfig)
    ours = known if known is not None else frozenset(f.name for c in classes for f, _ in settings_of(c))
    found: list[str] = []
    rest = list(_with_config(words))
    while rest:
        word = rest.pop(0)
        name, value, spelled = _named(word)
        if word == "--":
            return [*found, word, *rest]
        if name is None:
            found.append(word)
        elif name in ours:
            found += _translated(name, word, value, rest)
        elif (setting := _vllm_name(name)) is not None:
            negated = name != setting and name == f"no_{setting}"
            found += _settled(setting, _value_of(setting, value, negated, rest), spelled)
        else:
            found.append(word if not word.startswith("--") else _dashed(word))
    return found


def hint(unknown: Sequence[str]) -> str:
    """What a flag that nobody knows may be a slip of; "" where nothing is near."""
    names = [flag_of(f.name) for c in (EngineConfig, ServerConfig) for f, _ in settings_of(c)]
    flag = next((word.partition("=")[0] for word in unknown if word.startswith("--")), "")
    if _dashed(flag) in names:
        return f"; {_dashed(flag)} is one of rvllm serve"
    near = get_close_matches(_dashed(flag), names, n=1, cutoff=0.75)
    return f"; {near[0]}?" if near else ""


def _named(word: str) -> tuple[str | None, str | None, str]:
    """(the flag's name with underscores, the value behind `=`, the flag as written) of a word."""
    if word in _SHORT:
        return _SHORT[word], None, word
    for short, name in _SHORT.items():
        if word.startswith((short + "=", short + ".")) or (short == "-O" and word.startswith(short)):
            return name, word[len(short) :].lstrip("="), short
    if not word.startswith("--") or word == "--":
        return None, None, word
    flag, equals, value = word.partition("=")
    return flag[2:].partition(".")[0].replace("-", "_"), value if equals else None, flag


def _vllm_name(name: str) -> str | None:
    """vLLM's setting of a flag, which may be negated by `no_`."""
    if name in VLLM_FLAGS:
        return name
    bare = name.removeprefix("no_")
    return bare if bare in VLLM_FLAGS and VLLM_FLAGS[bare].switch else None


def _translated(name: str, word: str, value: str | None, rest: list[str]) -> list[str]:
    """A flag of our own in our spelling, its value in our words."""
    words = VLLM_VALUES.get(name)
    flag = flag_of(name)
    if name in _COMMAS:
        return [f"{flag}={_commas(rest.pop(0) if value is None and rest else value or '')}"]
    if words is None:
        return [flag if value is None else f"{flag}={value}"]
    if value is None:
        if not rest:
            return [flag]
        value = rest.pop(0)
    value = words.get(value, value)
    return [] if value is None else [f"{flag}={value}"]


def _commas(value: str) -> str:
    """A JSON list as vLLM takes it, with commas as we do."""
    try:
        found = json.loads(value)
    except ValueError:
        return value
    return ",".join(map(str, found)) if isinstance(found, list) else value


def _value_of(name: str, value: str | None, negated: bool, rest: list[str]) -> Any:
    """The value of one of vLLM's flags; its words are taken from `rest`."""
    if VLLM_FLAGS[name].switch:
        if value is not None:
            return value.lower() not in ("false", "0", "no")
        return not negated
    if value is not None:
        return value
    words = [rest.pop(0)] if rest and not _is_flag(rest[0]) else []
    while name in _MANY and rest and not _is_flag(rest[0]):
        words.append(rest.pop(0))
    return " ".join(words)


def _settled(name: str, value: Any, spelled: str) -> list[str]:
    found = settle(name, value, f"{spelled} ")
    if found is None:
        return []
    ours, value = found
    if isinstance(value, bool):
        return [flag_of(ours) if value else "--no-" + ours.replace("_", "-")]
    return [f"{flag_of(ours)}={value}"]


def _is_flag(word: str) -> bool:
    return word.startswith("-") and not word[1:2].isdigit()


def _dashed(word: str) -> str:
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def _with_config(words: Sequence[str]) -> Iterator[str]:
    """The words of `--config FILE.yaml` in front of the others, which therefore win."""
    given, files = [], []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--config" and rest:
            files.append(rest.pop(0))
        elif word.startswith("--config="):
            files.append(word.partition("=")[2])
        else:
            given.append(word)
    for file in files:
        yield from _words_of(Path(file))
    yield from given


def _words_of(file: Path) -> Iterator[str]:
    """A YAML file's settings as flags. Raises UsageError naming the file and what is wrong."""
    import yaml

    try:
        values = yaml.safe_load(read_text("--config", file)) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"--config: {file} is no YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise UsageError(f"--config: {file} must hold names and values")
    for name, value in values.items():
        yield from _words_of_setting(str(name), value)


def _words_of_setting(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    bare = name.replace("-", "_")
    if value is None:
        return []
    if isinstance(value, bool):
        known = VLLM_FLAGS.get(bare)
        if known is not None and not known.switch:
            return [f"{flag}={value}"]
        return [flag if value else "--no-" + flag[2:]]
    if isinstance(value, dict):
        return [f"{flag}={json.dumps(value)}"]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [f"{flag}={value}"]
