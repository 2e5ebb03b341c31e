"""Lets made-up requests ask for the model that is served; nearly all would end at its name otherwise."""

import os

import schemathesis


@schemathesis.hook
def map_body(context: object, body: object) -> object:
    """A body's model, where it is any text, becomes the served one."""
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        body["model"] = os.environ["SERVED_MODEL"]
    return body
