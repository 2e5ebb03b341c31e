"""Settings for all tests. What they share is in `support`, which every test can import."""

import asyncio
import inspect
import os
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is no reason to fail, and one tree gives one result: the examples of `steady` depend
# on the test alone. HYPOTHESIS_PROFILE=search draws others each time; docs/testing.md says when.
settings.register_profile("steady", deadline=None, derandomize=True, database=None)
settings.register_profile("search", deadline=None, derandomize=False, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A test that is a coroutine runs in an event loop of its own, a minute at most."""
    test = pyfuncitem.obj
    if not inspect.iscoroutinefunction(test):
        return None
    given = {name: pyfuncitem.funcargs[name] for name in inspect.signature(test).parameters}
    asyncio.run(asyncio.wait_for(test(**given), 60))
    return True


LONG = ("emulated", "models")  # what takes minutes has stages of its own in CI


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A run of the whole suite leaves out kernels that are emulated and models with real weights.

    `-m emulated` and `-m models` run them, and so does naming a folder or file.
    """
    whole = {Path(arg).resolve() for arg in config.args} == {Path(__file__).parent}
    if whole and not config.option.markexpr:
        left_out = [item for item in items if any(map(item.get_closest_marker, LONG))]
        items[:] = [item for item in items if not any(map(item.get_closest_marker, LONG))]
        config.hook.pytest_deselected(items=left_out)
