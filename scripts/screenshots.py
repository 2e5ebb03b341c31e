"""Makes the README's pictures of the page: a real server, some traffic, a headless Chromium.

python scripts/screenshots.py [--model smollm2-135m] [--out docs/images] [--phone]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pty
import re
import subprocess
import sys
import tempfile
import termios
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from rich.console import Console  # noqa: E402
from rich.text import Text  # noqa: E402

from support.clients.browser import ENTER, Browser, missing  # noqa: E402

SYSTEM = "You are a patient teacher. Answer in short sentences, with one example where it helps. " * 6
QUESTIONS = [
    "What is a page table?", "Why is the sky blue?", "What does a compiler do?", "How do tides work?",
    "What is a prime number?", "How does a bicycle stay up?",
]  # fmt: skip
ASKED = "Write a Python function that adds two numbers, and explain it in a list."


def post(url: str, messages: list[dict[str, str]], max_tokens: int) -> None:
    body = {"messages": messages, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0.7}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        answer.read()


def traffic(url: str, seconds: float, over: threading.Event) -> list[threading.Thread]:
    """Several conversations at once that share a system prompt, one after the other."""

    def converse(number: int) -> None:
        end, turn = time.monotonic() + seconds, 0
        time.sleep(1.7 * number)
        while time.monotonic() < end and not over.is_set():
            question = QUESTIONS[(number + turn) % len(QUESTIONS)]
            post(url, [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
                 90 + 40 * ((number + turn) % 4))  # fmt: skip
            turn += 1

    threads = [threading.Thread(target=converse, args=(number,), daemon=True) for number in range(5)]
    for thread in threads:
        thread.start()
    return threads


def chat(browser: Browser, url: str) -> None:
    browser.open(f"{url}/#chat")
    browser.until(lambda: browser.text("#status .word") == "ready")
    browser.run("localStorage.setItem('rvllm-settings', arguments[0])",
                json.dumps({"temperature": "0", "max_tokens": "220"}))  # fmt: skip
    browser.open(f"{url}/?#chat")
    browser.until(lambda: browser.text("#status .word") == "ready")
    browser.type("#prompt", ASKED)
    browser.type("#prompt", ENTER)
    growing = "return document.querySelector('.assistant.done .tail')?.childNodes.length ?? 1"
    browser.until(lambda: browser.run(growing) == 0, 120)
    browser.run("document.getElementById('log').scrollTop = 0")


def engine(browser: Browser, url: str, seconds: float) -> None:
    browser.open(f"{url}/#engine")
    browser.until(lambda: browser.count(".tile"))
    time.sleep(seconds)


def drawn(target: Path, text: str, title: str) -> None:
    """Text with a terminal's colours, as a picture of 80 columns."""
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(Text.from_ansi(text.replace(str(Path.home()), "~")))
    picture = console.export_svg(title=title)
    target.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL))  # a font from elsewhere


def terminal(target: Path, *words: str) -> None:
    """What a command prints on 80 columns, as a picture."""
    variables = {**os.environ, "COLUMNS": "80", "FORCE_COLOR": "1"}
    command = [sys.executable, "-m", "rvllm", *words]
    text = subprocess.run(command, check=True, capture_output=True, text=True, env=variables).stdout
    drawn(target, text, f"rvllm {' '.join(words)}")


def conversation(target: Path, url: str) -> None:
    """What `rvllm chat` shows on a terminal of 80 columns, as a picture."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 80))
    words = ["chat", "--url", url, "--temperature", "0", "--max-tokens", "220"]
    with tempfile.TemporaryDirectory() as cache:  # not into the user's history
        variables = {**os.environ, "TERM": "xterm-256color", "RVLLM_CACHE_DIR": cache}
        child = subprocess.Popen([sys.executable, "-m", "rvllm", *words], env=variables,
                                 stdin=theirs, stdout=theirs, stderr=theirs)  # fmt: skip
        os.close(theirs)
        written = ""
        for prompt, typed in (("> ", ASKED), ("first after", "/quit")):
            while prompt not in written:
                written += os.read(ours, 65536).decode()
            os.write(ours, f"{typed}\n".encode())
        child.wait(20)
        os.close(ours)
    drawn(target, "\n".join(screen(written)), "rvllm chat")


def screen(written: str) -> list[str]:
    """The lines that a terminal shows at last: those drawn again are there once."""
    lines, row = [""], 0
    for piece in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\n|[^\x1b\r\n]+", written):
        if piece == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif piece == "\x1b[2K":
            lines[row] = ""
        elif up := re.fullmatch(r"\x1b\[(\d+)A", piece):
            row -= int(up[1])
        elif piece.endswith("m") or piece[0] != "\x1b":
            lines[row] += piece
    return lines


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--port", type=int, default=8731)
    parser.add_argument("--seconds", type=float, default=40.0, help="how long the engine view is watched")
    parser.add_argument("--phone", action="store_true", help="also pictures as a phone shows it")
    args = parser.parse_args()
    if reason := missing():
        print(reason, file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    server = subprocess.Popen(
        [sys.executable, "-m", "rvllm", "serve", "--model", args.model, "--port", str(args.port),
         "--served-model-name", "smollm2-135m", "--num-blocks", "320", "--max-num-seqs", "8"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    url, over, threads = f"http://127.0.0.1:{args.port}", threading.Event(), list[threading.Thread]()
    try:
        assert server.stdout is not None
        while "listening on" not in server.stdout.readline():
            if server.poll() is not None:
                return 1
        for name, dark in (("light", False), ("dark", True)):
            with Browser(1280, 800, dark=dark) as browser:
                chat(browser, url)
                browser.screenshot(args.out / f"chat-{name}.png")
        conversation(args.out / "chat.svg", url)
        if args.phone:
            with Browser(390, 844, scale=2) as browser:
                chat(browser, url)
                browser.screenshot(args.out / "chat-phone.png")
        threads = traffic(url, args.seconds + 30, over)
        with Browser(1280, 1360) as light, Browser(1280, 1360, dark=True) as dark:
            engine(light, url, 0)
            engine(dark, url, args.seconds)
            terminal(args.out / "top.svg", "top", "--once", "--url", url)
            light.screenshot(args.out / "engine-light.png")
            dark.screenshot(args.out / "engine-dark.png")
        terminal(args.out / "plan.svg", "plan", "--model", args.model, "--batch", "8")
        terminal(args.out / "info.svg", "info", "--model", args.model)
        if args.phone:
            with Browser(390, 844, scale=2) as browser:
                engine(browser, url, 8)
                browser.screenshot(args.out / "engine-phone.png")
                browser.run("document.getElementById('engine').scrollTop = 620")
                browser.screenshot(args.out / "engine-phone-2.png")
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
        server.terminate()
        server.wait(40)
    return 0


if __name__ == "__main__":
    sys.exit(main())
