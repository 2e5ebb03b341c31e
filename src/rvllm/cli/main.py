"""The command `rvllm`: finds the subcommand, loads its module alone, and turns errors into one line."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from rvllm.errors import RvllmError
from rvllm.version import __version__

COMMANDS = {
    "serve": "serve a model over HTTP (the default when only flags are given)",
    "chat": "talk to a model in the terminal",
    "benchmark": "time the engine: tokens per second, time to first token, latency between tokens",
    "bench": "measure with vLLM's arguments: serve, throughput, latency",
    "race": "measure engines beside each other: vLLM, SGLang, llama.cpp, any OpenAI server",
    "run-batch": "answer the requests of a JSONL file without a server",
    "top": "watch a running server's engine in the terminal",
    "trace": "where the time of a request went",
    "ray": "many GPUs: replicas of engines behind one address, with Ray Serve",
    "pull": "fetch a model into the cache",
    "plan": "print the program a model runs: ops, shapes, bytes, FLOPs",
    "kernels": "list, compile, check and tune the CUDA kernels",
    "info": "print version, devices, settings and the memory plan",
}
# vLLM's commands that are none of ours, with what to use instead.
INSTEAD = {
    "complete": "rvllm chat --url URL, or POST /v1/completions",
    "collect-env": "rvllm info",
    "launch": "rvllm serve, whose /tokenize renders chats too",
    "api_server": "rvllm serve MODEL",
}
TAKE_VLLM_FLAGS = ("serve", "chat", "benchmark", "bench", "run-batch", "info", "plan")
INTERRUPTED = 128 + signal.SIGINT


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are a single line that names the way out."""

    def error(self, message: str) -> NoReturn:
        """Prints `message` and exits with 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the process's exit code.

    A failure meant for the user prints one line on stderr and gives its own code, Ctrl-C gives 130, and a
    reader that closed our output (`| head`) ends the command quietly.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].startswith("-") and words[0] not in ("-h", "--help", "--version"):
        words.insert(0, "serve")
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except RvllmError as error:
        print(f"rvllm: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # What is still buffered would fail again when the interpreter flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except SystemExit as ending:  # argparse, after --help or a wrong flag
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)


def _innermost(parser: argparse.ArgumentParser, words: list[str]) -> argparse.ArgumentParser:
    """The parser of a command's kind (`bench throughput`), where the words name one."""
    kinds = next((a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)), {})
    return next((kinds[word] for word in words[1:2] if word in kinds), parser)


def _print_help(parser: argparse.ArgumentParser, asked: str) -> int:
    """`--help=WORD`, as vLLM has it: the flags whose name or text has the word; `all`: every flag."""
    text = parser.format_help()
    word = asked.lower().replace("_", "-").removesuffix("config")
    if word == "all":
        print(text, end="")
        return 0
    entries: list[list[str]] = []
    for line in text.splitlines():
        if line.startswith("  -"):
            entries.append([line])
        elif entries and line.startswith("   "):
            entries[-1].append(line)
    found = ["\n".join(entry) for entry in entries if word in " ".join(entry).lower()]
    print("\n".join(found) or f"no flag has {asked!r} in its name or text; --help=all shows every flag")
    return 0 if found else 2


def _tell_of_unknown_variables() -> None:
    """One line on stderr: a misspelt variable would otherwise leave its setting as it was, silently."""
    if not any(name.startswith("RVLLM_") for name in os.environ):
        return
    from rvllm.config import unknown_variables

    if unknown := unknown_variables(os.environ):
        names = [f"{name} ({close}?)" if close else name for name, close in unknown.items()]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        print(f"rvllm: no setting reads {', '.join(names[:5])}{more}", file=sys.stderr)


def _run(words: list[str]) -> int:
    parser = OneLineParser(
        prog="rvllm", description="An LLM inference server for one GPU that you understand completely."
    )
    parser.add_argument("--version", action="version", version=f"rvllm {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    chosen = words[0] if words else ""
    module = importlib.import_module(f"rvllm.cli.{chosen.replace('-', '_')}") if chosen in COMMANDS else None
    for name, text in COMMANDS.items():
        if module is None:
            subparsers.add_parser(name, help=text)
        elif name == chosen:
            module.add_parser(subparsers)
    if module is None and not (words and words[0].startswith("-")):
        if chosen in INSTEAD:
            parser.error(f"{chosen} is vLLM's; here it is {INSTEAD[chosen]}")
        if words:
            parser.error(f"unknown command {words[0]!r}; there are {', '.join(COMMANDS)}")
        parser.print_help()
        return 0
    if chosen in TAKE_VLLM_FLAGS:
        from rvllm.vllm.words import own_words

        words = [chosen, *own_words(words[1:])]
        if asked := next((word[7:] for word in words if word.startswith("--help=")), ""):
            return _print_help(_innermost(subparsers.choices[chosen], words), asked)
    args, unknown = parser.parse_known_args(words)
    if unknown:
        from rvllm.vllm.words import hint

        command = f"rvllm {chosen}"
        near = hint(unknown)
        parser.exit(2, f"{command}: unknown arguments: {' '.join(unknown)}{near} (see {command} --help)\n")
    if module is None:  # only reached by flags that argparse accepts without a command
        parser.print_help()
        return 0
    _tell_of_unknown_variables()
    code = module.main(args)
    assert isinstance(code, int)
    return code
