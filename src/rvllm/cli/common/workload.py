"""The prompts of `rvllm bench`: random ones, or a file's, with vLLM's arguments."""

from __future__ import annotations

import argparse
import dataclasses
import random
from collections.abc import Callable, Mapping
from typing import Any

from rvllm.bench.datasets import NAMES, Asked, check_name, from_file, prefix_repetition
from rvllm.cli.common.remote import ask_json
from rvllm.errors import UsageError

_NOT_READ = (
    "nothing is fetched and no picture read; a JSON line with a prompt for each request is --dataset-name "
    "custom"
)
# vLLM's arguments of data sets that are not read
_ELSEWHERE = (
    "--hf-name", "--hf-subset", "--hf-split", "--hf-output-len", "--spec-bench-output-len",
    "--spec-bench-category", "--blazedit-min-distance", "--blazedit-max-distance", "--random-batch-size",
    "--asr-max-audio-len-sec", "--asr-min-audio-len-sec", "--random-mm-base-items-per-request",
    "--random-mm-num-mm-items-range-ratio", "--random-mm-limit-mm-per-prompt", "--random-mm-bucket-config",
)  # fmt: skip


def add_datasets(parser: argparse.ArgumentParser) -> None:
    """vLLM's arguments that choose prompts."""
    add = parser.add_argument
    add("--dataset-name", default="random", help=f"one of {', '.join(NAMES)} [random]")
    add(
        "--dataset-path",
        help="the file of sharegpt (JSON), custom (JSON lines with a prompt) or sonnet (text)",
    )
    add("--no-oversample", action="store_true", help="a short file's prompts once, not over and over")
    add("--disable-shuffle", action="store_true", help="in the file's order")
    add("--no-stream", action="store_true", help=argparse.SUPPRESS)  # files are read whole anyway
    add_refused(parser, dict.fromkeys(_ELSEWHERE, _NOT_READ))
    add("--vocab-size", type=int, default=30000, help="random ids are below [30000]")
    add("--sharegpt-output-len", type=int, help="tokens of an answer; default: as long as the file's")
    add("--custom-output-len", type=int, help="the same; default: output_tokens of its line, or 256")
    add("--custom-skip-chat-template", action="store_true", help="prompts go to the model as they are")
    add("--skip-chat-template", dest="custom_skip_chat_template", action="store_true")
    add("--sonnet-input-len", type=int, default=550, help="tokens of a prompt [550]")
    add("--sonnet-output-len", type=int, default=150, help="tokens of an answer [150]")
    add("--sonnet-prefix-len", type=int, default=200, help="of them alike in all prompts [200]")
    add("--random-prefix-len", type=int, default=0, help="tokens alike before each prompt [0]")
    add("--random-range-ratio", type=float, default=0.0, help="lengths vary by this share [0]")
    add("--prefix-repetition-prefix-len", type=int, default=256, help="tokens alike in a group [256]")
    add("--prefix-repetition-suffix-len", type=int, default=256, help="tokens of its own [256]")
    add("--prefix-repetition-num-prefixes", type=int, default=10, help="groups [10]")
    add("--prefix-repetition-output-len", type=int, default=128, help="tokens of an answer [128]")


def add_refused(parser: argparse.ArgumentParser, instead: Mapping[str, str]) -> None:
    """vLLM's arguments that ask for what is not done here, with what to use instead, which is said then."""
    for names, text in instead.items():
        parser.add_argument(*names.split(), action=_Refused, nargs="*", const=text, help=argparse.SUPPRESS)


class _Refused(argparse.Action):
    """Raises UsageError with its `const`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        raise UsageError(f"{option_string}: {self.const}")


@dataclasses.dataclass(frozen=True)
class Words:
    """How texts become tokens. chat: a text as the prompt of a conversation."""

    count: Callable[[str], int]
    chat: Callable[[str], str | list[int]]


def of_server(args: argparse.Namespace, base: str, key: str | None) -> Words:
    """Tokens as --tokenizer has them, else as the server does."""

    def tokens(**body: Any) -> list[int]:
        found: list[int] = ask_json(base, "/tokenize", key, body)["tokens"]
        return found

    if args.tokenizer is None:
        return Words(
            lambda text: len(tokens(prompt=text)),
            lambda text: tokens(messages=[{"role": "user", "content": text}], add_generation_prompt=True),
        )
    from rvllm.text.tokenizers.tokenizer import Tokenizer
    from rvllm.weights.fetch.source import resolve

    return of_tokenizer(Tokenizer.load(resolve(args.tokenizer)))


def of_tokenizer(tokenizer: Any) -> Words:

    def chat(text: str) -> str | list[int]:
        found: list[int] = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True
        )
        return found

    return Words(lambda text: len(tokenizer.encode(text)), chat)


def asked_of(args: argparse.Namespace, count: int, words: Words) -> list[Asked]:
    """The requests of a data set; the same for the same seed. Raises UsageError for what is not read."""
    check_name(args.dataset_name)
    seed = int(args.seed or 0)
    if args.dataset_name == "random":
        source, found = random.Random(seed), []
        low, ratio = min(1000, args.vocab_size // 2), args.random_range_ratio
        alike = [source.randrange(low, args.vocab_size) for _ in range(args.random_prefix_len)]
        for _ in range(count):
            length, output = (
                max(1, source.randint(round(n * (1 - ratio)), round(n * (1 + ratio))))
                for n in (args.random_input_len, args.random_output_len)
            )
            found.append(
                Asked([*alike, *(source.randrange(low, args.vocab_size) for _ in range(length))], output)
            )
        return found
    if args.dataset_name == "prefix_repetition":
        return prefix_repetition(
            count, seed, args.prefix_repetition_num_prefixes, args.prefix_repetition_prefix_len,
            args.prefix_repetition_suffix_len, args.prefix_repetition_output_len, args.vocab_size,
        )  # fmt: skip
    output_len = getattr(args, f"{args.dataset_name}_output_len")
    found = from_file(args.dataset_name, args.dataset_path, count, seed, output_len, words.count, args)
    plain = args.dataset_name == "sharegpt" or args.custom_skip_chat_template
    if plain or getattr(args, "backend", "") == "openai-chat":
        return found
    return [Asked(words.chat(str(one.prompt)), one.output_len) for one in found]
