"""With RVLLM_TEST_EMULATE=1 the tests that want a GPU run on the emulator: slow, and only what sm_80 has."""

from __future__ import annotations

import os

if os.environ.get("RVLLM_TEST_EMULATE") == "1":
    from emulator.driver import emulated_driver

    _for_the_session = emulated_driver()
    _for_the_session.__enter__()
