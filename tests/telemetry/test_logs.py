"""Log lines stay one line each and can be split again."""

import io
import logging
import shlex
from collections.abc import Iterator

import pytest

from rvllm.telemetry import logs


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    before = (logs.LOGGER.handlers[:], logs.LOGGER.level, logs.LOGGER.propagate)
    made = io.StringIO()
    logs.set_up("info", made)
    yield made
    logs.LOGGER.handlers[:], logs.LOGGER.level, logs.LOGGER.propagate = before


def test_fields_follow_the_message(stream: io.StringIO) -> None:
    logs.event(logging.INFO, "request", id="abc", seconds=1.23456, path=None, text='a "b" c')
    line = stream.getvalue()
    assert line.endswith(' info    request id=abc seconds=1.235 text="a \\"b\\" c"\n')
    assert 'text=a "b" c' in shlex.split(line)


def test_nothing_below_the_level(stream: io.StringIO) -> None:
    logs.event(logging.DEBUG, "secret")
    assert stream.getvalue() == ""


def test_whatever_is_logged_stays_on_its_line(stream: io.StringIO) -> None:
    logs.event(logging.WARNING, "bad\nthing", value="x\r\n2026 error forged \x1b[31m")
    assert stream.getvalue().count("\n") == 1
    assert "\x1b" not in stream.getvalue()
