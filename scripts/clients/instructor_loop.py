"""instructor against a running server: typed answers by tools, JSON and schema, whole and in parts.

    pip install instructor && python instructor_loop.py URL MODEL

Ends with an error when anything is not as it should be.
"""

import sys
from typing import Literal

import instructor
import openai
from pydantic import BaseModel, Field

ASKED = "Extract: Ann is 31 years old and lives in Paris."


class Person(BaseModel):
    """A person of whom a text tells."""

    name: str
    age: int = Field(ge=0, le=150)
    city: Literal["Paris", "London"]


def main(url: str, model: str) -> None:
    """All runs."""
    plain = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": ASKED}]
    for mode in (
        instructor.Mode.TOOLS,
        instructor.Mode.JSON,
        instructor.Mode.JSON_SCHEMA,
        instructor.Mode.MD_JSON,
    ):
        client = instructor.from_openai(plain, mode=mode)
        given = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 100}
        person = client.chat.completions.create(response_model=Person, max_retries=1, **given)
        assert person.model_dump() == {"name": "Ann", "age": 31, "city": "Paris"}, (mode, person)
        parts = list(client.chat.completions.create_partial(response_model=Person, **given))
        assert len(parts) > 3 and parts[-1].age == 31, (mode, parts[-1])
        print(f"{mode.value}: {len(parts)} parts")


main(*sys.argv[1:])
