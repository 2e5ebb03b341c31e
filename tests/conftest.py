"""Settings for all tests. What they share is in `support`, which every test can import."""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("busy", deadline=None)  # a busy machine is no reason to fail
settings.load_profile("busy")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A run of the whole suite leaves out what is emulated, which has a stage of its own in CI.

    `-m emulated` runs it, and so does naming a folder or file.
    """
    whole = {Path(arg).resolve() for arg in config.args} == {Path(__file__).parent}
    if whole and not config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("emulated")]
        items[:] = [item for item in items if not item.get_closest_marker("emulated")]
        config.hook.pytest_deselected(items=left_out)
