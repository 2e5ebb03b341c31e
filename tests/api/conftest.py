"""One live server for the tests of a module, and official clients of it."""

from collections.abc import Iterator

import anthropic
import openai
import pytest

from support.doubles.server import LiveServer


@pytest.fixture(scope="module")
def module_server(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    """With the settings in the module's `SERVER_SETTINGS`, if it has them."""
    with LiveServer(drain_timeout=0.2, **getattr(request.module, "SERVER_SETTINGS", {})) as live:
        yield live


@pytest.fixture
def server(module_server: LiveServer) -> Iterator[LiveServer]:
    """The module's server; what a test makes its engine do ends with the test."""
    yield module_server
    module_server.engine.behave()


@pytest.fixture(scope="module")
def client(module_server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=module_server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def claude(module_server: LiveServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=module_server.url, api_key="none", max_retries=0) as made:
        yield made
