"""`rvllm chat`: a conversation in the terminal, with an engine of its own or a running server."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rvllm.config import EngineConfig
from rvllm.errors import RvllmError, UsageError
from rvllm.settings import add_flags, build, flag_of, parse_value

if TYPE_CHECKING:
    from collections.abc import Callable

Conversation = list[dict[str, str]]
HISTORY = "chat-history"
HELP = """/reset         forget the conversation
/system TEXT   set the system prompt and start anew; without TEXT: remove it
/help          show this
/quit          end (Ctrl-D does too)
A line that ends with \\ goes on in the next one. Ctrl-C stops an answer."""


@dataclass(frozen=True)
class Sampling:
    """What the flags say of sampling; None leaves it to the model's defaults."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None

    def given(self) -> dict[str, Any]:
        """The values that were set."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass
class Answer:
    """An answer as it comes, so that what came before an interruption is kept. Times in seconds."""

    show: Callable[[str], None]
    began: float = field(default_factory=time.perf_counter)
    text: str = ""
    tokens: int = 0
    first: float = 0.0
    last: float = 0.0

    def add(self, text: str, tokens: int) -> None:
        """Takes the next piece and shows it."""
        self.last = time.perf_counter() - self.began
        if tokens and not self.tokens:
            self.first = self.last
        self.tokens += tokens
        self.text += text
        self.show(text)

    def summary(self) -> str:
        """Tokens, their rate after the first, and the time to the first."""
        spent = self.last - self.first
        rate = f" · {(self.tokens - 1) / spent:.1f} tok/s" if self.tokens > 1 and spent > 0 else ""
        return f"{self.tokens} tokens{rate} · first after {self.first:.2f} s"


class Talker(Protocol):
    """Whoever answers: an engine of ours or a server."""

    def answer(self, conversation: Conversation, sampling: Sampling, answer: Answer) -> None:
        """Adds the pieces of the next message to `answer`; KeyboardInterrupt stops it."""

    def close(self) -> None:
        """Ends what was started."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("chat", help="talk to a model in the terminal", allow_abbrev=False)
    group = parser.add_argument_group("conversation")
    group.add_argument("--url", metavar="URL", help="talk to a running server instead of loading a model")
    group.add_argument("--api-key", metavar="STR", help="the server's key")
    group.add_argument("--system", "--system-prompt", metavar="TEXT", help="system prompt")
    group.add_argument("--quick", metavar="TEXT", help="send one message, print the answer and end")
    group.add_argument("--temperature", metavar="FLOAT", help="0 is greedy; default: the model's")
    group.add_argument("--top-p", metavar="FLOAT", help="nucleus sampling; default: the model's")
    group.add_argument("--max-tokens", metavar="INT", help="longest answer; default: what the context holds")
    group.add_argument("--sampling-seed", metavar="INT", help="seed of the answers")
    add_flags(parser, EngineConfig, "engine")


def main(args: argparse.Namespace) -> int:
    """Runs the conversation until the input ends."""
    sampling = _sampling(args)
    if args.url:
        from rvllm.cli.common.remote import RemoteTalker

        talker: Talker = RemoteTalker(args.url, args.model, args.api_key)
    else:
        from rvllm.cli.common.local import LocalTalker

        talker = LocalTalker(build(EngineConfig, vars(args)))
    try:
        session = _Session(talker, sampling, args.system)
        if args.quick is not None:
            session.say(args.quick)
        else:
            session.run()
    finally:
        talker.close()
    return 0


def _sampling(args: argparse.Namespace) -> Sampling:
    values: dict[str, Any] = {}
    for name in ("temperature", "top_p", "max_tokens", "seed"):
        flag = "sampling_seed" if name == "seed" else name
        if (text := getattr(args, flag)) is not None:
            try:
                values[name] = parse_value(Sampling, name, text)
            except UsageError as error:
                raise UsageError(f"{flag_of(flag)}: {str(error).partition(': ')[2]}") from None
    from rvllm.engine.sampling_params import SamplingParams

    SamplingParams(**values)
    return Sampling(**values)


def _edit_lines() -> None:
    """Arrow keys, search and history for `input()`, kept from one conversation to the next."""
    try:
        import readline
    except ImportError:  # a Python built without it
        return
    import atexit

    from rvllm.config import SourceConfig

    kept = Path(build(SourceConfig, {}).cache_dir).expanduser() / HISTORY
    with contextlib.suppress(OSError):
        readline.read_history_file(kept)
    readline.set_history_length(1000)

    def keep() -> None:
        with contextlib.suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.touch(mode=0o600)  # what was said is nobody else's business
            readline.write_history_file(kept)

    atexit.register(keep)


class _Session:
    """The loop of reading, answering and commands."""

    def __init__(self, talker: Talker, sampling: Sampling, system: str | None) -> None:
        self._talker, self._sampling = talker, sampling
        self._terminal = sys.stdin.isatty()
        self._rendered = self._terminal and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._conversation: Conversation = []
        self._start(system)

    def _start(self, system: str | None) -> None:
        self._conversation = [{"role": "system", "content": system}] if system else []

    def run(self) -> None:
        """Until the input ends or /quit."""
        if self._terminal:
            _edit_lines()
            print("Type a message; /help shows the commands.", file=sys.stderr)
        while (line := self._read()) is not None:
            if line.startswith("/"):
                if not self._command(line):
                    return
            elif line.strip():
                self.say(line)

    def _read(self) -> str | None:
        """The next message, None at the end of the input."""
        lines: list[str] = []
        while True:
            try:
                line = input(("> " if not lines else ". ") if self._terminal else "")
            except EOFError:
                return "\n".join(lines) or None
            except KeyboardInterrupt:
                if not self._terminal:
                    raise
                print("\n(/quit ends)", file=sys.stderr)
                lines = []
                continue
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def _command(self, line: str) -> bool:
        """Runs a command; False ends the session."""
        name, _, rest = line.strip().partition(" ")
        if name == "/quit":
            return False
        if name == "/reset":
            self._conversation = [m for m in self._conversation if m["role"] == "system"][:1]
            print("The conversation is forgotten.", file=sys.stderr)
        elif name == "/system":
            self._start(rest.strip() or None)
            print("System prompt set." if rest.strip() else "System prompt removed.", file=sys.stderr)
        elif name == "/help":
            print(HELP, file=sys.stderr)
        else:
            print(f"There is no {name}; /help shows the commands.", file=sys.stderr)
        return True

    def say(self, text: str) -> None:
        """Sends a message and shows the answer; one that failed is taken back."""
        self._conversation.append({"role": "user", "content": text})
        answer = Answer(lambda piece: print(piece, end="", flush=True))
        try:
            if self._rendered:
                from rvllm.cli.common.markdown import MarkdownView

                with MarkdownView() as view:
                    answer.show = view.add
                    self._talker.answer(self._conversation, self._sampling, answer)
            else:
                self._talker.answer(self._conversation, self._sampling, answer)
                print(flush=True)
        except KeyboardInterrupt:
            if not self._terminal:
                raise
            print("" if self._rendered else "\n", "(stopped)", sep="", file=sys.stderr)
        except RvllmError as error:
            if not self._terminal:
                raise
            self._conversation.pop()
            way_out = "; /reset starts a new conversation" if len(self._conversation) > 1 else ""
            print(f"rvllm: {error}{way_out}", file=sys.stderr)
            return
        print(f"  {answer.summary()}", file=sys.stderr)
        self._conversation.append({"role": "assistant", "content": answer.text})
