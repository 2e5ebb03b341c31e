"""One live server for the tests of a module, and official clients of it."""

from collections.abc import Iterator

import anthropic
import openai
import pytest

from support.doubles.server import LiveServer


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    """With the settings in the module's `SERVER_SETTINGS`, if it has them."""
    with LiveServer(drain_timeout=0.2, **getattr(request.module, "SERVER_SETTINGS", {})) as live:
        yield live


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def claude(server: LiveServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as made:
        yield made
