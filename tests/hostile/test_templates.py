"""Chat templates as attackers: a model's files are somebody else's code."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from support.clients.attacker import Server, model

ASK = {"messages": [{"role": "user", "content": "go"}], "max_tokens": 2}
GUARD = "{% if messages[0].content != 'go' %}fine{% else %}BOMB{% endif %}"
BOMBS = {
    "a loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "memory": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a power": "{% set n = messages|length + 9 %}{{ (n ** 10) ** (n ** 6) }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
}


def test_a_template_that_never_ends_stops_nobody() -> None:
    """Each bomb goes off for one kind of message only; all other requests and the end stay prompt."""
    bombs = "".join(
        f"{{% if messages[0].content == 'go {name}' %}}{bomb}{{% endif %}}" for name, bomb in BOMBS.items()
    )
    with Server("--worker-timeout", "1", "--worker-memory-mb", "300", template=bombs + "hello") as server:
        for name in BOMBS:
            before = time.monotonic()
            body = {**ASK, "messages": [{"role": "user", "content": f"go {name}"}]}
            status, answer = server.ask("POST", "/v1/chat/completions", body)
            assert status == 400, (name, answer)
            assert time.monotonic() - before < 25
            assert (again := server.ask("POST", "/v1/chat/completions", ASK))[0] == 200, (name, again)
        assert "Traceback" not in server.text()
        before = time.monotonic()
        assert server.end() == 0 and time.monotonic() - before < 25


def test_a_template_that_never_ends_does_not_start() -> None:
    """Not while the server looks at it at its start either; the message says what to do."""
    server = Server("--worker-timeout", "1", template=BOMBS["a loop"] + "{{ tools }}", wait=False)
    assert server.process.wait(100) == 2
    assert "chat template: takes longer than 1 s (--worker-timeout)" in server.text()
    assert "Traceback" not in server.text()


def test_a_tokenizer_that_gives_up_stops_nobody(tmp_path: Path) -> None:
    """A pattern that tries for ever: what makes the tokenizer meet it is refused, nobody else notices."""
    folder = tmp_path / "model"
    shutil.copytree(model(), folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    (folder / "tokenizer.json").write_text(json.dumps(data | {"pre_tokenizer": pattern}))
    bomb = "a" * 40 + "b"
    with Server("--model", str(folder), "--worker-timeout", "2") as server:
        for body in (
            {"prompt": bomb},
            {"bad_words": [bomb]},
            {"echo": True, "prompt": bomb, "max_tokens": 0},
        ):
            assert server.complete(**body)[0] == 400
            assert server.complete()[0] == 200
        chat = {"messages": [{"role": "user", "content": bomb}], "max_tokens": 1}
        assert server.ask("POST", "/v1/chat/completions", chat)[0] == 400
        assert server.ask("POST", "/tokenize", {"prompt": bomb})[0] == 400
        assert "Traceback" not in server.text() and server.end() == 0


INSIDES = [
    "messages.__class__",
    "''.__class__.__mro__",
    "self._TemplateReference__context",
    "namespace(__class__=1)",
    "cycler.__init__.__globals__",
]


@pytest.mark.parametrize("inside", INSIDES)
def test_a_template_reaches_nothing_of_pythons(inside: str) -> None:
    from rvllm.errors import UsageError
    from rvllm.text.chat.template import render_chat

    template = f"[{{{{ {inside} }}}}]"
    try:
        shown = render_chat(template, [{"role": "user", "content": "a"}])
    except UsageError:
        return
    assert shown == "[]"
