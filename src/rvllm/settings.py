"""What a setting is: a dataclass field that is also a flag and an environment variable.

Command line, environment, validation and the tables of the documentation are derived from such fields; the
settings themselves are declared in `config.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from rvllm.errors import UsageError


@dataclass(frozen=True)
class Setting:
    """What is known of one setting besides its name, type and default."""

    help: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    env: str | None = None  # None: derived from the name
    short: str | None = None
    metavar: str | None = None
    many: bool = False  # several words, kept as one text with a line for each
    other_env: str | None = None  # a variable of vLLM's that means the same
    # Variables of rvLLM in Rust: name, its text, and the value that this stands for.
    switches: tuple[tuple[str, str, str], ...] = ()
    secret: bool = False  # never shown; an empty one is a mistake
    same_as: str = ""  # the setting that this is another name of


def setting(default: Any, help: str, **extra: Any) -> Any:
    """A dataclass field that is also a flag and an environment variable."""
    return field(default=default, metadata={"setting": Setting(help, **extra)})


# A service's name becomes variables of every pod beside it: RVLLM_PORT=tcp://10.0.0.1:8000.
KUBERNETES = "; Kubernetes sets it for a service named rvllm: set enableServiceLinks: false, or give the flag"


ConfigT = typing.TypeVar("ConfigT")


def settings_of(cls: type) -> list[tuple[dataclasses.Field[Any], Setting]]:
    """The settings a config class declares, in order."""
    return [(f, f.metadata["setting"]) for f in dataclasses.fields(cls)]


def given_settings(config: Any) -> dict[str, str]:
    """Flag and value of every setting of a config that is not its default; a secret's value is left out."""
    changed = {}
    for f, known in settings_of(type(config)):
        value = getattr(config, f.name)
        if value != f.default:
            changed[flag_of(f.name)] = "..." if known.secret else shown(value)
    return changed


def flag_of(name: str) -> str:
    """`max_num_seqs` → `--max-num-seqs`."""
    return "--" + name.replace("_", "-")


def env_of(name: str, known: Setting) -> str:
    return known.env or f"RVLLM_{name.upper()}"


_hints_of = cache(typing.get_type_hints)  # of a class, all at once: a start asks for each of its fields


def _base_type(cls: type, name: str) -> tuple[type, bool]:
    """(int | float | str | bool, whether None is allowed) of a field."""
    hint = _hints_of(cls)[name]
    if isinstance(hint, types.UnionType):
        inner = [t for t in typing.get_args(hint) if t is not type(None)]
        return inner[0], True
    return hint, False


def human_size(text: str) -> int:
    """`4k` → 4000, `4K` → 4096, and so on with m, g and t, as vLLM reads whole numbers. Raises ValueError."""
    number, unit = text[:-1], text[-1:]
    power = "kmgt".find(unit.lower()) + 1 if unit else 0
    if not power:
        return int(text)
    size = int(number) * 1024**power if unit.isupper() else round(float(number) * 1000**power)
    return int(size)


def parse_value(cls: type, name: str, text: str) -> Any:
    """Text from the command line or environment as the field's type.

    Raises UsageError that says what would be accepted.
    """
    base, optional = _base_type(cls, name)
    if base is str:
        return text  # any text: none, auto and the like mean themselves
    if optional and text.lower() in ("none", "auto", ""):
        return None
    if base is bool:
        if text.lower() in ("1", "true", "yes", "on"):
            return True
        if text.lower() in ("0", "false", "no", "off", ""):
            return False
        raise UsageError(f"{name}: expected true or false, got {text!r}")
    try:
        return human_size(text) if base is int else base(text)
    except (ValueError, OverflowError):
        kind = {"int": "a whole number", "float": "a number"}.get(base.__name__, base.__name__)
        raise UsageError(f"{name}: expected {kind}, got {text!r}") from None


def check_value(known: Setting, value: Any, origin: str) -> None:
    """Raises UsageError when a value is out of range or not one of the choices."""
    if value is None:
        return
    if known.choices and value not in known.choices:
        raise UsageError(f"{origin}: {value!r} is not one of {', '.join(known.choices)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{origin}: must be a finite number, got {value:g}")
    if known.low is not None and value < known.low:
        raise UsageError(f"{origin}: must be at least {known.low:g}, got {value}")
    if known.high is not None and value > known.high:
        raise UsageError(f"{origin}: must be at most {known.high:g}, got {value}")


def add_flags(parser: argparse.ArgumentParser, cls: type, title: str, names: Sequence[str] = ()) -> None:
    """Adds a config class's settings to a parser, or those of `names`; values stay text until `build`."""
    add_settings(parser.add_argument_group(title), cls, names)


MAX_METAVAR = 50  # characters


def add_settings(group: Any, cls: type, names: Sequence[str] = ()) -> None:
    """Adds a config class's settings, or those of `names`, to a parser or a group of one."""
    for f, known in settings_of(cls):
        if names and f.name not in names:
            continue
        flags = [flag_of(f.name)] + ([known.short] if known.short else [])
        base, _ = _base_type(cls, f.name)
        text = known.help.replace("%", "%%") + ("" if f.default is None else f" [{shown(f.default)}]")
        if base is bool:
            group.add_argument(
                *flags, dest=f.name, action=argparse.BooleanOptionalAction, default=None, help=text
            )
        else:
            metavar = known.metavar or base.__name__.upper()
            if known.choices:
                metavar = "{" + ",".join(known.choices) + "}"
                if len(metavar) > MAX_METAVAR:  # argparse breaks lines at spaces alone
                    metavar, text = "NAME", f"{text} One of: {', '.join(known.choices)}."
            several: dict[str, Any] = {"nargs": "+"} if known.many else {}
            group.add_argument(*flags, dest=f.name, default=None, metavar=metavar, help=text, **several)


def build(cls: type[ConfigT], given: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> ConfigT:
    """A config from flags (`given`: text, typed values or None), then the environment, then defaults.

    Raises UsageError naming the flag or variable that is wrong.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for f, known in settings_of(cls):
        value, origin = given.get(f.name), flag_of(f.name)
        env = env_of(f.name, known)  # of a secret also when set to nothing: that is no wish to go without
        if value is None and (environ.get(env) or (known.secret and env in environ)):
            origin, value = env, environ[env]
        if value is None and known.other_env is not None and known.other_env in environ:
            origin, value = known.other_env, environ[known.other_env]
        if value is None:
            origin, value = _switched(known, environ) or (origin, None)
        if value is None:
            continue
        if known.many:
            value = _lines(value)
        if isinstance(value, dict):  # vLLM's settings that are objects
            value = json.dumps(value)
        if isinstance(value, str):
            try:
                value = parse_value(cls, f.name, value)
            except UsageError as error:
                hint = KUBERNETES if value.startswith("tcp://") and not origin.startswith("--") else ""
                raise UsageError(f"{origin}: {str(error).partition(': ')[2]}{hint}") from None
        if known.secret and not value:
            raise UsageError(f"{origin}: must not be empty")
        check_value(known, value, origin)
        if values.get(known.same_as, value) != value:
            first = f"{flag_of(known.same_as)} {values[known.same_as]}"
            raise UsageError(f"{first} and {origin} {value} are one setting: give one of them")
        values[f.name] = value
    return cls(**values)


def _switched(known: Setting, environ: Mapping[str, str]) -> tuple[str, str] | None:
    """The switch that is on, as it is written, and the value it stands for.

    Raises UsageError where two that are on stand for different values, or one is set to what it never is.
    """
    found: dict[str, str] = {}
    for variable, text, value in known.switches:
        given = environ.get(variable, "")
        if given not in ("", "0", "1"):
            raise UsageError(f"{variable}: expected 0 or 1, got {given!r}")
        if given == text:
            found[f"{variable}={text}"] = value
    if len(set(found.values())) > 1:
        raise UsageError(f"{' and '.join(found)} ask for different things: give one of them")
    return next(iter(found.items()), None)


def _lines(value: Any) -> str:
    """Several words as one text, a line for each; a JSON list of them is taken, as vLLM takes it."""
    words = [value] if isinstance(value, str) else [str(word) for word in value]
    if len(words) == 1 and words[0].startswith("["):
        with contextlib.suppress(ValueError):
            words = [str(word) for word in json.loads(words[0])]
    return "\n".join(words)


def shown(value: Any) -> str:
    """`on`, `off`, or the value's text."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def read_text(flag: str, file: str | Path) -> str:
    """The text of a file that `flag` names. Raises UsageError naming both."""
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UsageError(f"{flag}: cannot read {file}: {reason}") from None


def markdown_table(cls: type, flags: bool = True) -> str:
    """The documentation's table of a config class; flags: whether its settings have any."""
    lines = ["| flag | environment | default | what it does |", "| --- | --- | --- | --- |"]
    for f, known in settings_of(cls):
        base, _ = _base_type(cls, f.name)
        flag = flag_of(f.name) if flags else "(none)"
        if base is bool and flags:
            flag += f" / --no-{f.name.replace('_', '-')}"
        default = "(derived)" if f.default is None else shown(f.default)
        choices = f" One of: {', '.join(known.choices)}." if known.choices else ""
        lines.append(f"| `{flag}` | `{env_of(f.name, known)}` | {default} | {known.help}{choices} |")
    return "\n".join(lines)
