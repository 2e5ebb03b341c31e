"""Answers in Markdown on a terminal."""

import io
import re

import pytest
from rich.console import Console

from rvllm.cli.common.markdown import MarkdownView, finished_up_to

ANSWER = """# Title

Some **bold** words.

```python
if a:

    b = 1
```

- one

- two

The end of it."""


def shown(text: str, size: int, height: int = 25) -> str:
    """What stays on an 80-column screen, without colours, of an answer that came in pieces."""
    out = io.StringIO()
    with MarkdownView(Console(file=out, force_terminal=True, width=80, height=height)) as view:
        for at in range(0, len(text), size):
            view.add(text[at : at + size])
    return screen(out.getvalue())


def screen(written: str) -> str:
    """Plays what a terminal was sent: erasing a line, going up, the rest is text."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[?\d;]*[a-zA-Z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.endswith("A") and part.startswith("\x1b"):
            row -= int(part[2:-1] or 1)
        elif part.endswith("K") and part.startswith("\x1b"):
            lines[row] = ""
        elif not part.startswith(("\x1b", "\r")):
            lines[row] += part
    return "\n".join(line.rstrip() for line in lines).strip("\n")


@pytest.fixture(autouse=True)
def every_piece_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rvllm.cli.common.markdown.MIN_SECONDS", 0.0)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_same_stays_however_it_came(size: int) -> None:
    seen = shown(ANSWER, size)
    assert "**" not in seen and "```" not in seen
    for text in ("Title", "Some bold words.", "if a:", "    b = 1", " • one", " • two", "The end of it."):
        assert seen.count(text) == 1, (text, seen)


def test_a_block_longer_than_the_screen_is_whole_at_the_end() -> None:
    text = "```\n" + "\n".join(f"line {i} of it" for i in range(40)) + "\n```"
    seen = shown(text, 9, height=10)
    assert [seen.count(f"line {i} of it") for i in range(40)] == [1] * 40


def test_blocks_are_finished_when_nothing_can_join_them() -> None:
    assert finished_up_to("on", 0) == 0
    assert finished_up_to("one\n\n", 0) == 0, "the next line may belong to it"
    assert finished_up_to("one\n\ntwo\n", 0) == 5
    assert finished_up_to("- one\n\n- two\n\n  more\n", 0) == 0
    assert finished_up_to("~~~\na\n\nb\n", 0) == 0
