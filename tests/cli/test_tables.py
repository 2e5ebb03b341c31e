"""Numbers as people read them."""

import pytest

from rvllm.cli.common.tables import human_seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.00042, "420 µs"),
        (0.0009994, "999 µs"),
        (0.001, "1 ms"),
        (0.25, "250 ms"),
        (1.0, "1 s"),
        (90.0, "90 s"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text
