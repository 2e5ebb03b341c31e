"""outlines against a running server: JSON by a model, choices, regular expressions, grammars.

    pip install "outlines[openai]" && python outlines_loop.py URL MODEL

Ends with an error when anything is not as it should be.
"""

import re
import sys
from typing import Literal

import openai
import outlines
from outlines.types import CFG, Regex
from pydantic import BaseModel


class Person(BaseModel):
    """A person of whom a text tells."""

    name: str
    age: int


def main(url: str, model: str) -> None:
    """All runs: through OpenAI's way of asking, and vLLM's."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    asked = "Extract: Ann is 31 years old."
    of_openai = outlines.from_openai(client, model)
    told = of_openai(asked, Person, max_tokens=60, temperature=0)
    assert Person.model_validate_json(told).age == 31, told
    of_vllm = outlines.from_vllm(client, model)
    told = of_vllm(asked, Person, max_tokens=60, temperature=0)
    assert Person.model_validate_json(told) == Person(name="Ann", age=31), told
    assert of_vllm("Is Paris in France?", Literal["Yes", "No"], max_tokens=5, temperature=0) in ("Yes", "No")
    date = of_vllm(
        "When did Apollo 11 land? Give the date.", Regex(r"\d{4}-\d{2}-\d{2}"), max_tokens=16, temperature=0
    )
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", date), date
    grammar = CFG('start: "yes" | "no"')
    assert of_vllm("Is Paris in France?", grammar, max_tokens=5, temperature=0) in ("yes", "no")
    pieces = list(of_vllm.stream("Say hello.", max_tokens=12, temperature=0))
    assert len(pieces) > 2
    print(f"JSON twice, choice, {date}, grammar, {len(pieces)} pieces")


main(*sys.argv[1:])
