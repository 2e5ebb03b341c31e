"""A typed, range-checked reader over a model's config in Hugging Face's names.

Every refusal is a ModelError that names the file and the field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from rvllm.errors import ModelError

# The reader's methods are named after the types they read; these keep the types reachable in signatures.
Int: TypeAlias = int
Float: TypeAlias = float
Bool: TypeAlias = bool
Str: TypeAlias = str
List: TypeAlias = list[Any]

MOST = 1 << 24  # no dimension of a model is larger; a bigger number is a broken file


class _Required:
    """Marks a field without a default."""


REQUIRED: Any = _Required()


@dataclass(frozen=True)
class ModelConfig:
    """`values` as read from `origin` (what to call it in messages: a path, `x.gguf metadata`).

    A field that is absent or null takes the default; without a default it is refused.
    """

    values: Mapping[Str, Any]
    origin: Str

    def has(self, name: Str) -> Bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def fail(self, name: Str, problem: Str) -> ModelError:
        """The error for a field; raise it."""
        return ModelError(f"{self.origin}: {name} {problem}")

    def _get(self, name: Str, default: Any) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is REQUIRED:
            raise self.fail(name, "is missing")
        return default

    def int(self, name: Str, default: Any = REQUIRED, *, low: Int = 1, high: Int = MOST) -> Int:
        """A whole number in [low, high]."""
        value = self._get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(name, f"must be a whole number, got {_shown(value)}")
        if not low <= value <= high:
            raise self.fail(name, f"must be in [{low}, {high}], got {value}")
        return value

    def float(
        self, name: Str, default: Any = REQUIRED, *, low: Float = -math.inf, high: Float = math.inf
    ) -> Float:
        """A finite number in [low, high]."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.fail(name, f"must be a number, got {_shown(value)}")
        if not low <= value <= high:
            raise self.fail(name, f"must be in [{low:g}, {high:g}], got {value:g}")
        return float(value)

    def bool(self, name: Str, default: Any = REQUIRED) -> Bool:
        """true or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.fail(name, f"must be true or false, got {_shown(value)}")
        return value

    def str(self, name: Str, default: Any = REQUIRED, choices: Sequence[Str] = ()) -> Str:
        """A text, one of `choices` when given."""
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.fail(name, f"must be a text, got {_shown(value)}")
        if choices and value not in choices:
            raise self.fail(name, f"is {value!r}, supported: {', '.join(choices)}")
        return value

    def opt_int(self, name: Str, absent: Int | None = None, *, low: Int = 1, high: Int = MOST) -> Int | None:
        """A whole number, None when null, and `absent` when it is not there."""
        if name not in self.values:
            return absent
        return self.int(name, low=low, high=high) if self.has(name) else None

    def opt_float(
        self, name: Str, absent: Float | None = None, *, low: Float = -math.inf, high: Float = math.inf
    ) -> Float | None:
        """A number, None when null, and `absent` when it is not there."""
        if name not in self.values:
            return absent
        return self.float(name, low=low, high=high) if self.has(name) else None

    def opt_str(self, name: Str) -> Str | None:
        """A text, or None when absent or null."""
        return self.str(name) if self.has(name) else None

    def list(self, name: Str, default: Any = REQUIRED, *, length: Int | None = None) -> List:
        """A list, of exactly `length` entries when given."""
        value = self._get(name, default)
        if not isinstance(value, list | tuple):
            raise self.fail(name, f"must be a list, got {_shown(value)}")
        if length is not None and len(value) != length:
            raise self.fail(name, f"must have {length} entries, got {len(value)}")
        return list(value)

    def section(self, name: Str) -> ModelConfig | None:
        """A nested object as a config of its own (`config.json: rope_scaling`), or None."""
        value = self._get(name, None)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.fail(name, f"must be an object, got {_shown(value)}")
        return ModelConfig(value, f"{self.origin}: {name}")

    @property
    def architecture(self) -> Str:
        """The first of `architectures`."""
        names = self.list("architectures")
        if not names or not isinstance(names[0], str):
            raise self.fail("architectures", "names no architecture")
        return names[0]

    @property
    def eos_token_ids(self) -> tuple[Int, ...]:
        """eos_token_id as a tuple, whether it is absent, a number or a list."""
        return token_ids(self, "eos_token_id")


def token_ids(config: ModelConfig, name: str) -> tuple[int, ...]:
    """A field that holds one token id, a list of them, or nothing; -1 stands for none."""
    value = config.values.get(name)
    if value is None:
        return ()
    ids = [
        entry for entry in (value if isinstance(value, list | tuple) else [value]) if entry not in (None, -1)
    ]
    for entry in ids:
        if isinstance(entry, bool) or not isinstance(entry, int) or not 0 <= entry < MOST:
            raise config.fail(name, f"must be a token id or a list of them, got {_shown(value)}")
    return tuple(ids)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
