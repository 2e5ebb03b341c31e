"""vLLM's `EngineArgs` and its argument parser, for scripts that take their settings from a command line."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from rvllm.config import EngineConfig
from rvllm.settings import add_settings, settings_of
from rvllm.vllm.flags import VLLM_FLAGS
from rvllm.vllm.words import own_words

_NAMES = tuple(dict.fromkeys([*(f.name for f, _ in settings_of(EngineConfig)), *VLLM_FLAGS]))
_Fields = dataclasses.make_dataclass(
    "_Fields", [("model", str, EngineConfig.model), *((n, Any, None) for n in _NAMES if n != "model")]
)


class EngineArgs(_Fields):  # type: ignore[misc,valid-type]
    """What `LLM` and `LLMEngine` take, ours and vLLM's; None is the default.

    `dataclasses.asdict` gives the arguments of `LLM`. What asks for something that we do not do is refused
    when an engine is made of it.
    """

    @staticmethod
    def add_cli_args(parser: Any) -> Any:
        """Adds the engine's flags to a parser or to a group of one, and returns it."""
        add_settings(parser, EngineConfig)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> EngineArgs:
        """The settings among a parser's arguments."""
        return cls(
            **{name: value for name, value in vars(args).items() if name in _NAMES and value is not None}
        )


class AsyncEngineArgs(EngineArgs):
    """The same for `AsyncLLM`."""


class FlexibleArgumentParser(argparse.ArgumentParser):
    """An ArgumentParser that reads vLLM's flags in both spellings, and `--config FILE.yaml`."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """The arguments, and the words that are none. Raises UsageError for what we do not do."""
        import sys

        return super().parse_known_args(own_words(sys.argv[1:] if args is None else args), namespace)
