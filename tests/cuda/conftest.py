"""Fixtures of kernel checks that run on the emulator and on a GPU.

With RVLLM_TEST_EMULATE=1 the tests that want a GPU run on the emulator: slow, and only what sm_80 has.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

if os.environ.get("RVLLM_TEST_EMULATE") == "1":
    from support.emulator.driver import emulated_driver

    _for_the_session = emulated_driver()
    _for_the_session.__enter__()


@pytest.fixture(scope="module")
def machines() -> dict[str, Any]:
    return {}


@pytest.fixture(
    params=[
        pytest.param("emulator", marks=pytest.mark.emulated),
        pytest.param("gpu", marks=pytest.mark.gpu),
    ]
)
def gpu(request: pytest.FixtureRequest, machines: dict[str, Any]) -> Iterator[Any]:
    yield from _machine(request.param, machines)


@pytest.fixture
def emulator(machines: dict[str, Any]) -> Iterator[Any]:
    """For what is checked there alone; such tests are marked `emulated`."""
    yield from _machine("emulator", machines)


def _machine(kind: str, machines: dict[str, Any]) -> Iterator[Any]:
    """One for all tests of a module, cleared behind each; skips where there is none."""
    from rvllm.backends.cuda.device.driver import device_count
    from support.emulator import Emulator, available
    from support.kernels.harness import Gpu

    if kind == "emulator" and not available():
        pytest.skip("the emulator needs g++")
    if kind == "gpu" and not device_count():
        pytest.skip("no NVIDIA GPU, or the cuda extra is not installed")
    if kind not in machines:
        machines[kind] = Emulator() if kind == "emulator" else Gpu()
    yield machines[kind]
    machines[kind].clear()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    seed = int(os.environ.get("RVLLM_TEST_SEED", "0"))
    return np.random.default_rng([seed, zlib.crc32(request.node.name.encode())])
