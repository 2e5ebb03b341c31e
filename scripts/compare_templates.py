"""Renders public chat templates with Transformers and with ours, and tells where they differ.

    python scripts/compare_templates.py llama_cpp_python-*.tar.gz

The templates are those of llama.cpp's models/templates, out of llama-cpp-python's source package (fetch it
with `pip download --no-deps --no-binary :all: llama-cpp-python`). The oracle is Transformers'
`render_jinja_template`, given each message in the form that the template can show: a call's arguments as
an object or as text, content null or empty. Differences, and what only one of both renders, are printed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from rvllm.errors import UsageError
from rvllm.text.chat.template import render_chat, template_traits
from rvllm.text.tools.choose import tool_format

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks a place up.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Its name."}},
                "required": ["city"],
            },
        },
    }
]
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
USER: dict[str, Any] = {"role": "user", "content": "Where is Zürich <b>?"}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "name": "look_up", "content": "In Switzerland."}


def call(arguments: Any, content: Any) -> dict[str, Any]:
    """An assistant's turn that is one call."""
    function = {"name": "look_up", "arguments": arguments}
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": "abcdefghi", "type": "function", "function": function}],
    }


TEXT = '{"city": "Zürich"}'
TALKS: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "one turn": ([USER], None),
    "system, turns": (
        [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "There."}, USER],
        None,
    ),
    "tools": ([USER], TOOLS),
    "call, null content": ([USER, call(TEXT, None), RESULT], TOOLS),
    "call, empty content": ([USER, call(TEXT, ""), RESULT], TOOLS),
    "call with words": ([USER, call(TEXT, "I look."), RESULT], TOOLS),
    "broken arguments": ([USER, call('{"city": "Zü', None), RESULT], TOOLS),
}


def forms(talk: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The conversation as a user of Transformers may have to write it, for one template or another."""
    for as_object in (True, False):
        for content in ("given", None, "", "absent"):
            changed = []
            for message in talk:
                message = json.loads(json.dumps(message))
                for each in message.get("tool_calls", ()):
                    if as_object:
                        try:
                            each["function"]["arguments"] = json.loads(each["function"]["arguments"])
                        except ValueError:
                            each["function"]["arguments"] = {"city": "Zü"}
                if message.get("tool_calls") and not message["content"] and content != "given":
                    if content == "absent":
                        del message["content"]
                    else:
                        message["content"] = content
                changed.append(message)
            yield changed


def theirs(template: str, talk: list[dict[str, Any]], tools: Any) -> list[str]:
    """What Transformers renders, for each form of the conversation that the template can show."""
    found = []
    for form in forms(talk):
        try:
            ((text,), _) = render_jinja_template(
                conversations=[form],
                tools=tools,
                chat_template=template,
                add_generation_prompt=True,
                **VARIABLES,
            )
        except Exception:
            continue
        found.append(text)
    return found


def shows_city(text: str) -> bool:
    """Whether a call's argument is in the text behind the user's first words."""
    rest = text.partition("<b>")[2]
    return "Zü" in rest or "Z\\u00fc" in rest


def compare(template: str) -> tuple[int, int, list[str]]:
    """(conversations that are equal, those that neither renders, what differs)."""
    equal, neither, wrong = 0, 0, []
    traits = template_traits(template)
    for name, (talk, tools) in TALKS.items():
        expected = theirs(template, talk, tools)
        try:
            ours: str | None = render_chat(template, talk, tools=tools, variables=VARIABLES)
        except UsageError as error:
            ours, reason = None, str(error)
        lost = ours is not None and not shows_city(ours) and "call" in name
        shown = any(shows_city(text) for text in expected)
        if ours is None and not expected:
            neither += 1
        elif ours is None:
            wrong.append(f"{name}: {reason}")
        elif ours not in expected and not traits.wants_parts:
            wrong.append(f"{name}: {ours[-200:]!r}")
        elif lost and shown:
            wrong.append(f"{name}: the call is lost")
        else:
            equal += 1
    return equal, neither, wrong


def main() -> int:
    """Compares every template of the package; 1 when anything differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", type=Path, help="llama-cpp-python's source package (.tar.gz)")
    failed = total = 0
    with tarfile.open(parser.parse_args().package) as package:
        for member in package:
            if "/models/templates/" not in member.name or not member.name.endswith(".jinja"):
                continue
            file = package.extractfile(member)
            assert file is not None
            template = file.read().decode()
            equal, neither, wrong = compare(template)
            calls = tool_format("auto", template)
            total += 1
            failed += bool(wrong)
            name = Path(member.name).stem[:52]
            print(f"{name:52} equal {equal} neither {neither} calls {calls.name if calls else '-'}")
            for line in wrong:
                print(f"    {line}")
    print(f"{total - failed} of {total} templates equal Transformers")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
